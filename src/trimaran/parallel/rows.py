"""Rows whose tokens lie on several processes (cp, tp), as the routers' statistics need them."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """The processes of `group` hold each row between them. Of the tokens that a pass is about, a block outside of the
    mixers that tp cuts sees piece number `piece` of `pieces`. See model.moe.Row."""

    group: dist.ProcessGroup
    piece: int
    pieces: int

    def own(self, x_BT: Tensor) -> Tensor:
        """[B, T] -> [B, T / pieces]."""
        return x_BT.chunk(self.pieces, 1)[self.piece]

    def sum(self, x: Tensor) -> Tensor:
        """Over the group."""
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x
