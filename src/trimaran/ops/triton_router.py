"""The sigmoid router's choice on a GPU: score, bias, limit to groups, the k best, weights; one token per program.

    scores = sigmoid(logits)      chosen: the k largest of scores + bias, among the experts of the best groups
    weights = factor * scores of the chosen, over their sum where they are normalised

A group's score is the sum of its two largest biased scores. The choice has no gradient; that of the weights and scores
is written down in torch. All in fp32. Ties go to the expert with the lower number.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def best_of(value, place):
    """The largest value and the first place that has it."""
    top = tl.max(value, 0)
    return top, tl.min(tl.where(value == top, place, value.shape[0]), 0)


@triton.jit
def within_groups(biased, expert, EACH, GROUPS: tl.constexpr, KEPT: tl.constexpr, GROUP_BLOCK: tl.constexpr):
    """-inf for experts outside the KEPT best groups of EACH experts."""
    group = tl.arange(0, GROUP_BLOCK)
    score = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    for g in tl.static_range(GROUPS):
        mine = tl.where(expert // EACH == g, biased, float("-inf"))
        first, where = best_of(mine, expert)
        second = tl.max(tl.where(expert == where, float("-inf"), mine), 0)
        score = tl.where(group == g, first + tl.where(EACH > 1, second, 0.0), score)
    allowed = expert < 0
    for _ in tl.static_range(KEPT):
        _, where = best_of(score, group)
        allowed = allowed | (expert // EACH == where)
        score = tl.where(group == where, float("-inf"), score)
    return tl.where(allowed, biased, float("-inf"))


@triton.jit
def route_kernel(
    logits, bias, scores, ids, weights, E, factor, tiny,
    K: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, NORMALISED: tl.constexpr,
    BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, GROUP_BLOCK: tl.constexpr
):  # fmt: skip
    m, expert, choice = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, K_BLOCK)
    here = expert < E
    score = tl.sigmoid(tl.load(logits + m * E + expert, mask=here, other=0.0).to(tl.float32))
    tl.store(scores + m * E + expert, score, mask=here)
    biased = tl.where(here, score + tl.load(bias + expert, mask=here, other=0.0), float("-inf"))
    if KEPT < GROUPS:
        biased = within_groups(biased, expert, E // GROUPS, GROUPS, KEPT, GROUP_BLOCK)
    chosen, found = tl.zeros([K_BLOCK], tl.int64), tl.zeros([K_BLOCK], tl.float32)
    for k in range(K):
        _, where = best_of(biased, expert)
        where = tl.minimum(where, E - 1)  # NaN has no largest: weights of NaN then, but no id that is nobody's
        chosen = tl.where(choice == k, where, chosen)
        found = tl.where(choice == k, tl.sum(tl.where(expert == where, score, 0.0), 0), found)
        biased = tl.where(expert == where, float("-inf"), biased)
    if NORMALISED:
        found = found / (tl.sum(found, 0) + tiny)
    tl.store(ids + m * K + choice, chosen, mask=choice < K)
    tl.store(weights + m * K + choice, found * factor, mask=choice < K)


class TritonRoute(torch.autograd.Function):
    """Scores [M, E], ids [M, K] and weights [M, K] from logits [M, E]."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor, k: int, groups: int, kept: int, normalised: bool, factor: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        (tokens, experts), device = logits.shape, logits.device
        scores = torch.empty(tokens, experts, device=device)
        ids, weights = torch.empty(tokens, k, dtype=torch.int64, device=device), torch.empty(tokens, k, device=device)
        blocks = [triton.next_power_of_2(size) for size in (experts, k, groups)]
        if tokens:
            route_kernel[(tokens,)](
                logits.contiguous(), bias, scores, ids, weights, experts, factor, 1e-20,
                k, groups, kept, normalised, *blocks,
            )  # fmt: skip
        ctx.save_for_backward(scores, ids)
        ctx.normalised, ctx.factor = normalised, factor
        ctx.mark_non_differentiable(ids)
        return scores, ids, weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dscores: Tensor, _: Tensor, dweights: Tensor) -> tuple[Tensor | None, ...]:
        scores, ids = ctx.saved_tensors
        dfound = dweights * ctx.factor
        if ctx.normalised:
            found = scores.gather(1, ids)
            total = found.sum(1, keepdim=True) + 1e-20
            dfound = (dfound - (dfound * found).sum(1, keepdim=True) / total) / total
        dscores = dscores.scatter_add(1, ids, dfound)
        return dscores * scores * (1 - scores), None, None, None, None, None, None


def route(
    logits_ME: Tensor, bias_E: Tensor, k: int, groups: int, kept: int, normalised: bool, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [M, E], the experts chosen [M, k] and their weights [M, k] of model.moe.Router, from fp32 logits.

    kept: of `groups` groups of experts, how many compete.
    """
    return TritonRoute.apply(logits_ME, bias_E, k, groups, kept, normalised, factor)
