"""The case `tiny` in plain torch: what a good torch user would write for a small `ME*E` model with a draft block.

No library, no written gradients, no kernels: linear maps, `bmm`, SDPA and `F.cross_entropy` under bf16 autocast
over fp32 weights. The choices are those that were found fastest for tiny models on a CPU:

- the scan in matmul form, chunks of 64, C·Bᵀ once per group, fp32 decays, a state passed from chunk to chunk
- the short convolution as shifted products; experts by `bmm`, padded to the largest load, rounded up
- routers in fp32 with sigmoid scores, and biases that step against the load

It starts from the weights of ours (`copied`), so that losses can be compared.

Shapes: B rows, T tokens, D width, H heads, P channels of a head, N state, Q chunk, C chunks, M = B T, E experts,
K chosen, L latent. Names of sizes are those of the model's configuration.
"""

from typing import Any

import torch
import torch.nn.functional as F
from cpu_sides import BIAS_RATE, DRAFT_SCALE, Side, tiny_rows, training
from torch import Tensor, nn

from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import HybridModel

ROUND = 64  # rows to which the largest load of an expert is rounded: fewer shapes, fewer kernels to generate


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), 1e-5)  # one dtype: fused


def linear(width: int, out: int) -> nn.Linear:
    return nn.Linear(width, out, bias=False)


def empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


class Mamba(nn.Module):
    """Mamba-2 with one group, [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.head_dim, self.size = config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size
        self.width, self.chunk, self.taps = self.heads * self.head_dim, config.chunk_size, config.conv_kernel
        mixed = self.width + 2 * self.size
        self.in_proj = linear(config.hidden_size, self.width + mixed + self.heads)
        self.filters, self.bias = empty(self.taps, mixed), empty(mixed)
        self.A_log, self.D, self.dt_bias = (empty(self.heads) for _ in range(3))
        self.norm = Norm(self.width)
        self.out_proj = linear(self.width, config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        sizes = [self.width, self.width + 2 * self.size, self.heads]
        z_BTC, mixed_BTC, dt_BTH = self.in_proj(x_BTD).split(sizes, -1)
        x_BTC, B_BTN, C_BTN = F.silu(self.convolve(mixed_BTC)).split([self.width, self.size, self.size], -1)
        dt_BTH = F.softplus(dt_BTH.float() + self.dt_bias)
        x_BTHP = x_BTC.unflatten(-1, (self.heads, self.head_dim))
        y_BTHP = self.scan(x_BTHP, dt_BTH, B_BTN, C_BTN) + x_BTHP * self.D.to(x_BTHP.dtype)[:, None]
        return self.out_proj(self.norm(y_BTHP.flatten(2) * F.silu(z_BTC)))

    def convolve(self, x_BTC: Tensor) -> Tensor:
        filters, length = self.filters.to(x_BTC.dtype), x_BTC.shape[1]
        padded = F.pad(x_BTC, (0, 0, self.taps - 1, 0))
        y_BTC = torch.addcmul(self.bias.to(x_BTC.dtype), padded[:, :length], filters[0])
        for tap in range(1, self.taps):
            y_BTC = torch.addcmul(y_BTC, padded[:, tap : tap + length], filters[tap])
        return y_BTC

    def scan(self, x_BTHP: Tensor, dt_BTH: Tensor, B_BTN: Tensor, C_BTN: Tensor) -> Tensor:
        """h = exp(dt A) h + dt B x, y = C h, a chunk at a time. Decays in fp32, products in bf16."""
        low, cut = x_BTHP.dtype, (-1, self.chunk)
        x_BCHQP = (x_BTHP * dt_BTH.to(low)[..., None]).unflatten(1, cut).transpose(2, 3)
        B_BCQN, C_BCQN = B_BTN.unflatten(1, cut), C_BTN.unflatten(1, cut)
        total_BCHQ = (dt_BTH * -self.A_log.exp()).unflatten(1, cut).transpose(2, 3).cumsum(-1)
        above_QQ = torch.ones(self.chunk, self.chunk, dtype=torch.bool).triu(1)
        decay_BCHQQ = (total_BCHQ[..., None] - total_BCHQ[..., None, :]).masked_fill(above_QQ, -torch.inf).exp()
        scores_BCHQQ = (C_BCQN @ B_BCQN.mT)[:, :, None] * decay_BCHQQ.to(low)
        y_BCHQP = scores_BCHQQ @ x_BCHQP
        rest_BCHQ = (total_BCHQ[..., -1:] - total_BCHQ).exp()
        wrote_BCHPN = (x_BCHQP * rest_BCHQ.to(low)[..., None]).mT @ B_BCQN[:, :, None]
        kept_BCH = total_BCHQ[..., -1].exp()
        states, state_BHPN = [], torch.zeros_like(wrote_BCHPN[:, 0], dtype=torch.float32)
        for c in range(wrote_BCHPN.shape[1]):
            states.append(state_BHPN)
            state_BHPN = state_BHPN * kept_BCH[:, c, :, None, None] + wrote_BCHPN[:, c]
        before_BCHNP = torch.stack(states, 1).to(low).mT
        y_BCHQP = y_BCHQP + (C_BCQN[:, :, None] @ before_BCHNP) * total_BCHQ.exp().to(low)[..., None]
        return y_BCHQP.transpose(2, 3).flatten(1, 2)


class Attention(nn.Module):
    """Causal, grouped keys and values, no positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.sizes = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        self.head_dim = config.head_dim
        self.qkv = linear(config.hidden_size, sum(self.sizes) * self.head_dim)
        self.o_proj = linear(self.sizes[0] * self.head_dim, config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        heads_BHTK = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads_BHTK.split(self.sizes, 1)
        y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y_BHTK.transpose(1, 2).flatten(2))


