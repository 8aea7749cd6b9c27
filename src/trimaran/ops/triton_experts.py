"""What stands around the experts' products on a GPU, and whole experts for few tokens.

- `relu2`: relu(x)^2, which keeps x itself
- `to_experts`, `from_experts`: rows out to the experts and back (ops.experts). The way back is one kernel that gathers,
  weighs and adds; its gradient writes every row once. Sums in fp32, and no atomics: each row has one writer
- `few_through`: for as few tokens as decoding has, both maps of each choice read straight from the stack of weights,
  without ordering anything: two kernels in place of about twenty

Shapes: M tokens, K choices each, S rows in expert order, I inputs, F hidden, O outputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimaran.ops.triton_backend import steps

ELEMENTS = 1024  # of one program of an elementwise kernel
OUTPUTS, INPUTS = 16, 256  # of a weight, read by one program at a time
FEW = 16  # tokens up to which reading an expert once per choice costs less than ordering the choices


@triton.jit
def relu2_kernel(x, grad, out, COUNT, ELEMENTS: tl.constexpr):
    """relu(x)^2, or with `grad` its gradient."""
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    here = place < COUNT
    positive = tl.maximum(tl.load(x + place, mask=here, other=0.0).to(tl.float32), 0.0)
    if grad is None:
        y = positive * positive
    else:
        y = 2 * positive * tl.load(grad + place, mask=here, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=here)


@triton.jit
def gather_kernel(rows, slots, weights, out, K, D, BLOCK: tl.constexpr):
    """out[m] = sum_k weight[m, k] rows[slot[m, k]]; without weights, plain sums."""
    m = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(K):
        slot = tl.load(slots + m * K + k).to(tl.int64)
        piece = tl.load(rows + slot * D + d, mask=d < D, other=0.0).to(tl.float32)
        if weights is not None:
            piece *= tl.load(weights + m * K + k).to(tl.float32)
        total += piece
    tl.store(out + m * D + d, total.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def spread_kernel(rows, slots, weights, grad, drows, dweights, K, D, STEPS, BLOCK: tl.constexpr):
    """The gradient of the weighted gather: of the row of one choice, and of its weight."""
    m, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, weight = tl.load(slots + m * K + k).to(tl.int64), tl.load(weights + m * K + k).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(STEPS):
        d = part * BLOCK + tl.arange(0, BLOCK)
        dy = tl.load(grad + m * D + d, mask=d < D, other=0.0).to(tl.float32)
        total += dy * tl.load(rows + slot * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(drows + slot * D + d, (dy * weight).to(drows.dtype.element_ty), mask=d < D)
    tl.store(dweights + m * K + k, tl.sum(total, 0).to(dweights.dtype.element_ty))


@triton.jit
def row_product(x, weight, o, I, O, STEPS, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    """One row x [I] times the rows o of a weight [O, I], in fp32."""
    total = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    for part in range(STEPS):
        i = part * INPUTS + tl.arange(0, INPUTS)
        here = (o < O)[:, None] & (i < I)[None, :]
        w = tl.load(weight + o[:, None] * I + i[None, :], mask=here, other=0.0).to(tl.float32)
        total += w * tl.load(x + i, mask=i < I, other=0.0).to(tl.float32)[None, :]
    return tl.sum(total, 1)


@triton.jit
def up_kernel(x, weight, ids, hidden, K, I, F, STEPS, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    """relu(up x)^2 of one choice, a stretch of the hidden numbers per program."""
    choice = tl.program_id(1).to(tl.int64)
    expert = tl.load(ids + choice).to(tl.int64)
    f = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    up = row_product(x + choice // K * I, weight + expert * F * I, f, I, F, STEPS, OUTPUTS, INPUTS)
    up = tl.maximum(up.to(hidden.dtype.element_ty).to(tl.float32), 0.0)
    tl.store(hidden + choice * F + f, (up * up).to(hidden.dtype.element_ty), mask=f < F)


@triton.jit
def down_kernel(hidden, weight, ids, weights, out, K, F, O, STEPS, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    """sum_k weight_k down(hidden_k) of one token, a stretch of the outputs per program."""
    m = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros([OUTPUTS], tl.float32)
    for k in range(K):
        expert = tl.load(ids + m * K + k).to(tl.int64)
        y = row_product(hidden + (m * K + k) * F, weight + expert * O * F, o, F, O, STEPS, OUTPUTS, INPUTS)
        total += tl.load(weights + m * K + k).to(tl.float32) * y.to(hidden.dtype.element_ty).to(tl.float32)
    tl.store(out + m * O + o, total.to(out.dtype.element_ty), mask=o < O)


class TritonReLU2(torch.autograd.Function):
    """Keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        return relu2_of(x, None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return relu2_of(x, grad.contiguous())


def relu2_of(x: Tensor, grad: Tensor | None) -> Tensor:
    out = torch.empty_like(x)
    if x.numel():
        relu2_kernel[(triton.cdiv(x.numel(), ELEMENTS),)](x, grad, out, x.numel(), ELEMENTS)
    return out


def relu2(x: Tensor) -> Tensor:
    """ops.activation.relu2."""
    return TritonReLU2.apply(x)


def gathered(rows: Tensor, slot_MK: Tensor, weight_MK: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[M, D]: the (weighted) sum of each token's rows."""
    (tokens, k), width = slot_MK.shape, rows.shape[1]
    out = torch.empty(tokens, width, dtype=dtype, device=rows.device)
    block = min(ELEMENTS, triton.next_power_of_2(width))
    if tokens:
        grid = (tokens, triton.cdiv(width, block))
        gather_kernel[grid](rows, slot_MK, weight_MK, out, steps(k), width, block)
    return out


class TritonToExperts(torch.autograd.Function):
    """A gather whose gradient is a gather too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_S: Tensor, slot_MK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_MK)
        return x.index_select(0, token_S)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slot_MK,) = ctx.saved_tensors
        return gathered(grad.contiguous(), slot_MK.contiguous(), None, grad.dtype), None, None


class TritonFromExperts(torch.autograd.Function):
    """The weighted gather, in the weights' dtype."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, slot_MK: Tensor, weight_MK: Tensor) -> Tensor:
        y, slot_MK, weight_MK = y.contiguous(), slot_MK.contiguous(), weight_MK.contiguous()
        ctx.save_for_backward(y, slot_MK, weight_MK)
        return gathered(y, slot_MK, weight_MK, weight_MK.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, slot_MK, weight_MK = ctx.saved_tensors
        (tokens, k), width = slot_MK.shape, y.shape[1]
        dy, dweight_MK = torch.zeros_like(y), torch.empty_like(weight_MK)  # spare rows: nobody writes their zeros
        block = min(ELEMENTS, triton.next_power_of_2(width))
        parts = steps(triton.cdiv(width, block))
        if tokens:
            spread_kernel[tokens, k](y, slot_MK, weight_MK, grad.contiguous(), dy, dweight_MK, k, width, parts, block)
        return dy, None, dweight_MK


def to_experts(x_MI: Tensor, token_S: Tensor, slot_MK: Tensor) -> Tensor:
    """ops.experts.to_experts."""
    return TritonToExperts.apply(x_MI, token_S, slot_MK)


def from_experts(y_SO: Tensor, slot_MK: Tensor, weight_MK: Tensor) -> Tensor:
    """ops.experts.from_experts."""
    return TritonFromExperts.apply(y_SO, slot_MK, weight_MK)


def few_through(x_MI: Tensor, up_EFI: Tensor, down_EOF: Tensor, ids_MK: Tensor, weight_MK: Tensor) -> Tensor:
    """sum_k weight_k down_k(relu(up_k x)^2) of each token [M, O], in the weights' dtype; without gradient."""
    (tokens, k), (_, hidden, inner), outer = ids_MK.shape, up_EFI.shape, down_EOF.shape[1]
    x, ids, weight = x_MI.contiguous(), ids_MK.contiguous(), weight_MK.contiguous()
    between = torch.empty(tokens * k, hidden, dtype=x.dtype, device=x.device)
    out = torch.empty(tokens, outer, dtype=weight.dtype, device=x.device)
    blocks, widths = (OUTPUTS, INPUTS), (steps(triton.cdiv(inner, INPUTS)), steps(triton.cdiv(hidden, INPUTS)))
    up_kernel[triton.cdiv(hidden, OUTPUTS), tokens * k](x, up_EFI, ids, between, k, inner, hidden, widths[0], *blocks)
    down_kernel[triton.cdiv(outer, OUTPUTS), tokens](
        between, down_EOF, ids, weight, out, steps(k), hidden, outer, widths[1], *blocks
    )
    return out
