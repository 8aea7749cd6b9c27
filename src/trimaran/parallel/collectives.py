"""Exchanges that gradients pass through. Each one's backward is its adjoint, so that parts stay parts of one sum.

gather        every process's piece, one behind the other          backward: scatter_sum
scatter_sum   the sum of all processes' tensors, this one's piece  backward: gather
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Pieces of equal shape, joined along `dim` in the order of the group's ranks."""
    return Gather.apply(x, group, dim)


def scatter_sum(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """This process's piece, along `dim`, of the sum over the group. The group's size divides that dimension."""
    return ScatterSum.apply(x, group, dim)


def gathered(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """`gather` without gradient."""
    pieces = x.new_empty(group.size(), *x.shape)
    # torch 2.13 has a new name for it, and warns of the old one
    exchange = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    exchange(pieces.flatten(0, 1), x.contiguous(), group=group)
    # a move of axes; for the first axis, and for one row, nothing is copied
    return pieces.movedim(0, dim).flatten(dim, dim + 1)


def scattered(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """`scatter_sum` without gradient."""
    pieces = x.unflatten(dim, (group.size(), -1)).movedim(dim, 0).contiguous()
    own = torch.empty_like(pieces[0])
    exchange = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    exchange(own, pieces.flatten(0, 1), group=group)
    return own


class Gather(torch.autograd.Function):
    """See `gather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return gathered(x, group, dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return scattered(grad, ctx.group, ctx.dim), None, None


class ScatterSum(torch.autograd.Function):
    """See `scatter_sum`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return scattered(x, group, dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gathered(grad, ctx.group, ctx.dim), None, None
