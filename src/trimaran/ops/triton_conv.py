"""The causal convolution and its SiLU on a GPU (ops.conv.causal_conv_silu): one kernel forward, one backward.

Each program has a stretch of time times a stretch of channels. It reads the W shifted inputs of its outputs, which
caches hold, so that memory sees every input once. Backward makes the outputs before SiLU again at the W places that an
input reaches, and leaves the sums for weight and bias as one row per program, added up by torch: no atomics, so the
same numbers come out every time. Times run from -(W-1): what lies before 0 is the tail.

Shapes: x [B, T, C] with neighbouring channels, tail [B, W-1, C], weight [C, W], seg [B, T] (see ops.conv).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TIME, CHANNELS = 32, 64  # of one program


@triton.jit
def documents_at(seg, p, T):
    """Document numbers at times p; 0 before the pass, whose tokens belong to the carried document."""
    return tl.load(seg + p, mask=(p >= 0) & (p < T), other=0)


@triton.jit
def inputs_at(x, x_t, tail, p, c, seen, T, C, W: tl.constexpr):
    """Inputs [time, channel] at times p where `seen`, the tail's where p < 0, in fp32; zeros elsewhere."""
    held = seen & (c < C)[None, :]
    here = held & ((p >= 0) & (p < T))[:, None]
    value = tl.load(x + p[:, None].to(tl.int64) * x_t + c[None, :], mask=here, other=0.0).to(tl.float32)
    if tail is not None:
        before = held & ((p < 0) & (p >= 1 - W))[:, None]
        value += tl.load(tail + (p + (W - 1))[:, None] * C + c[None, :], mask=before, other=0.0).to(tl.float32)
    return value


@triton.jit
def seen_from(seg, p, q, T):
    """Whether the token at p sees the input at q: both in the same document, and p in the pass; [time, 1]."""
    seen = (p >= 0) & (p < T)
    if seg is not None:
        seen = seen & (documents_at(seg, p, T) == documents_at(seg, q, T))
    return seen[:, None]


@triton.jit
def filtered_at(x, x_t, tail, weight, bias, seg, p, c, T, C, W: tl.constexpr):
    """The convolution before SiLU at times p, in fp32."""
    u = tl.zeros([p.shape[0], c.shape[0]], tl.float32)
    if bias is not None:
        u += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(W):
        q = p - (W - 1) + i
        w = tl.load(weight + c * W + i, mask=c < C, other=0.0).to(tl.float32)
        u += w[None, :] * inputs_at(x, x_t, tail, q, c, seen_from(seg, p, q, T), T, C, W)
    return u


@triton.jit
def forward_kernel(
    x, tail, weight, bias, seg, out, x_b, x_t, T, C, W: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr
):
    b = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * TIME + tl.arange(0, TIME)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    x += b * x_b
    if tail is not None:
        tail += b * (W - 1) * C
    if seg is not None:
        seg += b * T
    u = filtered_at(x, x_t, tail, weight, bias, seg, p, c, T, C, W)
    y = (u * tl.sigmoid(u)).to(out.dtype.element_ty)
    here = (p < T)[:, None] & (c < C)[None, :]
    tl.store(out + (b * T + p[:, None]) * C + c[None, :], y, mask=here)


@triton.jit
def before_silu(grad, grad_b, grad_t, b, u, p, c, T, C):
    """The gradient by u at times p, given the output's."""
    here = ((p >= 0) & (p < T))[:, None] & (c < C)[None, :]
    dy = tl.load(grad + b * grad_b + p[:, None].to(tl.int64) * grad_t + c[None, :], mask=here, other=0.0)
    s = tl.sigmoid(u)
    return dy.to(tl.float32) * s * (1 + u * (1 - s))


