"""Single tokens through the recurrence on a GPU, each row's state in its slot; and a whole Mamba mixer of few tokens.

`state_kernel` has a slice of one head of one row per program: it reads the state once, takes the row's tokens one after
the other, and writes the state once. States narrower than fp32 are rounded by chance, with the chances of ops.rounding
(same keys, same bits) made on the spot: nothing has to come from the host, so a step can be captured. `conv_kernel` is
the convolution for few tokens and moves the tails on.

Shapes: S rows, K tokens of each, X slots; x [S, K, H, P], B and C [S, K, G, N], state [X, H, P, N], tail [X, W-1, C].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimaran.ops.rounding import FRACTION, key_of
from trimaran.ops.triton_backend import runs, steps
from trimaran.ops.triton_norm import gated_rms_norm

SLICE, CHANNELS = 16, 128  # of a head's width, and of the convolution's channels, per program


@triton.jit
def softplus(x):
    """log(1 + e^x), exact for small e^x too (Kahan's log1p); x itself above 20, as torch has it."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1 + e
    return tl.where(x > 20, x, tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1))))


@triton.jit
def scrambled(x):
    """ops.rounding.scrambled on unsigned words."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def mixed_in(key, number):
    """One more number in ops.rounding.key_of."""
    key = key ^ number
    key = (key ^ (key >> 16)) * 0x7FEB352D
    key = (key ^ (key >> 15)) * 0x846CA68B
    return (key ^ (key >> 16)) * 0x9E3779B1


@triton.jit
def rounded(x, key, element, TINY: tl.constexpr, EPS: tl.constexpr, TOP: tl.constexpr, FRACTION: tl.constexpr):
    """ops.rounding.stochastic_round of x with the chance that belongs to key and element."""
    bits = scrambled(scrambled(element.to(tl.uint32)) ^ key)
    chance = (bits & ((1 << FRACTION) - 1)).to(tl.float32) * (1.0 / (1 << FRACTION))
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    spacing = tl.maximum(power, TINY) * EPS
    whole = tl.floor(tl.div_rn(x, spacing) + chance) * spacing
    return tl.minimum(tl.maximum(whole, -TOP), TOP)


@triton.jit
def state_kernel(
    x, dt, A, B, C, D, dt_bias, state, slots, counts, y, after, layer_key,
    x_s, x_k, dt_s, dt_k, B_s, B_k, C_s, C_k, state_x, S, K, H, G, P, N,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, TINY: tl.constexpr, EPS: tl.constexpr, TOP: tl.constexpr,
    FRACTION: tl.constexpr
):  # fmt: skip
    """With dt_bias, dt is raw and A is its log; without, both are as in ops.ssd. after: every token's state, and then
    the slots stay as they are."""
    h, row = tl.program_id(1), tl.program_id(2)
    g, slot = h // (H // G), row.to(tl.int64)
    if slots is not None:
        slot = tl.load(slots + row).to(tl.int64)
    p, n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, SIZE)
    here = (p < P)[:, None] & (n < N)[None, :]
    element = (h * P + p[:, None]) * N + n[None, :]
    S_PN = tl.load(state + slot * state_x + element, mask=here, other=0.0).to(tl.float32)
    a = tl.load(A + h).to(tl.float32)
    if dt_bias is not None:
        a = -tl.exp(a)
    for k in range(K):
        step = tl.load(dt + row.to(tl.int64) * dt_s + k * dt_k + h).to(tl.float32)
        if dt_bias is not None:
            step = softplus(step + tl.load(dt_bias + h).to(tl.float32))
        x_P = tl.load(x + row.to(tl.int64) * x_s + k * x_k + h * P + p, mask=p < P, other=0.0).to(tl.float32)
        B_N = tl.load(B + row.to(tl.int64) * B_s + k * B_k + g * N + n, mask=n < N, other=0.0).to(tl.float32)
        C_N = tl.load(C + row.to(tl.int64) * C_s + k * C_k + g * N + n, mask=n < N, other=0.0).to(tl.float32)
        S_PN = S_PN * tl.exp(step * a) + (x_P * step)[:, None] * B_N[None, :]
        y_P = tl.sum(S_PN * C_N[None, :], 1)
        if D is not None:
            y_P += x_P * tl.load(D + h).to(tl.float32)
        tl.store(y + ((row.to(tl.int64) * K + k) * H + h) * P + p, y_P, mask=p < P)
        if after is not None:
            tl.store(after + (k * S + row).to(tl.int64) * H * P * N + element, S_PN, mask=here)
    if after is None:
        if counts is not None:
            word = mixed_in(tl.cast(layer_key, tl.uint32), tl.load(counts + row).to(tl.uint32))
            S_PN = rounded(S_PN, word, element, TINY, EPS, TOP, FRACTION)
        tl.store(state + slot * state_x + element, S_PN.to(state.dtype.element_ty), mask=here)


@triton.jit
def input_at(inputs, in_k, tail, token, c, C, W: tl.constexpr):
    """One row's input `token` steps into the pass, the tail's where that is negative."""
    here, before = (c < C) & (token >= 0), (c < C) & (token < 0)
    value = tl.load(inputs + token * in_k + c, mask=here, other=0.0)
    return value + tl.load(tail + (token + W - 1) * C + c, mask=before, other=0.0)


@triton.jit
def conv_kernel(
    inputs, weight, bias, tail, slots, out, in_s, in_k, tail_x, K, C, W: tl.constexpr, CHANNELS: tl.constexpr
):
    """Outputs in `out`; the tails move on in place."""
    row = tl.program_id(1).to(tl.int64)
    slot = row
    if slots is not None:
        slot = tl.load(slots + row).to(tl.int64)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inputs, tail = inputs + row * in_s, tail + slot * tail_x
    for k in range(K):
        u = tl.zeros([CHANNELS], tl.float32)
        if bias is not None:
            u += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
        for i in tl.static_range(W):
            w = tl.load(weight + c * W + i, mask=c < C, other=0.0).to(tl.float32)
            u += w * input_at(inputs, in_k, tail, k - (W - 1) + i, c, C, W).to(tl.float32)
        tl.store(out + (row * K + k) * C + c, (u * tl.sigmoid(u)).to(out.dtype.element_ty), mask=c < C)
    # In rising order: a place takes what lies K places behind it, which is not written before.
    for i in tl.static_range(W - 1):
        tl.store(tail + i * C + c, input_at(inputs, in_k, tail, K - (W - 1) + i, c, C, W), mask=c < C)


def step(
    x_SKHP: Tensor, dt_SKH: Tensor, A_H: Tensor, B_SKGN: Tensor, C_SKGN: Tensor, state_XHPN: Tensor,
    slots_S: Tensor | None = None, counts_S: Tensor | None = None, layer: int = 0, trial: bool = False,
    D_H: Tensor | None = None, dt_bias_H: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """K tokens of S rows: y [S, K, H, P] in fp32, and on trial the state after each [K, S, H, P, N] in fp32.

    The states in slots_S (None: 0, 1, 2 ...) move on in place, unless on trial. A state narrower than fp32 is rounded
    by chance: counts_S says how many tokens each row has read with these, `layer` which layer it is, as
    ops.rounding.key_of has them. dt_bias_H: dt is raw and A_H is its log. D_H: D x is added.
    """
    (rows, tokens, heads, width), (groups, size) = x_SKHP.shape, B_SKGN.shape[2:]
    y = torch.empty(x_SKHP.shape, device=x_SKHP.device)
    after = torch.empty(tokens, rows, *state_XHPN.shape[1:], device=y.device) if trial else None
    narrow = state_XHPN.dtype != torch.float32
    if narrow and counts_S is None and not trial:
        raise ValueError(f"a state in {state_XHPN.dtype} is rounded by chance: give counts_S")
    info = torch.finfo(state_XHPN.dtype)
    grid = (triton.cdiv(width, SLICE), heads, rows)
    state_kernel[grid](
        x_SKHP, dt_SKH, A_H, B_SKGN, C_SKGN, D_H, dt_bias_H, state_XHPN, slots_S, counts_S if narrow else None,
        y, after, signed(key_of(layer)),
        *x_SKHP.stride()[:2], *dt_SKH.stride()[:2], *B_SKGN.stride()[:2], *C_SKGN.stride()[:2], state_XHPN.stride(0),
        rows, steps(tokens), heads, groups, width, size,
        SLICE, triton.next_power_of_2(size), info.smallest_normal, info.eps, info.max, FRACTION,
    )  # fmt: skip
    return y, after


def signed(word: int) -> int:
    """The 32-bit word as a kernel's argument takes it."""
    return word - (word >> 31 << 32)


