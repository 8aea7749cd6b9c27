"""Experts: a fp32 router over the full hidden vector, stacked experts (optionally in a latent space), a shared expert.

- sigmoid router (DeepSeek-V3, Nemotron 3): the k largest of score + bias are chosen, the bias is a buffer that training
  nudges for balance; combine weights are the unbiased scores of the chosen, normalised, times a factor
- group-limited choice: a group's score is the sum of its two largest biased scores; only the best groups compete
- softmax router (Qwen3): the k largest probabilities
- latent experts: down to L once, all experts in L, the weighted sum back up once; router and shared expert see D
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimaran.model.config import ModelConfig
from trimaran.model.feedforward import FeedForward, activate
from trimaran.model.layout import Layout
from trimaran.model.linear import Linear, StackedLinear, few_through
from trimaran.ops import experts, native, triton_backend
from trimaran.ops.numbers import at_least_fp32


class Row(Protocol):
    """The processes that hold the tokens of each row between them."""

    def own(self, x_BT: Tensor) -> Tensor:
        """The tokens that a block sees here, of those that the layout is about."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the processes, without gradient."""
        ...


@dataclass
class RouterStats:
    """What one forward tells the balancer: choices per expert [E], and the sequence balance loss (differentiable)."""

    load_E: Tensor
    aux: Tensor


class Router(nn.Module):
    """Chooses k experts per token and their combine weights, in at least fp32."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.router == "sigmoid":
            wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
            self.register_buffer("e_score_correction_bias", torch.empty(config.n_routed_experts, dtype=wide))

    def forward(self, x_MD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [tokens, D] -> scores [tokens, E], chosen ids [tokens, k], weights [tokens, k]."""
        config = self.config
        if config.router == "sigmoid" and config.n_group == config.topk_group:
            bias_E = self.e_score_correction_bias
            if native.takes_router(x_MD, self.weight, bias_E):
                k, factor = config.num_experts_per_tok, config.routed_scaling_factor
                return native.route(x_MD, self.weight, bias_E, k, config.norm_topk_prob, factor)
        device = x_MD.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            logits_ME = F.linear(at_least_fp32(x_MD), at_least_fp32(self.weight))
        if config.router == "sigmoid" and triton_backend.runs("triton.router", logits_ME):
            from trimaran.ops import triton_router

            limit = config.num_experts_per_tok, config.n_group, config.topk_group
            weighing = config.norm_topk_prob, config.routed_scaling_factor
            return triton_router.route(logits_ME, self.e_score_correction_bias, *limit, *weighing)
        if config.router == "softmax":
            scores_ME = logits_ME.softmax(-1)
            biased_ME = scores_ME
        else:
            scores_ME = logits_ME.sigmoid()
            biased_ME = scores_ME + self.e_score_correction_bias
        ids_MK = self.limit_groups(biased_ME).topk(config.num_experts_per_tok, sorted=False).indices
        weights_MK = scores_ME.gather(1, ids_MK)
        if config.norm_topk_prob:
            # the 1e-20 of the sigmoid family guards a row whose scores all underflow
            tiny = 1e-20 if config.router == "sigmoid" else 0.0
            weights_MK = weights_MK / (weights_MK.sum(-1, keepdim=True) + tiny)
        return scores_ME, ids_MK, weights_MK * config.routed_scaling_factor

    def limit_groups(self, biased_ME: Tensor) -> Tensor:
        """-inf for experts outside the topk_group best groups."""
        groups, kept = self.config.n_group, self.config.topk_group
        if kept == groups:
            return biased_ME
        grouped_MGE = biased_ME.unflatten(1, (groups, -1))
        score_MG = grouped_MGE.topk(min(2, grouped_MGE.shape[-1])).values.sum(-1)
        best_MG = score_MG.topk(kept, sorted=False).indices
        allowed_MG = torch.zeros_like(score_MG, dtype=torch.bool).scatter(1, best_MG, True)
        return grouped_MGE.masked_fill(~allowed_MG[..., None], -torch.inf).flatten(1)


