"""Problems drawn by number, and which of them are held out.

Whether a problem is held out is read from the problem itself: a digest of its identity, the same for every order,
wording and setting in which it could be asked. So nothing that is held out is ever trained, whatever recipe asks.
"""

import hashlib
from collections.abc import Callable
from random import Random
from typing import TypeVar

from trimaran.errors import Refusal
from trimaran.tasks.task import Split

P = TypeVar("P")

HELD_OUT = 5  # one problem in so many
DRAWS = 10_000  # tried for one problem


def digest(text: str) -> int:
    """64 bits that depend on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def split_of(identity: str) -> Split:
    """Where the problem of this identity belongs."""
    return "held_out" if digest(identity) % HELD_OUT == 0 else "train"


def drawn(task: str, number: int, split: Split, make: Callable[[Random], P | None], identity: Callable[[P], str]) -> P:
    """Problem `number` of a split: what `make` gives for the first seed that gives one of that split.

    make: a problem from a random generator, or None for one that will not do. identity: what makes two problems the
    same one.
    """
    for attempt in range(DRAWS):
        problem = make(Random(digest(f"{task} {split} {number} {attempt}")))
        if problem is not None and split_of(identity(problem)) == split:
            return problem
    raise Refusal(
        f"task {task}: no {split} problem among {DRAWS} draws", "settings with many problems", "make problems longer"
    )
