"""A guide whose mistakes stay its own row's."""

from collections.abc import Callable
from typing import Self, TypeVar

from torch import Tensor

from trimaran.engine.guide import Guide
from trimaran.errors import Refusal

T = TypeVar("T")


class Broken(Refusal):
    """The row cannot go on, because its guide raised `problem`, which may itself be a `Refusal`."""

    def __init__(self, problem: Exception):
        self.problem = problem
        super().__init__(f"a guide that broke: {problem!r}", "a guide that answers", "mend the guide")


class Fenced:
    """`guide`, behind a fence: the first thing that it raises is noted in `failure`, and from then on `allowed` raises
    `Broken`. So a guide that breaks ends its own request, and no other row of the batch.

    A fork has a fence of its own: what breaks along a draft counts where that draft stands, and else never happened.
    """

    def __init__(self, guide: Guide, failure: Exception | None = None):
        self.guide, self.failure = guide, failure

    @classmethod
    def maker(cls, make: Callable[[], Guide] | None) -> "Callable[[], Fenced] | None":
        """What makes the fenced guide of each sample."""
        return None if make is None else lambda: cls(make())

    @property
    def ended(self) -> bool:
        return self._ask(lambda: self.guide.ended, True)

    def allowed(self) -> Tensor | None:
        mask = self._ask(self.guide.allowed, None)
        if self.failure is not None:
            raise Broken(self.failure)
        return mask

    def push(self, token: int) -> None:
        self._ask(lambda: self.guide.push(token), None)

    def fork(self) -> Self:
        twin = type(self)(self.guide, self.failure)
        twin.guide = twin._ask(self.guide.fork, self.guide)
        return twin

    def _ask(self, question: Callable[[], T], otherwise: T) -> T:
        """The guide's answer; `otherwise` from its first mistake on."""
        if self.failure is not None:
            return otherwise
        try:
            return question()
        except Exception as problem:
            self.failure = problem
            return otherwise