class Experts(nn.Module):
    """E feed-forwards of the same shape, stacked; inputs of width I (D or L)."""

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        count, hidden = config.n_routed_experts, config.moe_intermediate_size
        self.count, self.numbers = count, (3 if config.ffn == "swiglu" else 2) * width * hidden
        self.up_proj = StackedLinear(count, width, hidden)
        self.gate_proj = StackedLinear(count, width, hidden) if config.ffn == "swiglu" else None
        self.down_proj = StackedLinear(count, hidden, width)

    def forward(self, x_MI: Tensor, ids_MK: Tensor, weights_MK: Tensor) -> Tensor:
        if self.gate_proj is None:
            done_MI = few_through(self.up_proj, self.down_proj, x_MI, ids_MK, weights_MK)
            if done_MI is not None:
                return done_MI
        plan = experts.plan(ids_MK, weights_MK, self.count, self.numbers)
        routed = experts.to_experts(x_MI, plan)
        gate = None if self.gate_proj is None else self.gate_proj(routed, plan)
        out = self.down_proj(activate(self.up_proj(routed, plan), gate), plan)
        return experts.from_experts(out, plan)


class MoE(nn.Module):
    """Router, experts, shared expert: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        latent, hidden = config.moe_latent_size, config.hidden_size
        self.gate = Router(config)
        self.experts = Experts(config, latent or hidden)
        shared = config.moe_shared_expert_intermediate_size
        self.shared_experts = FeedForward(config, shared) if shared else None
        self.fc1_latent_proj = Linear(hidden, latent) if latent else None
        self.fc2_latent_proj = Linear(latent, hidden) if latent else None
        self.row: Row | None = None  # None: rows are here as a whole
        self.watched = False  # whoever takes the statistics says so: untaken, they would pile up with their graphs
        self.stats: list[RouterStats] = []

    def forward(self, x_BTD: Tensor, layout: Layout) -> Tensor:
        x_MD = x_BTD.flatten(0, 1)
        scores_ME, ids_MK, weights_MK = self.gate(x_MD)
        if self.watched and self.training and torch.is_grad_enabled():
            self.stats.append(router_stats(scores_ME, ids_MK, layout, self.row))
        routed = x_MD if self.fc1_latent_proj is None else self.fc1_latent_proj(x_MD)
        routed = self.experts(routed, ids_MK, weights_MK).to(routed.dtype)
        if self.fc2_latent_proj is not None:
            routed = self.fc2_latent_proj(routed)
        if self.shared_experts is not None:
            routed = routed + self.shared_experts(x_MD)
        return routed.view_as(x_BTD)

    def take_stats(self) -> list[RouterStats]:
        """The statistics of the training forwards since the last call, one entry each, if `watched`; forgets them."""
        taken, self.stats = self.stats, []
        return taken


def router_stats(scores_ME: Tensor, ids_MK: Tensor, layout: Layout, row: Row | None = None) -> RouterStats:
    """Load per expert and the sequence balance loss, E * sum_e f_e P_e averaged over rows (1 when balanced).

    f_e: share of the row's choices that went to e; P_e: mean over the row of the scores normalised to sum 1
    (GShard's loss per sequence, as in DeepSeek-V3 and the Nemotron-3 recipes). Padding counts nowhere. With `row`
    both are this process's part of the sum: f_e is still the whole row's.
    """
    experts_count, batch = scores_ME.shape[1], layout.batch
    chosen_ME = torch.zeros_like(scores_ME).scatter_(1, ids_MK, 1.0)
    share_ME = scores_ME / scores_ME.sum(-1, keepdim=True)
    real_BT = layout.real_BT
    if real_BT is not None:
        real_M1 = (real_BT if row is None else row.own(real_BT)).flatten()[:, None]
        chosen_ME, share_ME = chosen_ME * real_M1, share_ME * real_M1
    load_BE = chosen_ME.view(batch, -1, experts_count).sum(1)
    if row is None:
        row_BE, tokens_B1 = load_BE, layout.length if layout.count_B is None else layout.count_B.clamp(min=1)[:, None]
    else:
        row_BE = row.sum(load_BE)
        tokens_B1 = (row_BE.sum(1, keepdim=True) / ids_MK.shape[1]).clamp(min=1)
    share_BE = share_ME.view(batch, -1, experts_count).sum(1) / tokens_B1
    fraction_BE = row_BE / (tokens_B1 * ids_MK.shape[1])
    return RouterStats(load_BE.sum(0).detach(), experts_count * (fraction_BE * share_BE).sum(-1).mean())
