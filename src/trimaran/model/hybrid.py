"""The hybrid language model: embedding, one residual block per pattern letter, final norm, head, optional draft block.

- pre-norm residual blocks, x + mixer(norm(x)); RMS norm; no biases; no dropout; untied embeddings unless asked
- positions only in `R` and `W` blocks; `M` carries order for the rest
- one forward for training, prefill and decoding: tokens, the document each belongs to, and an optional state
- parameter names are the hub's own; experts are stacked
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimaran.errors import Refusal
from trimaran.model.attention import Attention
from trimaran.model.config import ATTENTION, ModelConfig
from trimaran.model.drafts import Ends, greedy_drafts
from trimaran.model.feedforward import FeedForward
from trimaran.model.few import Few, Join
from trimaran.model.layout import Layout, lay_out
from trimaran.model.linear import Embedding, Head, Linear, StackedLinear, TiedHead
from trimaran.model.mamba import Mamba
from trimaran.model.moe import MoE, Router
from trimaran.model.norm import GatedRMSNorm, RMSNorm
from trimaran.model.recompute import again
from trimaran.model.scale import Scale
from trimaran.model.sphere import project_module, step_on_sphere
from trimaran.model.state import Over, PassMemory, StackMemory, State
from trimaran.ops.numbers import parameter_dtype


class Block(nn.Module):
    """x + mixer(norm(x)) for one pattern letter, or its step on the sphere (nGPT)."""

    def __init__(self, config: ModelConfig, letter: str):
        super().__init__()
        self.letter = letter
        self.recomputed = False  # see recompute.py
        self.norm, self.alpha = None, None
        if config.residual == "ngpt":
            self.alpha = Scale(config.hidden_size, 0.05, config.hidden_size**-0.5)
        else:
            self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer: Mamba | Attention | MoE | FeedForward
        if letter == "M":
            self.mixer = Mamba(config)
        elif letter in ATTENTION:
            self.mixer = Attention(config, letter)
        elif letter == "E":
            self.mixer = MoE(config)
        else:
            self.mixer = FeedForward(config, config.intermediate_size)

    def forward(self, x_BTD: Tensor, layout: Layout, state: object, keys: int) -> Tensor:
        if self.recomputed and self.training and torch.is_grad_enabled():
            if isinstance(state, PassMemory):
                return again(self.step, self.mixer, x_BTD, layout, state.asked_twice(), keys)
            if state is None:  # any other memory would move on a second time
                return again(self.step, self.mixer, x_BTD, layout, state, keys)
        return self.step(x_BTD, layout, state, keys)

    def step(self, x_BTD: Tensor, layout: Layout, state: object, keys: int) -> Tensor:
        """The block's work."""
        if self.alpha is not None:
            return step_on_sphere(x_BTD, self.mix(x_BTD, layout, state, keys), self.alpha)
        assert self.norm is not None
        return x_BTD + self.mix(self.norm(x_BTD), layout, state, keys)

    def mix(self, h_BTD: Tensor, layout: Layout, state: object, keys: int) -> Tensor:
        """The mixer, given what its kind needs."""
        if self.letter == "-":
            return self.mixer(h_BTD)
        if self.letter == "E":
            return self.mixer(h_BTD, layout)
        if self.letter == "M":
            return self.mixer(h_BTD, layout, state)
        return self.mixer(h_BTD, layout, state, keys)


def run_stack(
    few: Few,
    parts: list[nn.Module | Join],
    x_BTD: Tensor,
    layout: Layout,
    state: StackMemory | None,
    beside_BTD: Tensor | None = None,
) -> Tensor:
    """All parts of a stack in order: what it begins with, which may read `beside`, its blocks, its norm."""
    keys = layout.length if state is None else state.keys(layout)
    memories = iter(() if state is None else state.layers)
    memory_of = [next(memories, None) if isinstance(part, Block) else None for part in parts]

    def step(index: int, x_BTD: Tensor) -> Tensor:
        part = parts[index]
        if isinstance(part, Block):
            return part(x_BTD, layout, memory_of[index], keys)
        return part(x_BTD, beside_BTD) if isinstance(part, Join) else part(x_BTD)

    known = few.know(parts, x_BTD, beside_BTD)
    if known is not None:
        return few.run(known, x_BTD, layout, memory_of, keys, beside_BTD, step)
    for index in range(len(parts)):
        x_BTD = step(index, x_BTD)
    return x_BTD


