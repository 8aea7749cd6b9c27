"""RMS norm and the gated grouped RMS norm on a GPU (ops.norm): one kernel forward and one backward for both.

A program has one group of one row forward; backward it has one group of many rows, one after the other, so that the
weight's gradient adds up in registers: one row of sums per program, added by torch, without atomics. The gate's SiLU is
made again in backward; kept are the inputs and one number per row and group.

Shapes: M rows, G groups of D channels each; x [M, G D] with neighbouring channels, rows anywhere.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimaran.ops.triton_backend import steps

PROGRAMS = 512  # of backward, per group: a few for each of a GPU's processors


@triton.jit
def gated(x, x_m, gate, gate_m, row, channel, here):
    """x, or x * silu(gate), of one group of one row in fp32."""
    u = tl.load(x + row * x_m + channel, mask=here, other=0.0).to(tl.float32)
    if gate is not None:
        z = tl.load(gate + row * gate_m + channel, mask=here, other=0.0).to(tl.float32)
        u *= z * tl.sigmoid(z)
    return u


@triton.jit
def forward_kernel(x, gate, weight, out, scale, x_m, gate_m, G, D, eps, BLOCK: tl.constexpr):
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, BLOCK)
    here, channel = place < D, g * D + place
    u = gated(x, x_m, gate, gate_m, row, channel, here)
    inverse = 1 / tl.sqrt(tl.sum(u * u, 0) / D + eps)
    w = tl.load(weight + channel, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * G * D + channel, (u * inverse * w).to(out.dtype.element_ty), mask=here)
    tl.store(scale + row * G + g, inverse)


@triton.jit
def backward_kernel(
    x, gate, weight, scale, grad, dx, dgate, dweight, x_m, gate_m, grad_m, M, G, D, ROWS, BLOCK: tl.constexpr
):
    part, g = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, BLOCK)
    here, channel = place < D, g * D + place
    w = tl.load(weight + channel, mask=here, other=0.0).to(tl.float32)
    added = tl.zeros([BLOCK], tl.float32)
    for n in range(ROWS):
        row = part.to(tl.int64) * ROWS + n
        live = here & (row + 0 * place < M)  # as a row: triton 3.9 makes numbers of a mask with a single truth
        inverse = tl.load(scale + tl.minimum(row, M - 1) * G + g)  # behind the last row nothing is live
        unit = gated(x, x_m, gate, gate_m, row, channel, live) * inverse
        piece = tl.load(grad + row * grad_m + channel, mask=live, other=0.0).to(tl.float32)
        added += piece * unit
        piece *= w
        du = (piece - unit * (tl.sum(piece * unit, 0) / D)) * inverse
        if gate is not None:
            y = tl.load(x + row * x_m + channel, mask=live, other=0.0).to(tl.float32)
            z = tl.load(gate + row * gate_m + channel, mask=live, other=0.0).to(tl.float32)
            s = tl.sigmoid(z)
            dz = du * y * s * (1 + z * (1 - s))
            tl.store(dgate + row * G * D + channel, dz.to(dgate.dtype.element_ty), mask=live)
            du *= z * s
        tl.store(dx + row * G * D + channel, du.to(dx.dtype.element_ty), mask=live)
    tl.store(dweight + part.to(tl.int64) * G * D + channel, added, mask=here)


def rows_of(x: Tensor) -> Tensor:
    """[..., D] -> [M, D] with neighbouring channels."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


class TritonNorm(torch.autograd.Function):
    """RMS norm over each of `groups` slices of x, or of x * silu(gate), in `dtype`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, groups: int, eps: float, dtype: torch.dtype
    ) -> Tensor:
        rows, gates = rows_of(x), None if gate is None else rows_of(gate)
        count, width = len(rows), rows.shape[1] // groups
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        scale = torch.empty(count, groups, device=x.device)
        strides = rows.stride(0), 0 if gates is None else gates.stride(0)
        block = triton.next_power_of_2(width)
        if count:
            forward_kernel[count, groups](rows, gates, weight, out, scale, *strides, groups, width, eps, block)
        ctx.save_for_backward(rows, gates, weight, scale)
        ctx.shape, ctx.groups = x.shape, groups
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, gates, weight, scale = ctx.saved_tensors
        grads, count, width = rows_of(grad), len(rows), rows.shape[1] // ctx.groups
        dx = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        dgate = None if gates is None else torch.empty(gates.shape, dtype=gates.dtype, device=rows.device)
        each = triton.cdiv(max(count, 1), PROGRAMS)
        sums = torch.empty(triton.cdiv(max(count, 1), each), rows.shape[1], device=rows.device)
        strides = rows.stride(0), 0 if gates is None else gates.stride(0), grads.stride(0)
        backward_kernel[len(sums), ctx.groups](
            rows, gates, weight, scale, grads, dx, dgate, sums,
            *strides, count, ctx.groups, width, steps(each), triton.next_power_of_2(width),
        )  # fmt: skip
        dgate = None if dgate is None else dgate.view(ctx.shape)
        return dx.view(ctx.shape), dgate, sums.sum(0).to(weight.dtype), None, None, None


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """ops.norm.rms_norm."""
    return TritonNorm.apply(x_D, None, weight_D, 1, eps, dtype or x_D.dtype)


def gated_rms_norm(y_D: Tensor, gate_D: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    """ops.norm.gated_rms_norm."""
    return TritonNorm.apply(y_D, gate_D, weight_D, groups, eps, gate_D.dtype)
