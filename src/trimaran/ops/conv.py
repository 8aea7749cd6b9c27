"""The short causal convolution in front of the SSM: one filter of W taps per channel, with a carried tail.

    y_t = bias + sum_{i=0..W-1} w_i x_{t-W+1+i}

Written as W shifted multiply-adds: for four taps that beats a convolution call on a CPU, and document borders become
one mask per shift. `causal_conv` is that formula; `causal_conv_silu` is the one models use, with SiLU behind it, sums
in at least fp32, the gradient written down, and nothing kept for backward but the inputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.ops import backend, native, native_training, triton_backend
from trimaran.ops.blocks import blocks
from trimaran.ops.numbers import at_least_fp32


def causal_conv(
    x_BTC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    tail_BWC: Tensor | None = None,
    seg_BT: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution [B, T, C] -> [B, T, C].

    tail_BWC: the last W-1 inputs of the same document before this call (zeros when None).
    seg_BT: document numbers within this call, rising from 0 = the document the tail belongs to; taps never reach over
    a border.
    """
    taps, length = weight_CW.shape[1], x_BTC.shape[1]
    padded = join_tail(x_BTC, taps, tail_BWC)
    y_BTC = padded[:, taps - 1 :] * weight_CW[:, taps - 1]
    if bias_C is not None:
        y_BTC = y_BTC + bias_C
    seg_padded = None if seg_BT is None else torch.cat([seg_BT.new_zeros(len(seg_BT), taps - 1), seg_BT], 1)
    for i in range(taps - 1):
        past = padded[:, i : i + length] * weight_CW[:, i]
        if seg_padded is not None and seg_BT is not None:
            past = past.masked_fill(seg_padded[:, i : i + length].ne(seg_BT).unsqueeze(-1), 0)
        y_BTC = y_BTC + past
    return y_BTC


def causal_conv_silu(
    x_BTC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    tail_BWC: Tensor | None = None,
    seg_BT: Tensor | None = None,
) -> Tensor:
    """silu(causal_conv(...)), in x's dtype."""
    if triton_backend.runs("triton.conv", x_BTC):
        from trimaran.ops import triton_conv

        return triton_conv.causal_conv_silu(x_BTC, weight_CW, bias_C, tail_BWC, seg_BT)
    if not backend.allowed("torch.conv"):
        return causal_conv_silu_reference(x_BTC, weight_CW, bias_C, tail_BWC, seg_BT)
    return CausalConvSiLU.apply(x_BTC, weight_CW, bias_C, tail_BWC, seg_BT)


def causal_conv_silu_reference(
    x_BTC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    tail_BWC: Tensor | None = None,
    seg_BT: Tensor | None = None,
) -> Tensor:
    """The same, as the formula stands, with sums in at least fp32."""
    x, weight, bias, tail = (t if t is None else at_least_fp32(t) for t in (x_BTC, weight_CW, bias_C, tail_BWC))
    assert x is not None and weight is not None
    return F.silu(causal_conv(x, weight, bias, tail, seg_BT)).to(x_BTC.dtype)


def causal_conv_silu_few(
    x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, tail_BWC: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for a few tokens of a running document in few calls: y [B, T, C], and the tail with the inputs behind it
    [B, W-1+T, C]: after n of the tokens, the tail to carry on is its places n .. n + W-1."""
    window_BXC = join_tail(x_BTC, weight_CW.shape[1], tail_BWC)
    seen_BTWC = at_least_fp32(window_BXC).unfold(1, weight_CW.shape[1], 1).transpose(2, 3)
    u_BTC = (seen_BTWC * weight_CW.t()).sum(2)
    if bias_C is not None:
        u_BTC += bias_C
    return F.silu(u_BTC, inplace=True).to(x_BTC.dtype), window_BXC


def tail_after(window_BXC: Tensor, taps: int, counts: Sequence[int]) -> Tensor:
    """The tail [B, W-1, C] behind the first counts[b] tokens of what `causal_conv_silu_few` has joined."""
    if all(count == counts[0] for count in counts):
        return window_BXC[:, counts[0] : counts[0] + taps - 1]
    place_B1 = torch.tensor(counts, device=window_BXC.device)[:, None]
    place_BW = place_B1 + torch.arange(taps - 1, device=window_BXC.device)
    return window_BXC.gather(1, place_BW[..., None].expand(-1, -1, window_BXC.shape[2]))


class CausalConvSiLU(torch.autograd.Function):
    """Blocks of time, each with the W-1 inputs before it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, seg: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, tail, seg)
        if native.takes_conv(x, tail, weight.shape[1]):
            return native.conv_silu(x, weight, bias, tail, seg)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        weight_WC = at_least_fp32(weight).t().contiguous()
        seg_padded = None if seg is None else F.pad(seg, (weight.shape[1] - 1, 0))
        for part in blocks(x.shape[1], x.shape[0] * x.shape[2], x.device):
            window = window_of(x, tail, weight.shape[1], part)
            out[:, part] = F.silu(filtered(window, weight_WC, bias, seg_padded, part), inplace=True)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, tail, seg = ctx.saved_tensors
        if native_training.takes_conv_backward(x, grad, tail, weight.shape[1]):
            dx, dweight, total_C, dtail = native_training.conv_backward(x, weight, bias, tail, seg, grad)
            return dx, dweight.to(weight.dtype), None if bias is None else total_C.to(bias.dtype), dtail, None
        taps, weight_WC = weight.shape[1], at_least_fp32(weight).t().contiguous()
        dx, dweight_WC = torch.empty_like(x, memory_format=torch.contiguous_format), torch.zeros_like(weight_WC)
        dbias_C = torch.zeros_like(weight_WC[0])
        seg_padded = None if seg is None else F.pad(seg, (taps - 1, 0))
        # Inputs before a block belong to the block before it: their gradient is handed on, from the end to the start.
        handed = weight_WC.new_zeros(x.shape[0], taps - 1, x.shape[2])
        for part in reversed(list(blocks(x.shape[1], x.shape[0] * x.shape[2], x.device))):
            window, length = window_of(x, tail, taps, part), part.stop - part.start
            u = filtered(window, weight_WC, bias, seg_padded, part)
            du = torch.ops.aten.silu_backward(at_least_fp32(grad[:, part]), u)
            dbias_C += du.sum((0, 1))
            dwindow = F.pad(handed, (0, 0, length, 0))
            for i in range(taps):
                seen = du if i == taps - 1 else masked(du, seg_padded, part, i, taps)
                dwindow[:, i : i + length].addcmul_(seen, weight_WC[i])
                dweight_WC[i] += (seen * window[:, i : i + length]).sum((0, 1))
            dx[:, part], handed = dwindow[:, taps - 1 :], dwindow[:, : taps - 1]
        dtail = None if tail is None else handed.to(tail.dtype)
        dbias = None if bias is None else dbias_C.to(bias.dtype)
        return dx, dweight_WC.t().to(weight.dtype), dbias, dtail, None