class Backbone(nn.Module):
    """Embedding, blocks, final norm; and the version of the whole model's weights, which the draft block reads too."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.version = 0
        self.few = Few()
        self.over: Over | None = None  # set where rows lie over several processes
        self.embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, letter) for letter in config.pattern)
        on_sphere = config.residual == "ngpt"
        self.norm_f = nn.Identity() if on_sphere else RMSNorm(config.hidden_size, config.layer_norm_epsilon)


class MTP(nn.Module):
    """The draft block (multi-token prediction): from h_t and token t+1 to a hidden vector that predicts token t+2.

    x = eh_proj([enorm(Emb(next)) ; hnorm(h)]), the block's own layers, final_layernorm. The same weights serve every
    depth: the output, with the token after next, is the input of the next depth. Embedding and head are the trunk's.
    """

    def __init__(self, config: ModelConfig, trunk: Backbone):
        super().__init__()
        # In a tuple, so that the trunk is not registered a second time under this module's name.
        self.trunk = (trunk,)
        self.few = Few()
        self.layers = nn.ModuleList(Block(config, letter) for letter in config.mtp_pattern)
        width, eps = config.hidden_size, config.layer_norm_epsilon
        first, last = self.ends()
        first.enorm, first.hnorm = RMSNorm(width, eps), RMSNorm(width, eps)
        first.eh_proj = Linear(2 * width, width)
        last.final_layernorm = RMSNorm(width, eps)

    def parts(self) -> list[Any]:
        """What the block does, in order."""
        blocks: list[Any] = list(self.layers)
        return [Join(blocks[0]), *blocks, blocks[-1].final_layernorm]

    def ends(self) -> tuple[Any, Any]:
        """The first and the last layer, under which the hub files the block's own norms and its input map."""
        return self.layers[0], self.layers[-1]

    def forward(
        self, hidden_BTD: Tensor, next_BT: Tensor, doc_ids: Tensor | None = None, state: StackMemory | None = None
    ) -> Tensor:
        """hidden_BTD: after the trunk's final norm, or an earlier depth's output; next_BT: the token one further."""
        embeddings = self.trunk[0].embeddings
        state = remembered(self.trunk[0], self.layers, next_BT, state)
        layout = begin(next_BT, doc_ids, state, self.trunk[0].version)
        next_BT = checked(layout, next_BT, embeddings.vocab_size)
        if layout.order_BT is not None:
            hidden_BTD = hidden_BTD.gather(1, layout.order_BT[..., None].expand_as(hidden_BTD))
        x_BTD = run_stack(self.few, self.parts(), embeddings(next_BT), layout, state, hidden_BTD)
        if state is not None:
            state.advance(layout, doc_ids)
        return layout.restore(x_BTD)


