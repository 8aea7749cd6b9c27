"""Exchanges that gradients pass through. Each one's backward is its adjoint, so that parts stay parts of one sum.

gather        every process's piece, one behind the other          backward: scatter_sum
scatter_sum   the sum of all processes' tensors, this one's piece  backward: gather
deal          rows handed out, as many to each as wanted           backward: the rows handed back
before        the last places in front of this process's piece     backward: handed back, and added up
"""

from collections.abc import Sequence
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


def deal(x: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """sent[r] rows of x go to process r of the group, in order; received[r] rows come from it, in the ranks' order."""
    return Deal.apply(x, list(sent), list(received), group)


def before(x: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    """The last `count` places before this process's piece, or all where there are fewer: [B, <= count, ...].

    x [B, L, ...]: the piece; all pieces are as long, and lie in the order of the group's ranks. count: the same in all
    processes. What lies further on is not exchanged.
    """
    length, rank = x.shape[1], group.rank()

    def part(owner: int, reader: int) -> int:
        """Places of `owner`'s piece that `reader` wants, its last ones."""
        return min(max(count - (reader - 1 - owner) * length, 0), length) if owner < reader else 0

    sent = [part(rank, reader) for reader in range(group.size())]
    received = [part(owner, rank) for owner in range(group.size())]
    x_LB = x.transpose(0, 1)
    return deal(torch.cat([x_LB[length - places :] for places in sent]), sent, received, group).transpose(0, 1)


def gathered(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """`gather` without gradient."""
    size = group.size()
    joined = x.new_empty(*x.shape[:dim], size * x.shape[dim], *x.shape[dim + 1 :])
    # Where nothing stands in front of `dim`, pieces arrive where they belong.
    direct = joined.numel() == joined[(0,) * dim].numel()
    pieces = joined if direct else x.new_empty(size, *x.shape)
    # torch 2.13 has a new name for it, and warns of the old one
    exchange = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    exchange(pieces.view(-1), x.contiguous().view(-1), group=group)
    if not direct:
        joined.unflatten(dim, (size, -1)).copy_(pieces.movedim(0, dim))
    return joined


def scattered(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """`scatter_sum` without gradient."""
    pieces = x.unflatten(dim, (group.size(), -1)).movedim(dim, 0).contiguous()
    own = torch.empty_like(pieces[0])
    exchange = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    exchange(own.view(-1), pieces.view(-1), group=group)
    return own


def dealt(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """`deal` without gradient."""
    rows = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(rows, x.contiguous(), received, sent, group=group)
    return rows


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


class Deal(torch.autograd.Function):
    """See `deal`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return dealt(x, sent, received, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return dealt(grad, ctx.received, ctx.sent, ctx.group), None, None, None
