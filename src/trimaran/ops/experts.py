"""Many small linear maps, each applied to the tokens routed to it.

Tokens are laid out by expert once, go through all maps of the expert, and are added back with their weights. Each
expert's stretch of rows is rounded up to a multiple of `align`: matrix kernels of a CPU are generated per shape, and a
shape that was never met before costs far more than some spare rows. Spare rows hold some token's vector, nobody reads
what becomes of them, and their gradient is zero.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.ops import backend, triton_backend
from trimaran.ops.numbers import at_least_fp32

CALL = 100_000  # multiply-adds that a CPU's core could do while one call starts


@dataclass(frozen=True)
class Dispatch:
    """Where each (token, choice) pair sits once rows are ordered by expert.

    token_S: token in each row (S rows, spare ones included); slot_MK: row of each choice; weight_MK: its combine
    weight; count_E: rows of each expert, spare ones included.
    """

    token_S: Tensor
    slot_MK: Tensor
    weight_MK: Tensor
    count_E: Tensor


def alignment(rows: int, experts: int) -> int:
    """Rows to which an expert's stretch is rounded: about an eighth of the average load, at most 32."""
    average = rows // experts
    return 1 if average < 8 else min(32, 1 << (average // 8).bit_length())


def dispatch(ids_MK: Tensor, weights_MK: Tensor, experts: int, align: int = 1) -> Dispatch:
    """Orders the choices ids_MK [tokens, k] by expert; within an expert, by token."""
    k = ids_MK.shape[1]
    expert_R, order_R = ids_MK.flatten().sort(stable=True)
    # Counted by looking up where each expert's stretch ends: bincount would wait for an accelerator.
    every_E = torch.arange(experts, device=expert_R.device)
    count_E = torch.searchsorted(expert_R, every_E, right=True).diff(prepend=expert_R.new_zeros(1))
    aligned_E = (count_E + align - 1) // align * align
    shift_E = (aligned_E.cumsum(0) - aligned_E) - (count_E.cumsum(0) - count_E)
    slot_R = torch.arange(len(expert_R), device=expert_R.device) + shift_E[expert_R]
    slot_MK = torch.empty_like(order_R).scatter_(0, order_R, slot_R).view_as(ids_MK)
    if align == 1:
        return Dispatch(order_R // k, slot_MK, weights_MK, count_E)
    if ids_MK.device.type == "cpu":
        total = int(aligned_E.sum())
    else:  # the largest possible total: no waiting for the device; rows past the last expert belong to nobody
        total = (len(expert_R) + experts * (align - 1)) // align * align
    token_S = expert_R.new_zeros(total).scatter_(0, slot_R, order_R // k)
    return Dispatch(token_S, slot_MK, weights_MK, aligned_E)


@dataclass(frozen=True)
class Everyone:
    """Every token goes through every expert; weight_ME is 0 where that was not chosen. Without gradient.

    For few tokens and small experts: finding out who goes where takes longer than the products that it spares."""

    weight_ME: Tensor


Plan = Dispatch | Everyone


def worth_everyone(tokens: int, k: int, experts: int, numbers: int) -> bool:
    """Whether all `experts` of `numbers` weights each should read all tokens, of which each has chosen k.

    In multiply-adds: a weight that is only read costs about as much as four, a call as much as CALL; ordering takes
    about twenty calls, each expert that is used three.
    """
    spare = (experts * max(tokens, 4) - tokens * k) * numbers
    return spare < CALL * (20 + 3 * min(experts, tokens * k))


def plan(ids_MK: Tensor, weights_MK: Tensor, experts: int, numbers: int) -> Plan:
    """How tokens get to the experts that they have chosen, whose maps have `numbers` weights each."""
    tokens, k = ids_MK.shape
    if not backend.allowed("torch.experts"):
        return dispatch(ids_MK, weights_MK, experts)
    if not torch.is_grad_enabled() and ids_MK.device.type == "cpu" and worth_everyone(tokens, k, experts, numbers):
        return Everyone(weights_MK.new_zeros(tokens, experts).scatter_(1, ids_MK, weights_MK))
    return dispatch(ids_MK, weights_MK, experts, alignment(ids_MK.numel(), experts))


def to_experts(x_MI: Tensor, plan: Plan) -> Tensor:
    """Rows in expert order [S, I], or as they are where all go to everyone."""
    if isinstance(plan, Everyone):
        return x_MI
    if torch.is_grad_enabled() and triton_backend.runs("triton.experts", x_MI):
        from trimaran.ops import triton_experts

        return triton_experts.to_experts(x_MI, plan.token_S, plan.slot_MK)
    if not torch.is_grad_enabled() or not backend.allowed("torch.experts"):
        return x_MI.index_select(0, plan.token_S)
    return ToExperts.apply(x_MI, plan.token_S, plan.slot_MK)


def through_experts(x: Tensor, weight_EOI: Tensor, plan: Plan) -> Tensor:
    """Each expert's rows times its own weight: [S, I] -> [S, O]; for everyone [M, I] or [E, M, I] -> [E, M, O]."""
    if isinstance(plan, Everyone):
        return torch.matmul(x, weight_EOI.transpose(1, 2))
    return grouped_linear(x, weight_EOI, plan.count_E)


def from_experts(y: Tensor, plan: Plan) -> Tensor:
    """sum_k weight * row of each token's choices, in the weights' dtype: [tokens, O]."""
    if isinstance(plan, Everyone):
        return (y * plan.weight_ME.t()[..., None]).sum(0)
    if triton_backend.runs("triton.experts", y):
        from trimaran.ops import triton_experts

        return triton_experts.from_experts(y, plan.slot_MK, plan.weight_MK)
    if not backend.allowed("torch.experts"):
        return (y[plan.slot_MK] * plan.weight_MK[..., None]).sum(1)
    return FromExperts.apply(y, plan.slot_MK, plan.weight_MK)


class ToExperts(torch.autograd.Function):
    """A gather whose gradient is a gather too: a token's rows are known, so nothing is scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_S: Tensor, slot_MK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_MK)
        return x.index_select(0, token_S)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slot_MK,) = ctx.saved_tensors
        total = at_least_fp32(grad.index_select(0, slot_MK[:, 0]))
        for k in range(1, slot_MK.shape[1]):
            total = total + grad.index_select(0, slot_MK[:, k])
        return total.to(grad.dtype), None, None


class FromExperts(torch.autograd.Function):
    """A weighted gather; every row belongs to one choice at most, so its gradient is written, not added."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, slot_MK: Tensor, weight_MK: Tensor) -> Tensor:
        ctx.save_for_backward(y, slot_MK, weight_MK)
        out = y.index_select(0, slot_MK[:, 0]) * weight_MK[:, :1]
        for k in range(1, slot_MK.shape[1]):
            out += y.index_select(0, slot_MK[:, k]) * weight_MK[:, k : k + 1]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, slot_MK, weight_MK = ctx.saved_tensors
        dy, dweight_MK = torch.zeros_like(y), torch.empty_like(weight_MK)
        for k in range(slot_MK.shape[1]):
            slot_M = slot_MK[:, k]
            dweight_MK[:, k] = (grad * y.index_select(0, slot_M)).sum(-1)
            dy.index_copy_(0, slot_M, (grad * weight_MK[:, k : k + 1]).to(y.dtype))
        return dy, None, dweight_MK


def grouped_linear(x_SI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """Each expert's rows times its own weight: [S, I] -> [S, O]."""
    # Single products know how many rows they have: an accelerator would be waited for.
    few = x_SI.shape[0] <= 2 * weight_EOI.shape[0] and not (x_SI.is_cuda and x_SI.dtype == torch.bfloat16)
    # The grouped kernel has no fp64, and wants rows that begin at multiples of 16 bytes.
    odd = any(width * x_SI.element_size() % 16 for width in weight_EOI.shape[1:])
    if few or odd or x_SI.dtype == torch.float64 or not backend.allowed("torch.experts"):
        return grouped_linear_reference(x_SI, weight_EOI, count_E)
    return F.grouped_mm(x_SI, weight_EOI.transpose(1, 2), offs=count_E.cumsum(0).to(torch.int32))


def grouped_linear_reference(x_SI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """One plain product per expert that has rows; also the fastest form for a handful of rows."""
    pieces, start = [], 0
    for expert, count in enumerate(count_E.tolist()):
        if count:
            pieces.append(F.linear(x_SI[start : start + count], weight_EOI[expert]))
            start += count
    if start < len(x_SI):  # rows past the last expert
        pieces.append(x_SI.new_zeros(len(x_SI) - start, weight_EOI.shape[1]))
    if not pieces:  # no rows, and a gradient of zeros for the weights
        return F.linear(x_SI, weight_EOI[0])
    return torch.cat(pieces)
