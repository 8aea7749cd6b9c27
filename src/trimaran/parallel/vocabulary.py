"""The two ends of the model under tp: embedding and head hold a stretch of the vocabulary each.

The embedding's outputs are partial sums (zeros for tokens of other stretches) and leave it cut along the tokens. The
head's logits are those of its own ids; `ops.loss` puts the softmax together over the group.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trimaran.errors import Refusal
from trimaran.model.linear import Embedding
from trimaran.parallel.collectives import scatter_sum


@dataclass(frozen=True)
class Stretch:
    """The ids [first, last) of a vocabulary that `group` holds between its processes; see ops.loss.Stretch."""

    first: int
    last: int
    group: dist.ProcessGroup

    @property
    def parts(self) -> int:
        return self.group.size()

    def largest(self, x: Tensor) -> Tensor:
        """The element-wise maximum over the group."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def sum(self, x: Tensor) -> Tensor:
        """The element-wise sum over the group."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def _reduced(self, x: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, how, group=self.group)
        return x


def stretch(vocab_size: int, group: dist.ProcessGroup) -> Stretch:
    """This process's ids: equal stretches but for the last."""
    each = -(-vocab_size // group.size())
    if each * (group.size() - 1) >= vocab_size:
        found = f"a vocabulary of {vocab_size} over tp = {group.size()}"
        raise Refusal(found, "at least one id for every process", "lower parallel.tp")
    first = group.rank() * each
    return Stretch(first, min(first + each, vocab_size), group)


class CutEmbedding(Embedding):
    """A stretch of an embedding's rows: tokens [B, T] -> this process's tokens [B, T / tp, D]."""

    def __init__(self, stretch: Stretch, vocab_size: int, weight: nn.Parameter):
        """vocab_size: of the whole; weight [last - first, D]: what is left."""
        nn.Module.__init__(self)  # not Embedding's, which would make a whole one
        self.vocab_size, self.width, self.weight = vocab_size, weight.shape[1], weight
        self.stretch = self.ids = stretch

    def forward(self, tokens_BT: Tensor) -> Tensor:
        own_BT = (tokens_BT >= self.ids.first) & (tokens_BT < self.ids.last)
        rows_BTD = F.embedding(torch.where(own_BT, tokens_BT - self.ids.first, 0), self.weight)
        return scatter_sum(rows_BTD * own_BT[..., None], self.ids.group, 1)
