"""A guide whose mistakes stay its own row's."""

from collections.abc import Callable
from typing import Self, TypeVar

import torch
from torch import Tensor

from trimaran.engine.guide import Guide

T = TypeVar("T")


class Fenced:
    """`guide`, behind a fence: what it raises is noted in `failure`, here and in all forks, and from then on nothing is
    allowed. So a guide that breaks ends its own request, and no other row of the batch.
    """

    def __init__(self, guide: Guide, failure: list[Exception] | None = None):
        self.guide, self.failure = guide, [] if failure is None else failure

    @classmethod
    def maker(cls, make: Callable[[], Guide] | None) -> "Callable[[], Fenced] | None":
        """What makes the fenced guide of each sample."""
        return None if make is None else lambda: cls(make())

    @property
    def ended(self) -> bool:
        return self._ask(lambda: self.guide.ended, True)

    def allowed(self) -> Tensor | None:
        nothing: Tensor | None = torch.zeros(1, dtype=torch.bool)
        return self._ask(self.guide.allowed, nothing)

    def push(self, token: int) -> None:
        self._ask(lambda: self.guide.push(token), None)

    def fork(self) -> Self:
        return type(self)(self._ask(self.guide.fork, self.guide), self.failure)

    def _ask(self, question: Callable[[], T], otherwise: T) -> T:
        """The guide's answer; `otherwise` from its first mistake on."""
        if self.failure:
            return otherwise
        try:
            return question()
        except Exception as problem:
            self.failure.append(problem)
            return otherwise
