"""Rules on what a row may say: constraints, forced tokens, budgets. The sampler asks one before every token.

A guide is told every token that becomes part of the row, and nothing else. Looking along a draft is done on a fork,
which is thrown away: what a verification refuses was never said.
"""

from typing import Protocol, Self

import torch
from torch import Tensor


class Guide(Protocol):
    """What one row may say next. Its answers depend on the tokens pushed and on nothing else."""

    @property
    def ended(self) -> bool:
        """True where nothing but the end of the row may follow."""

    def allowed(self) -> Tensor | None:
        """[V] bool on the CPU, True for the ids that may come next; None: all. Ids past its end may not come.

        A forced token is a mask with one True. The mask is the caller's to read, not to write. Raises `Refusal` where
        the row cannot go on.
        """

    def push(self, token: int) -> None:
        """Takes the token that the row said."""

    def fork(self) -> Self:
        """A copy that can be pushed without this guide noticing. Cheap: made in every pass that verifies a draft."""


class Guides:
    """Several guides at once: allowed is what all of them allow."""

    def __init__(self, *guides: Guide):
        self.guides = guides

    @property
    def ended(self) -> bool:
        return any(guide.ended for guide in self.guides)

    def allowed(self) -> Tensor | None:
        masks = [mask for mask in (guide.allowed() for guide in self.guides) if mask is not None]
        if len(masks) < 2:
            return masks[0] if masks else None
        width = min(mask.shape[0] for mask in masks)
        return torch.stack([mask[:width] for mask in masks]).all(0)

    def push(self, token: int) -> None:
        for guide in self.guides:
            guide.push(token)

    def fork(self) -> "Guides":
        return Guides(*(guide.fork() for guide in self.guides))


def only(token: int) -> Tensor:
    """The mask that forces `token`."""
    mask_V = torch.zeros(token + 1, dtype=torch.bool)
    mask_V[token] = True
    return mask_V
