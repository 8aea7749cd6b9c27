"""Lists to be sorted: numbers or words, upwards or downwards. A thought puts in one item after another."""

from bisect import insort
from random import Random
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from trimaran.errors import Refusal
from trimaran.tasks.draw import drawn
from trimaran.tasks.task import REWARD, Message, Prompt, Split, Task, Trace

WORDS = (
    *("anchor", "beam", "cabin", "deck", "ebb", "fleet", "gale", "hull", "island", "jib", "keel", "lagoon", "mast"),
    *("net", "oar", "port", "quay", "rope", "sail", "tide", "vane", "wave", "yacht", "zephyr"),
)


class Sorting(Task):
    """`length` different items in no order; the answer is the same items, sorted, with spaces between.

    items: "numbers" below `below`, or "words". order: "up", "down", or "both" by turns. varied: from two items up. A
    list is held out in every order of its items.
    """

    name: ClassVar[str] = "sorting"
    length: int = Field(5, ge=2, le=20)
    items: Literal["numbers", "words"] = "numbers"
    below: int = Field(100, ge=10)
    order: Literal["up", "down", "both"] = "up"
    varied: bool = False
    thinking: bool = False

    @model_validator(mode="after")
    def _enough(self) -> "Sorting":
        if self.items == "numbers" and self.length > self.below:
            found = f"length = {self.length} different numbers below {self.below}"
            raise Refusal(found, f"at most {self.below}", "lower length, or raise below")
        return self

    def prompt(self, number: int, split: Split = "train") -> Prompt:
        items, down = drawn(self.name, number, split, self._make, lambda made: f"list {sorted(made[0])}")
        words = "sort down" if down else "sort"
        messages = ({"role": "user", "content": f"{words}:\n{' '.join(map(str, items))}"},)
        secret = {"items": items, "down": down}
        return Prompt(self.name, split, number, messages, secret=secret, thinking=self.thinking)

    def gold(self, prompt: Prompt) -> tuple[Message, ...]:
        said = {"role": "assistant", "content": in_order(**prompt.secret)}
        return (said | {"reasoning_content": insertions(**prompt.secret)} if prompt.thinking else said,)

    def score(self, trace: Trace) -> dict[str, float]:
        return {REWARD: float(trace.final == in_order(**trace.prompt.secret))}

    def _make(self, random: Random) -> tuple[list[Any], bool] | None:
        length = random.randint(2, self.length) if self.varied else self.length
        items: list[Any] = random.sample(range(self.below) if self.items == "numbers" else WORDS, length)
        down = self.order == "down" or (self.order == "both" and random.random() < 0.5)
        return (items, down) if items != sorted(items, reverse=down) else None  # a copy is never the answer


def in_order(items: list[Any], down: bool) -> str:
    """The answer."""
    return " ".join(map(str, sorted(items, reverse=down)))


def insertions(items: list[Any], down: bool) -> str:
    """The thought: what is sorted so far, a line for each item after the first."""
    done, lines = [items[0]], []
    for item in items[1:]:
        insort(done, item)
        lines.append(in_order(done, down))
    return "\n".join(lines)