class HybridModel(nn.Module):
    """The whole model. `version` counts changes of the weights; whoever caches what they imply compares it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        if not config.tie_embeddings:
            self.lm_head = Head(config.hidden_size, config.vocab_size, scaled=config.residual == "ngpt")
        self.mtp = MTP(config, self.backbone) if config.mtp_pattern else None
        self.seen_ends = Ends()
        self.ends = True  # a stage of a pipeline that is not the last has no final norm, head or draft block

    @property
    def version(self) -> int:
        return self.backbone.version

    @version.setter
    def version(self, count: int) -> None:
        self.backbone.version = count

    @property
    def head(self) -> Head | TiedHead:
        """The module from hidden vectors to logits."""
        return TiedHead(self.backbone.embeddings) if self.config.tie_embeddings else self.lm_head

    @property
    def device(self) -> torch.device:
        return self.backbone.embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.embeddings.weight.dtype

    def forward(self, tokens: Tensor, doc_ids: Tensor | None = None, state: StackMemory | None = None) -> Tensor:
        """tokens [B, T] -> logits [B, T, vocab] in at least fp32; advances `state` when given."""
        return self.head(self.hidden(tokens, doc_ids, state))

    def hidden(
        self,
        tokens_BT: Tensor,
        doc_ids: Tensor | None = None,
        state: StackMemory | None = None,
        stream_BTD: Tensor | None = None,
    ) -> Tensor:
        """Hidden vectors after the final norm [B, T, D].

        doc_ids [B, T]: the same id as the token before continues its document, another begins one (nothing is seen
        across the border), -1 is padding, which updates nothing and comes out as zeros.

        stream_BTD: what the stage of a pipeline before this one gave; a stage that is not the last gives it in turn.
        """
        state = remembered(self.backbone, self.backbone.layers, tokens_BT, state)
        layout = begin(tokens_BT, doc_ids, state, self.version)
        tokens_BT = checked(layout, tokens_BT, self.config.vocab_size)
        x_BTD = self.backbone.embeddings(tokens_BT) if stream_BTD is None else stream_BTD
        parts = [*self.backbone.layers, *([self.backbone.norm_f] if self.ends else [])]
        x_BTD = run_stack(self.backbone.few, parts, x_BTD, layout, state)
        if state is not None:
            state.advance(layout, doc_ids)
        return layout.restore(x_BTD) if self.ends else x_BTD

    def drafts(
        self, hidden_ND: Tensor, following: Sequence[int], rows: int, depth: int, ids: int | None, state: StackMemory
    ) -> tuple[Tensor, list[list[int]]] | None:
        """The draft block reads pairs and goes on alone, in one call: its output at each row's newest pair [S, D], and
        the `depth` likeliest tokens behind each. None, and nothing has happened, where no kernel knows the case.

        hidden, following: the pairs, those of one row after those of the other. ids: tokens from there on are never
        drafted. state: the block's memory for the pairs and depth - 1 tokens more of each row; it is not advanced.
        """
        return greedy_drafts(self, hidden_ND, following, rows, depth, ids, state)

    def recompute(self, letters: str) -> list[str]:
        """Lets training passes run the blocks of these letters twice instead of keeping their activations.

        The draft block's are among them. Returns the blocks' names; raises Refusal for a letter the pattern lacks.
        """
        present = self.config.pattern + self.config.mtp_pattern
        absent = [letter for letter in letters if letter not in present]
        if absent:
            found = f"recompute {letters!r}, and no block is {absent[0]!r}"
            raise Refusal(found, f"letters of {''.join(dict.fromkeys(present))!r}", f"remove {absent[0]!r}")
        blocks = {name: module for name, module in self.named_modules() if isinstance(module, Block)}
        for block in blocks.values():
            block.recomputed = block.letter in letters
        return [name for name, block in blocks.items() if block.recomputed]

    def new_state(self, batch: int, device: torch.device | None = None, room: int = 0) -> State:
        """An empty state for `batch` rows. room: tokens per row that will come; more may, at the price of a copy."""
        device = device or self.device
        state = State(self.config.pattern, batch, self.config, device, self.dtype, room)
        state.version = self.version
        for index, block in enumerate(self.backbone.layers):
            if isinstance(block.mixer, Mamba):
                state.decays[index] = block.mixer.decay_rates().detach()
        if self.config.mtp_pattern:
            state.mtp = State(self.config.mtp_pattern, batch, self.config, device, self.dtype, room)
            state.mtp.version = self.version
        return state

    def save(self, path: str) -> None:
        """Writes the hub layout: config.json and safetensors."""
        from trimaran.model import hub

        hub.save(self, path)


def remembered(
    trunk: Backbone, blocks: nn.ModuleList, tokens_BT: Tensor, state: StackMemory | None
) -> StackMemory | None:
    """The memory of a pass: the state, else that of the processes that rows lie over, else none."""
    if state is not None or trunk.over is None:
        return state
    return trunk.over.memory(len(tokens_BT), trunk.version, len(blocks))


def begin(tokens_BT: Tensor, doc_ids: Tensor | None, state: StackMemory | None, version: int) -> Layout:
    """The layout of a pass, from the state's rows when there is one. Memory made by other weights is refused."""
    if tokens_BT.ndim != 2 or not tokens_BT.shape[1]:
        raise ValueError(f"tokens have shape {tuple(tokens_BT.shape)}: give [batch, length] with length >= 1")
    batch, length = tokens_BT.shape
    if state is None:
        return lay_out(batch, length, tokens_BT.device, doc_ids)
    if state.batch != batch:
        raise ValueError(f"the state holds {state.batch} rows, tokens {batch}: use new_state(batch={batch}) or fork")
    if state.version != version:
        raise RuntimeError(f"state of weights version {state.version}, model is at {version}: make a new state")
    return state.lay_out(length, doc_ids)


