"""Single queries over paged keys on a GPU (ops.paged): each row's own keys, read once, in SPLITS stretches at a time.

A program has the queries of one group of one row and one stretch of its keys; it leaves their weighted sum and the log
of the weights' sum, which torch joins (flash decoding). How long a stretch is depends on the row's length, which is
read on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimaran.ops.triton_ssd import kind, product

KEYS = 64  # read at a time
SPLITS = 16  # stretches of a row's keys: enough programs for a single row of two groups


@triton.jit
def stretch_kernel(
    q, k, v, table, length, out, lse, scale, window, PAGE, DEPTH, G, R, K,
    KEYS: tl.constexpr, SPLITS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    row, g, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    head, width, key = tl.arange(0, HEADS), tl.arange(0, WIDTH), tl.arange(0, KEYS)
    inside = (head < R)[:, None] & (width < K)[None, :]
    end = tl.load(length + row).to(tl.int32)
    first = tl.maximum(end - window, 0)
    each = tl.cdiv(tl.cdiv(end - first, SPLITS), KEYS) * KEYS
    start = first + split * each
    stop = tl.minimum(start + each, end)
    place = ((row * G + g) * R + head)[:, None] * K + width[None, :]
    q_RK = tl.load(q + place, mask=inside, other=0.0).to(KIND)
    total = tl.zeros([HEADS, WIDTH], tl.float32)
    top, mass = tl.full([HEADS], float("-inf"), tl.float32), tl.zeros([HEADS], tl.float32)
    while start < stop:
        at = start + key
        page = tl.load(table + row * DEPTH + at // PAGE, mask=at < stop, other=0).to(tl.int64)
        from_here = ((page * PAGE + at % PAGE) * G + g)[:, None] * K + width[None, :]
        here = (at < stop)[:, None] & (width < K)[None, :]
        k_SK = tl.load(k + from_here, mask=here, other=0.0).to(KIND)
        scores = tl.where((at < stop)[None, :], product(q_RK, tl.trans(k_SK), KIND) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights, shrunk = tl.exp(scores - higher[:, None]), tl.exp(top - higher)
        v_SK = tl.load(v + from_here, mask=here, other=0.0).to(KIND)
        total = total * shrunk[:, None] + product(weights, v_SK, KIND)
        mass, top = mass * shrunk + tl.sum(weights, 1), higher
        start += KEYS
    found = (row * SPLITS + split) * G * R + g * R + head
    tl.store(lse + found, top + tl.log(mass), mask=head < R)  # no keys: -inf
    tl.store(out + found[:, None] * K + width[None, :], total / tl.maximum(mass, 1e-30)[:, None], mask=inside)


def paged_attention(
    q_NHK: Tensor, k_XGK: Tensor, v_XGK: Tensor, table_NP: Tensor, length_N: Tensor, page: int,
    window: int | None, scale: float,
) -> Tensor:  # fmt: skip
    """ops.paged.paged_attention."""
    (rows, heads, width), groups, deepest = q_NHK.shape, k_XGK.shape[1], table_NP.shape[1]
    out = torch.empty(rows, SPLITS, heads, width, device=q_NHK.device)
    lse = torch.empty(rows, SPLITS, heads, device=q_NHK.device)
    shared = heads // groups
    blocks = max(16, triton.next_power_of_2(shared)), max(16, triton.next_power_of_2(width))
    stretch_kernel[rows, groups, SPLITS](
        q_NHK.contiguous(), k_XGK, v_XGK, table_NP, length_N, out, lse, scale,
        deepest * page if window is None else window, page, deepest, groups, shared, width,
        KEYS, SPLITS, *blocks, kind(q_NHK),
    )  # fmt: skip
    return (out * lse.softmax(1)[..., None]).sum(1).to(q_NHK.dtype)