def window_of(x_BTC: Tensor, tail_BWC: Tensor | None, taps: int, part: slice) -> Tensor:
    """The block's inputs and the W-1 before them, in at least fp32: [B, W-1+L, C]."""
    if part.start >= taps - 1:
        return at_least_fp32(x_BTC[:, part.start - taps + 1 : part.stop])
    return at_least_fp32(join_tail(x_BTC[:, : part.stop], taps, tail_BWC)[:, part.start :])


def masked(x_BLC: Tensor, seg_padded: Tensor | None, part: slice, i: int, taps: int) -> Tensor:
    """x with zeros where tap i of the block's tokens would reach into another document."""
    if seg_padded is None:
        return x_BLC
    own_BL = seg_padded[:, part.start + taps - 1 : part.stop + taps - 1]
    return x_BLC * (seg_padded[:, part.start + i : part.stop + i] == own_BL).unsqueeze(-1)


def filtered(
    window: Tensor, weight_WC: Tensor, bias_C: Tensor | None, seg_padded: Tensor | None, part: slice
) -> Tensor:
    """The convolution of one block, before SiLU."""
    taps, length = len(weight_WC), part.stop - part.start
    u_BLC = window[:, taps - 1 :] * weight_WC[taps - 1]
    if bias_C is not None:
        u_BLC += bias_C
    for i in range(taps - 1):
        u_BLC.addcmul_(masked(window[:, i : i + length], seg_padded, part, i, taps), weight_WC[i])
    return u_BLC


def join_tail(x_BTC: Tensor, taps: int, tail_BWC: Tensor | None) -> Tensor:
    """The inputs with the W-1 that precede them: [B, W-1+T, C]."""
    if tail_BWC is None:
        tail_BWC = x_BTC.new_zeros(x_BTC.shape[0], taps - 1, x_BTC.shape[2])
    return torch.cat([tail_BWC.to(x_BTC.dtype), x_BTC], 1)


def next_tail(
    x_BTC: Tensor,
    taps: int,
    tail_BWC: Tensor | None = None,
    seg_BT: Tensor | None = None,
    count_B: Tensor | None = None,
) -> Tensor:
    """The tail to carry on: the last W-1 inputs of the row's last document, zeros where it is shorter.

    count_B: tokens of each row that count (the rest is padding on the right).
    """
    last_BT = seg_BT
    if count_B is None:  # what lies further back is not worth joining
        behind = max(x_BTC.shape[1] - (taps - 1), 0)
        x_BTC, seg_BT = x_BTC[:, behind:], None if seg_BT is None else seg_BT[:, behind:]
    padded = join_tail(x_BTC, taps, tail_BWC)
    if count_B is None:
        tail = padded[:, padded.shape[1] - (taps - 1) :]
    else:
        place_BW = count_B[:, None] + torch.arange(taps - 1, device=x_BTC.device)
        tail = padded.gather(1, place_BW[..., None].expand(-1, -1, padded.shape[2]))
    if seg_BT is None or last_BT is None:
        return tail.clone()
    seg_padded = torch.cat([seg_BT.new_zeros(len(seg_BT), taps - 1), seg_BT], 1)
    if count_B is None:
        seg_tail = seg_padded[:, seg_padded.shape[1] - (taps - 1) :]
    else:
        seg_tail = seg_padded.gather(1, place_BW)
    return tail.masked_fill((seg_tail != last_BT[:, -1:]).unsqueeze(-1), 0)
