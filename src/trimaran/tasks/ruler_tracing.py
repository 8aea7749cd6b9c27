"""RULER's variable tracking: a chain of assignments, in order, at random lines of a long text.

    VAR QWERT = 40731        … VAR ZUIOP = VAR QWERT …        which variables have the value 40731?

An example with its answer, of at most `EXAMPLE` tokens, comes first; its names and its value are the problem's own.
"""

from collections.abc import Mapping
from random import Random
from string import ascii_uppercase
from typing import Any, ClassVar

from pydantic import Field

from trimaran.tasks.ruler import Ruler
from trimaran.tasks.ruler_fit import largest
from trimaran.tasks.ruler_haystack import among, noise
from trimaran.tasks.task import Split

EXAMPLE = 500
RARE = "QXZJV"  # five letters that no tokenizer joins
QUESTION = (
    "Variables are assigned in the text below, here and there. Remember what is assigned to what.\n\n{context}\n"
    "Question: which variables have the value {value}, by all assignments of the text above? "
    "Answer: by the assignments of the text above, {count} variables have the value {value}. They are:"
)


class Tracing(Ruler):
    """`chains` chains of `hops` + 1 variables each; the first chain's are asked for."""

    name: ClassVar[str] = "ruler_tracing"
    answer_tokens: ClassVar[int] = 30
    chains: int = Field(1, ge=1)
    hops: int = Field(4, ge=1)

    @property
    def made_of(self) -> str:
        return "five sentences repeated"

    def draw(self, random: Random) -> dict[str, Any]:
        chains = chained(random, self.chains, self.hops, 5)
        example = chained(random, 1, self.hops, 3)
        return {"chains": chains, "example": example, "seed": random.getrandbits(48)}

    def identity(self, drawn: Mapping[str, Any]) -> str:
        return f"chains {sorted(drawn['chains'])}"

    def drawn(self, number: int, split: Split) -> dict[str, Any]:
        """With the example's lines, as many as its tokens allow."""
        secret = super().drawn(number, split)
        [[_, names]], seed = secret["example"], secret["seed"]
        budget = EXAMPLE - self.counter.tokens(answer_of(names))

        def tokens(units: int) -> int:
            return self.counter.tokens(posed(secret["example"], seed, units))

        return {**secret, "example_units": largest(tokens, budget, len(names))}

    def least(self, drawn: Mapping[str, Any]) -> int:
        return len(drawn["chains"]) * (self.hops + 1)

    def text(self, drawn: Mapping[str, Any], units: int) -> str:
        [[_, names]], seed = drawn["example"], drawn["seed"]
        shown = posed(drawn["example"], seed, drawn["example_units"]) + answer_of(names)
        return f"{shown}\n\n{posed(drawn['chains'], seed, units)}"

    def specimen(self) -> list[str]:
        return [RARE] * (self.hops + 1)

    def answers(self, secret: Mapping[str, Any]) -> list[str]:
        return list(secret["chains"][0][1])


def answer_of(names: list[str]) -> str:
    return " " + ", ".join(names)


def chained(random: Random, chains: int, hops: int, letters: int) -> list[list[Any]]:
    """[value, names in order] per chain; no two names or values are the same."""
    names: dict[str, None] = {}
    while len(names) < chains * (hops + 1):
        names["".join(random.choices(ascii_uppercase, k=letters))] = None
    every, size, values = list(names), hops + 1, random.sample(range(10_000, 99_999), chains)
    return [[str(value), every[place * size : (place + 1) * size]] for place, value in enumerate(values)]


def posed(chains: list[list[Any]], seed: int, units: int) -> str:
    """A question on the first of some chains, hidden in so many lines of noise."""
    random, lines = Random(seed), noise(units)
    for value, names in chains:
        sources = [value, *(f"VAR {name}" for name in names[:-1])]
        lines = among(lines, [f"VAR {name} = {source}" for name, source in zip(names, sources)], random)
    value, names = chains[0]
    return QUESTION.format(context="\n".join(lines), value=value, count=len(names))
