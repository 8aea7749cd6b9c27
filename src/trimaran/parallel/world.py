"""The processes of a run: where this one stands on each axis, and the groups it talks to.

Ranks count through (pp, replicate, fsdp, cp, tp), tp fastest, so that what talks most lies closest together. Some parts
of the model see these axes in other ways, the same ranks with other borders:

    cut       fsdp x cp            shards of what tp has cut already
    whole     fsdp x cp x tp       shards of what tp leaves whole; each rank's gradient is a part of the sum
    efsdp     fsdp x cp x tp / ep  shards of the experts that ep has dealt out
    row       cp x tp              who holds the pieces of one row
    data      all but pp           whose losses and loads add up
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from math import prod
from typing import Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from trimaran.errors import Refusal
from trimaran.parallel.settings import ParallelSettings


class Rows(Protocol):
    """Streams [B, T] of a step, of which rows and stretches of the tokens can be taken."""

    @property
    def tokens_BT(self) -> Tensor: ...
    def rows(self, start: int, stop: int) -> Self: ...
    def columns(self, start: int, stop: int) -> Self: ...


R = TypeVar("R", bound=Rows)


@dataclass(frozen=True)
class World:
    """The layout and this process's place in it. Without settings: one process, which needs no process group.

    groups: of every axis and name of the table above, those that differ from this process on it alone; none of one
    process.
    """

    settings: ParallelSettings = field(default_factory=ParallelSettings)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    groups: Mapping[str, dist.ProcessGroup] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """One process and no process group."""
        return not self.groups

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    @cached_property
    def place(self) -> dict[str, int]:
        """Coordinate on each axis: pp, replicate, fsdp, cp, tp; and ep, row (of `settings.rows`)."""
        s, rest, found = self.settings, self.rank, {}
        for axis, size in (("tp", s.tp), ("cp", s.cp), ("fsdp", s.fsdp), ("replicate", s.replicate), ("pp", s.pp)):
            rest, found[axis] = divmod(rest, size)
        found["ep"] = self.rank % s.ep
        found["row"] = found["replicate"] * s.fsdp + found["fsdp"]
        return found

    def group(self, axis: str) -> dist.ProcessGroup:
        """The processes that differ from this one on `axis` alone: an axis, or a name of the table above."""
        return self.groups[axis]

    def share(self, streams: R) -> R:
        """This process's part of a whole step: its rows, and under cp its piece of them.

        Raises Refusal for a step that does not divide.
        """
        s, (rows, length) = self.settings, streams.tokens_BT.shape
        if rows % s.rows:
            found = f"a step of {rows} rows for replicate {s.replicate} x fsdp {s.fsdp}"
            step = "change train.batch_size or the sizes under [parallel]"
            raise Refusal(found, f"a multiple of {s.rows} rows", step)
        if length % (s.cp * s.tp):
            found = f"rows of {length} tokens for cp {s.cp} x tp {s.tp}"
            step = "change data.sequence_length or the sizes under [parallel]"
            raise Refusal(found, f"a multiple of {s.cp * s.tp} tokens", step)
        if s.rows > 1:
            count = rows // s.rows
            streams = streams.rows(self.place["row"] * count, (self.place["row"] + 1) * count)
        if s.cp > 1:
            count = length // s.cp
            streams = streams.columns(self.place["cp"] * count, (self.place["cp"] + 1) * count)
        return streams

    def sum(self, x: Tensor, axis: str = "data") -> Tensor:
        """The sum over all processes that differ on `axis`, without gradient; x itself where there is one."""
        if self.alone:
            return x
        x = x.detach().clone()
        dist.all_reduce(x, group=self.group(axis))
        return x

    def largest(self, x: Tensor, axis: str) -> Tensor:
        """The element-wise maximum over all processes that differ on `axis`, without gradient."""
        x = x.detach().clone()
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group(axis))
        return x

    def total(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Numbers of which every process has a part: their sums over all of them, in one exchange."""
        if self.alone:
            return dict(values)
        summed = torch.stack([value.detach().float() for value in values.values()])
        dist.all_reduce(summed)
        return dict(zip(values, summed.unbind()))

    def norm(self, own: Tensor) -> Tensor:
        """The norm of what all processes hold between them, from the norm of what this one holds.

        `replicate` processes hold the same, everything else is held once.
        """
        if self.alone:
            return own
        squared = own.square()
        dist.all_reduce(squared)
        return (squared / self.settings.replicate).sqrt()

    def mesh(self, axis: str) -> DeviceMesh:
        """torch's mesh to share weights over along `axis`; in front of it the copies, where there are any."""
        kind = self.device.type
        if self.settings.replicate == 1:
            return DeviceMesh.from_group(self.groups[axis], kind, mesh_dim_names=(axis,))
        axes = ("replicate", axis)
        groups = [self.groups[one] for one in axes]
        ranks = members(shapes(self.settings)[axis], self.rank, *axes)
        return DeviceMesh.from_group(groups, kind, ranks, mesh_dim_names=axes)


def shapes(s: ParallelSettings) -> dict[str, dict[str, int]]:
    """Name of an axis -> the axes among which it is one, with their sizes, slowest first."""
    outer = {"pp": s.pp, "replicate": s.replicate}
    plain = {**outer, "fsdp": s.fsdp, "cp": s.cp, "tp": s.tp}
    experts = {**outer, "efsdp": s.shards // s.ep, "ep": s.ep}
    return dict.fromkeys(plain, plain) | {
        "cut": {**outer, "cut": s.fsdp * s.cp, "tp": s.tp},
        "whole": {**outer, "whole": s.shards},
        "efsdp": experts,
        "ep": experts,
        "row": {**outer, "fsdp": s.fsdp, "row": s.cp * s.tp},
        "data": {"pp": s.pp, "data": s.replicate * s.shards},
    }


def members(shape: Mapping[str, int], rank: int, *axes: str) -> Tensor:
    """Ranks of the processes that differ from `rank` on `axes` alone, one dimension for each."""
    ranks = torch.arange(prod(shape.values())).view(*shape.values())
    here = (ranks == rank).nonzero()[0].tolist()
    return ranks[tuple(slice(None) if axis in axes else place for axis, place in zip(shape, here))]


def join(settings: ParallelSettings, device: torch.device) -> World:
    """This process's place in the layout. Needs torch.distributed to be initialised unless all axes are 1.

    Raises Refusal where the number of processes is another than the layout has.
    """
    running = dist.get_world_size() if dist.is_initialized() else 1
    if running != settings.world:
        s = settings
        found = f"{running} processes for pp {s.pp} x replicate {s.replicate} x fsdp {s.fsdp} x cp {s.cp} x tp {s.tp}"
        step = f"start with torchrun --nproc-per-node {settings.world}, or change the sizes under [parallel]"
        raise Refusal(found, f"{settings.world} processes", step)
    if running == 1:
        return World(settings, device)
    rank, patience = dist.get_rank(), timedelta(seconds=settings.timeout)
    # A group has threads and connections of its own: axes that hold the same processes share one.
    everybody = dist.group.WORLD
    assert everybody is not None
    known = {tuple(range(running)): everybody}
    groups: dict[str, dist.ProcessGroup] = {}
    for axis, shape in shapes(settings).items():
        ranks = tuple(members(shape, rank, axis).tolist())
        if ranks not in known:  # asked by its members alone, all in this order
            known[ranks] = dist.new_group(list(ranks), timeout=patience, use_local_synchronization=True)
        groups[axis] = known[ranks]
    return World(settings, device, rank, groups)