def checked(layout: Layout, tokens_BT: Tensor, vocab_size: int) -> Tensor:
    """Tokens with padding on the right (as id 0), refused when an id is outside the vocabulary."""
    tokens_BT = layout.arrange(tokens_BT)
    real_BT = layout.real_BT
    if real_BT is not None:
        tokens_BT = tokens_BT.where(real_BT, 0)
    # On an accelerator this look would wait for the device; its own embedding kernel asserts there.
    if tokens_BT.device.type == "cpu":
        low, high = (int(t) for t in tokens_BT.aminmax())
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise Refusal(
                f"token id {bad}", f"0 to {vocab_size - 1}", "encode the text with this model's own tokenizer"
            )
    return tokens_BT


def build(
    config: ModelConfig,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int | None = 0,
) -> HybridModel:
    """A model with freshly drawn weights; device "meta" allocates nothing. seed None: torch's global generator."""
    with torch.device("meta"):
        model = HybridModel(config)
    for module in model.modules():
        allocate(module, device, dtype)
    if torch.device(device).type != "meta":
        initialise(model, seed)
    return model


def allocate(module: nn.Module, device: str | torch.device, dtype: torch.dtype) -> None:
    """Gives the module's own parameters and buffers memory, uninitialised."""
    for name, parameter in module.named_parameters(recurse=False):
        asked = torch.empty(parameter.shape, device=device, dtype=parameter_dtype(name, dtype))
        setattr(module, name, nn.Parameter(asked))
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, torch.empty(buffer.shape, device=device, dtype=parameter_dtype(name, dtype)))


def initialise(model: HybridModel, seed: int | None = 0) -> None:
    """Draws all weights. seed None: from torch's global generator."""
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    for name, module in model.named_modules():
        initialise_module(name, module, model.config, generator)


@torch.no_grad()
def initialise_module(name: str, module: nn.Module, config: ModelConfig, generator: torch.Generator | None) -> None:
    """Draws a module's own weights, a mixer's convolution with it.

    Megatron-LM's rules for hybrids: N(0, std) everywhere, residual-out maps N(0, std / sqrt(blocks)), D = 1, A uniform
    in [1, 16), dt log-uniform in [time_step_min, time_step_max], convolutions uniform in +-1/sqrt(taps). On the sphere
    they are put there.
    """
    std, out_std = config.initializer_range, config.initializer_range / math.sqrt(len(config.pattern))
    if isinstance(module, (Linear, StackedLinear)):
        residual_out = name.rsplit(".", 1)[-1] in ("out_proj", "o_proj", "down_proj", "fc2_latent_proj")
        module.weight.normal_(0, out_std if residual_out else std, generator=generator)
    elif isinstance(module, (Embedding, Router)):
        module.weight.normal_(0, std, generator=generator)
        if isinstance(module, Router) and config.router == "sigmoid":
            module.e_score_correction_bias.zero_()
    elif isinstance(module, (RMSNorm, GatedRMSNorm)):
        module.weight.fill_(1)
    elif isinstance(module, Scale):
        module.weight.fill_(module.stored)
    elif isinstance(module, Mamba):
        initialise_mamba(module, config, generator)
    if config.residual == "ngpt":
        project_module(name, module)


def initialise_mamba(mixer: Mamba, config: ModelConfig, generator: torch.Generator | None) -> None:
    mixer.D.fill_(1)
    mixer.A_log.uniform_(1, 16, generator=generator).log_()
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    dt = mixer.dt_bias.uniform_(low, high, generator=generator).exp_().clamp_(min=config.time_step_floor)
    mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1(dt)
    bound = 1 / math.sqrt(config.conv_kernel)
    mixer.conv1d.weight.uniform_(-bound, bound, generator=generator)
    if mixer.conv1d.bias is not None:
        mixer.conv1d.bias.uniform_(-bound, bound, generator=generator)