@triton.jit
def backward_kernel(
    x, tail, weight, bias, seg, grad, dx, dtail, sums,
    x_b, x_t, grad_b, grad_t, T, C, W: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """sums: [programs along batch and time, W + 1, C], the gradients of weight and bias before they are added up."""
    b = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * TIME + tl.arange(0, TIME) - (W - 1)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    x += b * x_b
    if tail is not None:
        tail += b * (W - 1) * C
    if seg is not None:
        seg += b * T
    sums += (b * tl.num_programs(0) + tl.program_id(0)) * (W + 1) * C
    found = tl.zeros([TIME, CHANNELS], tl.float32)
    for j in tl.static_range(W):  # the output at p + j meets the input at p with tap W - 1 - j
        q = p + j
        u = filtered_at(x, x_t, tail, weight, bias, seg, q, c, T, C, W)
        du = before_silu(grad, grad_b, grad_t, b, u, q, c, T, C)
        w = tl.load(weight + c * W + (W - 1 - j), mask=c < C, other=0.0).to(tl.float32)
        found += tl.where(seen_from(seg, q, p, T), du * w[None, :], 0.0)
        if j == 0:
            tl.store(sums + W * C + c, tl.sum(du, 0), mask=c < C)
            for i in tl.static_range(W):
                back = p - (W - 1) + i
                met = inputs_at(x, x_t, tail, back, c, seen_from(seg, p, back, T), T, C, W)
                tl.store(sums + i * C + c, tl.sum(du * met, 0), mask=c < C)
    here = ((p >= 0) & (p < T))[:, None] & (c < C)[None, :]
    tl.store(dx + (b * T + p[:, None]) * C + c[None, :], found.to(dx.dtype.element_ty), mask=here)
    if dtail is not None:
        before = (p < 0)[:, None] & (c < C)[None, :]
        place = dtail + (b * (W - 1) + p[:, None] + (W - 1)) * C + c[None, :]
        tl.store(place, found.to(dtail.dtype.element_ty), mask=before)


class TritonConvSiLU(torch.autograd.Function):
    """silu(causal_conv(...)) in x's dtype; keeps the inputs alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, seg: Tensor | None
    ) -> Tensor:
        (batch, length, channels), taps = x.shape, weight.shape[1]
        x = x if x.stride(2) == 1 else x.contiguous()
        own = None if tail is None else tail.to(x.dtype).contiguous()
        ctx.save_for_backward(x, weight, bias, own, seg)
        ctx.tail_dtype = None if tail is None else tail.dtype
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grid = (triton.cdiv(length, TIME), triton.cdiv(channels, CHANNELS), batch)
        forward_kernel[grid](
            x, own, weight.contiguous(), bias, held(seg), out, *x.stride()[:2], length, channels, taps, TIME, CHANNELS
        )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, tail, seg = ctx.saved_tensors
        (batch, length, channels), taps = x.shape, weight.shape[1]
        grad = grad if grad.stride(2) == 1 else grad.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dtail = None if tail is None else torch.empty(tail.shape, dtype=ctx.tail_dtype, device=x.device)
        grid = (triton.cdiv(length + taps - 1, TIME), triton.cdiv(channels, CHANNELS), batch)
        sums = torch.empty(batch * grid[0], taps + 1, channels, device=x.device)
        backward_kernel[grid](
            x, tail, weight.contiguous(), bias, held(seg), grad, dx, dtail, sums,
            *x.stride()[:2], *grad.stride()[:2], length, channels, taps, TIME, CHANNELS,
        )  # fmt: skip
        total = sums.sum(0)
        dbias = None if bias is None else total[taps].to(bias.dtype)
        return dx, total[:taps].t().to(weight.dtype), dbias, dtail, None


def held(seg: Tensor | None) -> Tensor | None:
    """Document numbers as the kernels read them: neighbours in 32 bits."""
    return None if seg is None else seg.to(torch.int32).contiguous()


def causal_conv_silu(
    x_BTC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    tail_BWC: Tensor | None = None,
    seg_BT: Tensor | None = None,
) -> Tensor:
    """ops.conv.causal_conv_silu."""
    return TritonConvSiLU.apply(x_BTC, weight_CW, bias_C, tail_BWC, seg_BT)
