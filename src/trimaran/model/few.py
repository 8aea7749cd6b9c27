"""Passes of a few tokens, a block at a time: y = x + mixer(norm(x)) in one call of ops.native, where that is known.

Decoding is so short a work that starting calls would take as long as the work itself. `few` says what it cannot do by
None: then the block takes its ordinary steps, each of which may still be a kernel of its own. It looks at every module
that it would pass by: one that has been rewritten (LoRA, quantisation, sharding) or that somebody listens to with a
hook takes the ordinary steps, always.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimaran.model.attention import Attention
from trimaran.model.feedforward import FeedForward
from trimaran.model.layout import Layout
from trimaran.model.linear import Linear, StackedLinear, heard, plain
from trimaran.model.mamba import CausalConv, Mamba
from trimaran.model.moe import Experts, MoE, Router
from trimaran.model.norm import GatedRMSNorm, RMSNorm
from trimaran.model.state import AttentionMemory, MambaMemory
from trimaran.ops import native, native_blocks

if TYPE_CHECKING:
    from trimaran.model.hybrid import Block


def few(block: "Block", x_BTD: Tensor, layout: Layout, state: Any, keys: int) -> Tensor | None:
    """The block's output, or None and nothing has happened."""
    if x_BTD.shape[0] * x_BTD.shape[1] > native.ROWS or torch.is_grad_enabled():
        return None
    parts: dict[str, Any] = block._modules
    mixer, norm = parts["mixer"], parts.get("norm")
    if norm is None or not plain(norm, RMSNorm) or heard(mixer) or not native.takes_block(x_BTD, weight(norm)):
        return None
    if type(mixer) is Mamba:
        return few_mamba(mixer, norm, x_BTD, layout, state)
    if type(mixer) is FeedForward:
        return few_ffn(mixer, norm, x_BTD)
    if type(mixer) is MoE:
        return few_moe(mixer, norm, x_BTD)
    if type(mixer) is Attention:
        return few_attention(mixer, norm, x_BTD, layout, state, keys)
    return None


def weight(module: nn.Module) -> Tensor:
    """Its weight, past nn.Module's own look-up, which takes as long as handing a kernel eight arguments."""
    return module._parameters["weight"]  # type: ignore[return-value]


def few_ffn(mixer: FeedForward, norm: RMSNorm, x_BTD: Tensor) -> Tensor | None:
    """Squared ReLU between two maps."""
    parts: dict[str, Any] = mixer._modules
    up, down = parts["up_proj"], parts["down_proj"]
    if parts.get("gate_proj") is not None or parts.get("s_u") is not None:
        return None
    if not (plain(up, Linear) and plain(down, Linear)):
        return None
    if not native.runs("native.blocks", x_BTD, weight(up), weight(down)):
        return None
    return native_blocks.ffn_block(x_BTD, weight(norm), norm.eps, weight(up), weight(down))


def few_mamba(mixer: Mamba, norm: RMSNorm, x_BTD: Tensor, layout: Layout, memory: MambaMemory | None) -> Tensor | None:
    """One token, or a short trial, of each document that the memory names."""
    parts: dict[str, Any] = mixer._modules
    own: dict[str, Any] = mixer._parameters
    conv1d, gated, into, out = parts["conv1d"], parts["norm"], parts["in_proj"], parts["out_proj"]
    if memory is None or parts.get("s_in") is not None or not (plain(into, Linear) and plain(out, Linear)):
        return None
    if not plain(conv1d, CausalConv) or not plain(gated, GatedRMSNorm) or gated.groups != mixer.groups:
        return None
    slots = memory.slots(layout)
    filters, bias = conv1d._parameters["weight"], conv1d._parameters.get("bias")
    scalars = own["A_log"], own["D"], own["dt_bias"]
    same = [filters, gated._parameters["weight"], weight(into), weight(out)]
    if bias is not None:
        same.append(bias)
    if slots is None or not native.takes_mamba(x_BTD, slots.tail_SWC, slots.ssm_SHPN, scalars, same):
        return None
    y_BTD, projected_NC, after = native_blocks.mamba_block(
        x_BTD,
        weight(norm),
        norm.eps,
        weight(into),
        weight(out),
        slots,
        mixer.groups,
        filters,
        bias,
        scalars,
        same[1],
        gated.eps,
    )
    if after is not None:
        memory.tried(slots, projected_NC[:, mixer.width : mixer.width + mixer.conv_width], after)
    return y_BTD


def few_attention(
    mixer: Attention, norm: RMSNorm, x_BTD: Tensor, layout: Layout, memory: AttentionMemory | None, keys: int
) -> Tensor | None:
    """Queries of rows that read keys of their own; without positions and without norms of queries and keys."""
    if memory is None or mixer.rotary or mixer.q_norm is not None or mixer.s_qk is not None:
        return None
    maps = (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)
    if not all(plain(one, Linear) for one in maps):
        return None
    weights = [one.weight for one in maps]
    if mixer.head_dim % native.LANES or not native.runs("native.blocks", x_BTD, *weights):
        return None
    reach = memory.reach(layout, keys, mixer.window)
    if reach is None or reach.at.most * (mixer.heads // mixer.groups) > native.MOST_QUERIES:
        return None
    if reach.k_XGK.dtype != x_BTD.dtype:
        return None
    rule = mixer.heads, mixer.window, mixer.scale
    return native_blocks.attention_block(x_BTD, norm.weight, norm.eps, weights, reach, *rule)


def few_moe(mixer: MoE, norm: RMSNorm, x_BTD: Tensor) -> Tensor | None:
    """Router, relu^2 experts, shared expert."""
    gate, experts, shared, config = mixer.gate, mixer.experts, mixer.shared_experts, mixer.gate.config
    tokens, k = x_BTD.shape[0] * x_BTD.shape[1], config.num_experts_per_tok
    if tokens > native.MOST_TOKENS or tokens * k > native.MOST_CHOICES or config.router != "sigmoid":
        return None
    if not (plain(gate, Router) and plain(experts, Experts)) or config.n_group != config.topk_group:
        return None
    maps: list[nn.Module | None] = [mixer.fc1_latent_proj, mixer.fc2_latent_proj]
    if experts.gate_proj is not None or not (
        plain(experts.up_proj, StackedLinear) and plain(experts.down_proj, StackedLinear)
    ):
        return None
    if shared is not None:
        if not plain(shared, FeedForward) or shared.gate_proj is not None or shared.s_u is not None:
            return None
        maps += [shared.up_proj, shared.down_proj]
    else:
        maps += [None, None]
    if not all(one is None or plain(one, Linear) for one in maps):
        return None
    weights: list[Tensor | None] = [None if one is None else one.weight for one in maps]  # type: ignore[misc]
    up, down, bias = experts.up_proj.weight, experts.down_proj.weight, gate.e_score_correction_bias
    there = [t for t in weights if t is not None]
    if bias.dtype != torch.float32 or not native.runs("native.blocks", x_BTD, gate.weight, up, down, *there):
        return None
    return native_blocks.moe_block(
        x_BTD,
        norm.weight,
        norm.eps,
        (gate.weight, bias, weights[0], weights[1], up, down, weights[2], weights[3]),
        k,
        config.norm_topk_prob,
        config.routed_scaling_factor,
    )