class Experts(nn.Module):
    """Latent experts beside a shared one."""

    bias_E: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, latent, hidden = config.hidden_size, config.moe_latent_size or 0, config.moe_intermediate_size
        shared = config.moe_shared_expert_intermediate_size
        self.count, self.chosen = config.n_routed_experts, config.num_experts_per_tok
        self.router = empty(self.count, width)
        self.register_buffer("bias_E", torch.zeros(self.count))
        self.down, self.up = linear(width, latent), linear(latent, width)
        self.first, self.second = empty(self.count, latent, hidden), empty(self.count, hidden, latent)
        self.shared_first, self.shared_second = linear(width, shared), linear(shared, width)
        self.load_E = torch.zeros(self.count)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_MD = x_BTD.flatten(0, 1)
        with torch.autocast("cpu", enabled=False):
            score_ME = F.linear(x_MD.float(), self.router).sigmoid()
        ids_MK = (score_ME + self.bias_E).topk(self.chosen, sorted=False).indices
        weight_MK = score_ME.gather(1, ids_MK)
        weight_MK = weight_MK / weight_MK.sum(-1, keepdim=True)
        y_MD = self.up(self.route(self.down(x_MD), ids_MK, weight_MK))
        return (y_MD + self.shared_second(F.relu(self.shared_first(x_MD)).square())).view_as(x_BTD)

    def route(self, x_ML: Tensor, ids_MK: Tensor, weight_MK: Tensor) -> Tensor:
        """Every expert's tokens in a block of its own, all blocks as long as the fullest needs, rounded up."""
        chosen_RE = F.one_hot(ids_MK.flatten(), self.count)
        count_RE = chosen_RE.cumsum(0)
        self.load_E = count_RE[-1].float()
        room = -(-int(count_RE[-1].max()) // ROUND) * ROUND
        place_R = ids_MK.flatten() * room + count_RE.gather(1, ids_MK.view(-1, 1))[:, 0] - 1
        rows = x_ML.repeat_interleave(self.chosen, 0)
        blocks_ERL = x_ML.new_zeros(self.count * room, x_ML.shape[1]).index_copy(0, place_R, rows)
        hidden = F.relu(torch.bmm(blocks_ERL.view(self.count, room, -1), self.first)).square()
        out_RL = torch.bmm(hidden, self.second).flatten(0, 1).index_select(0, place_R)
        return (out_RL.view(-1, self.chosen, x_ML.shape[1]) * weight_MK.to(x_ML.dtype)[..., None]).sum(1)

    @torch.no_grad()
    def step_bias(self) -> None:
        """The routers' biases move against the load of the newest pass."""
        self.bias_E.add_(torch.sign(self.load_E.mean() - self.load_E), alpha=BIAS_RATE)


MIXERS = {"M": Mamba, "*": Attention, "E": Experts}


class Blocks(nn.Module):
    """x + mixer(norm(x)) for each letter."""

    def __init__(self, pattern: str, config: ModelConfig):
        super().__init__()
        self.norms = nn.ModuleList(Norm(config.hidden_size) for _ in pattern)
        self.mixers = nn.ModuleList(MIXERS[letter](config) for letter in pattern)

    def forward(self, x_BTD: Tensor) -> Tensor:
        for norm, mixer in zip(self.norms, self.mixers):
            x_BTD = x_BTD + mixer(norm(x_BTD))
        return x_BTD


class Trial(nn.Module):
    """Embedding, blocks, final norm, head; the draft block predicts one token further."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.blocks, self.norm = Blocks(config.pattern, config), Norm(width)
        self.head = linear(width, config.vocab_size)
        self.draft_norms = nn.ModuleList(Norm(width) for _ in range(3))
        self.join = linear(2 * width, width)
        self.draft_blocks = Blocks(config.mtp_pattern, config)

    def loss(self, tokens_BT: Tensor, one_BT: Tensor, two_BT: Tensor) -> Tensor:
        """Cross-entropy of the next token, and of the one after it through the draft block."""
        hidden_BTD = self.norm(self.blocks(self.embedding(tokens_BT)))
        of_token, of_hidden, last = self.draft_norms
        joined = torch.cat([of_token(self.embedding(one_BT)), of_hidden(hidden_BTD)], -1)
        deeper_BTD = last(self.draft_blocks(self.join(joined)))
        losses = [
            F.cross_entropy(self.head(x_BTD).flatten(0, 1), targets_BT.flatten())
            for x_BTD, targets_BT in ((hidden_BTD, one_BT), (deeper_BTD, two_BT))
        ]
        return losses[0] + DRAFT_SCALE * losses[1]


OURS = {  # ours -> the trial's; experts' maps are the other way round there
    "M": "A_log D dt_bias norm.weight in_proj.weight out_proj.weight",
    "*": "o_proj.weight",
    "E": "gate.weight=router fc1_latent_proj.weight=down.weight fc2_latent_proj.weight=up.weight "
    "shared_experts.up_proj.weight=shared_first.weight shared_experts.down_proj.weight=shared_second.weight",
}


@torch.no_grad()
def copy_block(ours: Any, norm: Norm, mixer: nn.Module) -> None:
    """One block's weights."""
    found, mine = dict(ours.mixer.named_parameters()), dict(mixer.named_parameters())
    norm.weight.copy_(ours.norm.weight)
    for pair in OURS[ours.letter].split():
        theirs, _, name = pair.partition("=")
        mine[name or theirs].copy_(found[theirs])
    if ours.letter == "M":
        mine["filters"].copy_(found["conv1d.weight"][:, 0].T)
        mine["bias"].copy_(found["conv1d.bias"])
    if ours.letter == "*":
        mine["qkv.weight"].copy_(torch.cat([found[f"{name}_proj.weight"] for name in "qkv"]))
    if ours.letter == "E":
        mine["first"].copy_(found["experts.up_proj.weight"].mT)
        mine["second"].copy_(found["experts.down_proj.weight"].mT)


@torch.no_grad()
def copied(model: HybridModel) -> Trial:
    """The trial with the weights of ours."""
    trial, mtp = Trial(model.config), model.mtp
    assert mtp is not None
    first, last = mtp.ends()
    pairs = [
        (trial.embedding, model.backbone.embeddings),
        (trial.norm, model.backbone.norm_f),
        (trial.head, model.lm_head),
        (trial.join, first.eh_proj),
        *zip(trial.draft_norms, (first.enorm, first.hnorm, last.final_layernorm)),
    ]
    for mine, ours in pairs:
        mine.weight.copy_(ours.weight)
    for blocks, layers in ((trial.blocks, model.backbone.layers), (trial.draft_blocks, mtp.layers)):
        for norm, mixer, layer in zip(blocks.norms, blocks.mixers, layers):
            copy_block(layer, norm, mixer)
    return trial


def tiny_side(ours: HybridModel) -> Side:
    """One step of the trial, from the weights of ours and on its tokens."""
    model = copied(ours)
    tokens, one, two = tiny_rows(ours.config.vocab_size)

    def loss() -> Tensor:
        value = model.loss(tokens, one, two)
        for module in model.modules():
            if isinstance(module, Experts):
                module.step_bias()
        return value

    return training(model, loss, tokens.numel(), "bf16", clip=1.0)
