"""Many small linear maps, each applied to the tokens routed to it.

Tokens are laid out by expert once, go through all maps of the expert, and are added back with their weights. Two
layouts: `sorted` (rows one after the other, one grouped product) for real sizes, and `padded` (every expert given as
many slots as the fullest needs, one batched product), which is faster while experts are tiny.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """Where each (token, choice) pair sits once tokens are ordered by expert.

    token_M: token of each routed row; weight_M: its combine weight; count_E: rows of each expert; slot_M: place in
    the padded layout [E * capacity], or None for the sorted layout; capacity: slots per expert (0 when sorted).
    """

    token_M: Tensor
    weight_M: Tensor
    count_E: Tensor
    slot_M: Tensor | None = None
    capacity: int = 0


def dispatch(ids_MK: Tensor, weights_MK: Tensor, experts: int, padded: bool) -> Dispatch:
    """Orders the choices ids_MK [tokens, k] by expert; within an expert, by token."""
    k = ids_MK.shape[1]
    expert_M, order_M = ids_MK.flatten().sort(stable=True)
    count_E = torch.bincount(expert_M, minlength=experts)
    token_M, weight_M = order_M // k, weights_MK.flatten()[order_M]
    if not padded:
        return Dispatch(token_M, weight_M, count_E)
    # Capacities move in steps: CPU matrix kernels are prepared per shape, and a new shape costs more than empty slots.
    capacity = max(8, -(-int(count_E.max()) // 16) * 16)
    start_E = count_E.cumsum(0) - count_E
    slot_M = torch.arange(len(expert_M), device=expert_M.device) - start_E[expert_M] + expert_M * capacity
    return Dispatch(token_M, weight_M, count_E, slot_M, capacity)


def to_experts(x_MI: Tensor, plan: Dispatch) -> Tensor:
    """Tokens in expert order: [rows, I] sorted, or [E, capacity, I] padded with zeros."""
    rows = x_MI[plan.token_M]
    if plan.slot_M is None:
        return rows
    experts = len(plan.count_E)
    slots = rows.new_zeros(experts * plan.capacity, rows.shape[1]).index_copy(0, plan.slot_M, rows)
    return slots.view(experts, plan.capacity, -1)


def from_experts(y: Tensor, plan: Dispatch, tokens: int) -> Tensor:
    """Adds the experts' outputs back per token with their weights, in the weights' dtype: [tokens, O]."""
    rows = y if plan.slot_M is None else y.flatten(0, 1)[plan.slot_M]
    weighted = rows * plan.weight_M[:, None]
    return weighted.new_zeros(tokens, rows.shape[1]).index_add(0, plan.token_M, weighted)


def grouped_linear(x: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """Each expert's rows times its own weight: padded [E, capacity, I] -> [E, capacity, O], sorted [M, I] -> [M, O]."""
    if x.ndim == 3:
        return x @ weight_EOI.transpose(1, 2)
    if x.dtype == torch.float64:  # the grouped kernel has no fp64
        return grouped_linear_reference(x, weight_EOI, count_E)
    if x.shape[0] <= 2 * weight_EOI.shape[0]:
        return grouped_linear_reference(x, weight_EOI, count_E)
    return F.grouped_mm(x, weight_EOI.transpose(1, 2), offs=count_E.cumsum(0).to(torch.int32))


def grouped_linear_reference(x_MI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """One plain product per expert that has rows; also the fastest form for a handful of rows."""
    pieces, start = [], 0
    for expert, count in enumerate(count_E.tolist()):
        if count:
            pieces.append(F.linear(x_MI[start : start + count], weight_EOI[expert]))
            start += count
    return torch.cat(pieces)
