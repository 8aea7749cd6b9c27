"""Whole residual blocks of a few tokens in one call each (ops/kernels/blocks.h): y = x + mixer(norm(x)).

Who calls has asked `native.takes_block` and checked that all tensors are bf16 or fp32 alike and contiguous.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimaran.ops.native import TURNED, Reach, Slots, function


def turned(rows: int, inner: int) -> Tensor:
    """Room for x with its rows as lanes: 4 bytes a number, rows rounded up to 32."""
    return torch.empty(-(-rows // 32) * 32 * inner if rows > TURNED else 1, dtype=torch.int32)


def arena(numbers: int) -> Tensor:
    """Room for `numbers` numbers of at most 8 bytes in up to 16 pieces, each of which begins at 64 bytes."""
    return torch.empty(numbers + 16 * 16, dtype=torch.int64)


def ffn_block(x_BTD: Tensor, norm_D: Tensor, eps: float, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """Squared ReLU between two maps: [B, T, D]."""
    ffn, width = up_FD.shape
    rows, y = x_BTD.numel() // width, torch.empty_like(x_BTD)
    lanes, room = turned(rows, max(ffn, width)), arena(rows * (ffn + 2 * width))
    function("ffn_block", x_BTD.dtype)(
        *(x_BTD.data_ptr(), norm_D.data_ptr(), y.data_ptr(), rows, width, eps),
        *(up_FD.data_ptr(), down_DF.data_ptr(), ffn, lanes.data_ptr(), room.data_ptr()),
    )
    return y


def mamba_block(
    x_BTD: Tensor,
    norm_D: Tensor,
    eps: float,
    in_CD: Tensor,
    out_DC: Tensor,
    slots: Slots,
    groups: int,
    conv_C1W: Tensor,
    conv_bias_C: Tensor | None,
    scalars: tuple[Tensor, Tensor, Tensor],
    gated_C: Tensor,
    gated_eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A Mamba-2 block: y [B, T, D], what the input projection gave [B T, C], and the states of a trial [K, S, H, P, N].

    scalars: A_log, D and dt_bias, fp32. Tail and state move on in place as in `native.mamba`.
    """
    _, heads, head, size = slots.ssm_SHPN.shape
    width, projected = x_BTD.shape[-1], in_CD.shape[0]
    rows, y = slots.documents * slots.tokens, torch.empty_like(x_BTD)
    projected_NC = x_BTD.new_empty(rows, projected)
    after = slots.ssm_SHPN.new_empty(slots.tokens, slots.documents, heads, head, size) if slots.trial else None
    threads = min(torch.get_num_threads(), slots.documents * groups)
    lanes = turned(rows, max(width, heads * head))
    room = arena(rows * (2 * width + heads * head) + threads * 2 * (heads * head // groups + size))
    function("mamba_block", x_BTD.dtype)(
        *(x_BTD.data_ptr(), norm_D.data_ptr(), y.data_ptr(), rows, width, eps, in_CD.data_ptr(), out_DC.data_ptr()),
        *(heads, head, groups, size, conv_C1W.shape[-1], conv_C1W.data_ptr()),
        None if conv_bias_C is None else conv_bias_C.data_ptr(),
        *(t.data_ptr() for t in scalars),
        *(gated_C.data_ptr(), gated_eps, projected_NC.data_ptr()),
        *(slots.tail_SWC.data_ptr(), slots.tail_SWC.stride(0), slots.ssm_SHPN.data_ptr(), slots.ssm_SHPN.stride(0)),
        None if slots.slots_S is None else slots.slots_S.data_ptr(),
        None if after is None else after.data_ptr(),
        *(slots.documents, slots.tokens, lanes.data_ptr(), threads, room.data_ptr()),
    )
    return y, projected_NC, after


def attention_block(
    x_BTD: Tensor,
    norm_D: Tensor,
    eps: float,
    weights: Sequence[Tensor],
    reach: Reach,
    heads: int,
    window: int | None,
    scale: float,
) -> Tensor:
    """Attention without positions [B, T, D]; weights: q, k, v, o. New keys and values are written to their places."""
    at, width, rows = reach.at, x_BTD.shape[-1], len(reach.at.places_N)
    _, groups, head = reach.k_XGK.shape
    sequences, deepest = at.starts_SZ.shape
    pieces = at.pieces(groups, window)
    y, lanes = torch.empty_like(x_BTD), turned(rows, max(width, heads * head))
    room = arena(rows * (2 * width + 2 * (heads + groups) * head) + sequences * groups * pieces * 64 * (2 + head))
    function("attention_block", x_BTD.dtype)(
        *(x_BTD.data_ptr(), norm_D.data_ptr(), y.data_ptr(), rows, width, eps, *(w.data_ptr() for w in weights)),
        *(at.places_N.data_ptr(), reach.k_XGK.data_ptr(), reach.v_XGK.data_ptr()),
        *(at.starts_SZ.data_ptr(), at.queries.data_ptr(), at.before_S.data_ptr()),
        *(sequences, deepest, at.page, at.shift, heads, groups, head, window or 0, scale, pieces),
        *(lanes.data_ptr(), room.data_ptr()),
    )
    return y


def moe_block(
    x_BTD: Tensor,
    norm_D: Tensor,
    eps: float,
    weights: tuple[Tensor | None, ...],
    k: int,
    normalise: bool,
    factor: float,
) -> Tensor:
    """Sigmoid router, relu^2 experts, shared expert [B, T, D].

    weights: router, its bias (fp32), into and out of the latent space, experts up and down, shared up and down; None
    where the model has none.
    """
    router, up, down, shared = weights[0], weights[4], weights[5], weights[6]
    assert router is not None and up is not None and down is not None
    (count, ffn, latent), width = up.shape, x_BTD.shape[-1]
    between = 0 if shared is None else shared.shape[0]
    rows, y = x_BTD.numel() // width, torch.empty_like(x_BTD)
    lanes = turned(rows, max(width, latent, between))
    room = arena(rows * (4 * width + between + 4 * latent + 2 * count + k * (ffn + latent + 2)))
    function("moe_block", x_BTD.dtype)(
        *(x_BTD.data_ptr(), norm_D.data_ptr(), y.data_ptr(), rows, width, eps),
        *(None if t is None else t.data_ptr() for t in weights),
        *(count, k, latent, ffn, between, normalise, factor, lanes.data_ptr(), room.data_ptr()),
    )
    return y