def takes_mamba(projected_SKC: Tensor, tail_XWC: Tensor, state_XHPN: Tensor) -> bool:
    """Whether `mamba` knows the case: on a GPU, without gradient, a slot's tail and state in one run."""
    return (
        not torch.is_grad_enabled()
        and runs("triton.step", projected_SKC)
        and state_XHPN.dtype == torch.float32
        and tail_XWC.dtype == projected_SKC.dtype
        and tail_XWC[0].is_contiguous()
        and state_XHPN[0].is_contiguous()
        and projected_SKC.stride(2) == 1
    )


def mamba(
    projected_SKC: Tensor, tail_XWC: Tensor, state_XHPN: Tensor, slots_S: Tensor | None, groups: int,
    conv_CW: Tensor, conv_bias_C: Tensor | None, A_log_H: Tensor, D_H: Tensor, dt_bias_H: Tensor, norm_C: Tensor,
    eps: float, trial: bool = False, counts_S: Tensor | None = None, layer: int = 0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A mixer between its projections: y [S, K, H P], and on trial the states after each token; as ops.native.mamba.

    projected: z, x, B, C, dt of each token. conv_CW may be [C, 1, W]. counts_S, layer: see `step`.
    """
    (rows, tokens, _), (_, heads, width, size) = projected_SKC.shape, state_XHPN.shape
    inner, channels, taps = heads * width, tail_XWC.shape[2], conv_CW.shape[-1]
    z, inputs, dt = projected_SKC.split([inner, channels, heads], -1)
    mixed = inputs.new_empty(rows, tokens, channels)
    moved, at = tail_XWC, slots_S
    if trial:  # the tails stay: copies of them move
        moved, at = (tail_XWC[:rows].clone() if slots_S is None else tail_XWC[slots_S]), None
    conv_kernel[triton.cdiv(channels, CHANNELS), rows](
        inputs, conv_CW.contiguous(), conv_bias_C, moved, at, mixed,
        *inputs.stride()[:2], moved.stride(0), steps(tokens), channels, taps, CHANNELS,
    )  # fmt: skip
    x, B, C = mixed.split([inner, groups * size, groups * size], -1)
    x, (B, C) = x.unflatten(-1, (heads, width)), (t.unflatten(-1, (groups, size)) for t in (B, C))
    y, after = step(x, dt, A_log_H, B, C, state_XHPN, slots_S, counts_S, layer, trial, D_H, dt_bias_H)
    return gated_rms_norm(y.flatten(2), z, norm_C, groups, eps), after
