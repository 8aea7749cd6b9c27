"""RULER's counting of words: the most common of a list, and the most frequent of a text in code.

    common    1. lamp 2. river 3. lamp …      ten words stand there 30 times, all others 3 times
    frequent  ... tqmfra ... ... bedhjo …     the word of rank k stands there N / (k^alpha zeta(alpha)) times, rounded
                                              down; the first of them is dots, ranks 2 to 4 are asked for

Below a length of 4096 tokens the list is shorter: ten words 6 times, all others once, and so is its example.
"""

from collections import Counter
from collections.abc import Mapping
from itertools import takewhile
from math import ceil
from random import Random
from string import ascii_lowercase
from typing import Any, ClassVar

from pydantic import Field

from trimaran.tasks.ruler import SHORT, Ruler
from trimaran.tasks.ruler_lexicon import vocabulary

TOP, DOTS, LETTERS, ASKED = 10, "...", 6, 3
COMMON = (
    "The numbered list below has some words more often than others. Remember those that it has most often.\n{context}\n"
    "Question: which are the 10 most common words of the list above? "
    "Answer: the 10 words that the list above has most often are:"
)
FREQUENT = (
    "Read the coded text below and count how often it has each coded word. {context}\n"
    "Question: which are the three most frequent coded words of the text above? Leave out the dots '...', and explain "
    "nothing. Answer: the three coded words that the text above has most often are:"
)


class Common(Ruler):
    """Ten words `often` times, each other word `seldom` times; None: as published for the length."""

    name: ClassVar[str] = "ruler_common"
    answer_tokens: ClassVar[int] = 120
    often: int | None = Field(None, ge=2)
    seldom: int | None = Field(None, ge=1)

    @property
    def made_of(self) -> str:
        return "words of our own list"

    @property
    def times(self) -> tuple[int, int]:
        short = self.length < SHORT
        return self.often or (6 if short else 30), self.seldom or (1 if short else 3)

    def draw(self, random: Random) -> dict[str, Any]:
        return {"seed": random.getrandbits(48)}

    def identity(self, drawn: Mapping[str, Any]) -> str:
        return f"list {drawn['seed']}"

    def least(self, drawn: Mapping[str, Any]) -> int:
        return 1

    def text(self, drawn: Mapping[str, Any], units: int) -> str:
        short = self.length < SHORT
        top, others, times = example_of(drawn["seed"], short)
        example = COMMON.format(context=numbered(top, others, times, drawn["seed"])) + " " + enumerated(top)
        words = vocabulary(Random(drawn["seed"]), TOP + units)
        asked = COMMON.format(context=numbered(words[:TOP], words[TOP:], self.times, drawn["seed"] + 1))
        return f"{example}\n\n{asked}"

    def answers(self, secret: Mapping[str, Any]) -> list[str]:
        return vocabulary(Random(secret["seed"]), TOP + secret["units"])[:TOP]


def example_of(seed: int, short: bool) -> tuple[list[str], list[str], tuple[int, int]]:
    """The worked example: its ten words, the others, and how often it has them."""
    words = vocabulary(Random(~seed), 20 if short else 40)
    return words[:TOP], words[TOP:], ((3, 1) if short else (10, 3))


def numbered(top: list[str], others: list[str], times: tuple[int, int], seed: int) -> str:
    words = top * times[0] + others * times[1]
    Random(seed).shuffle(words)
    return enumerated(words)


def enumerated(words: list[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))


class Frequent(Ruler):
    """Coded words by Zipf's law of exponent `alpha`."""

    name: ClassVar[str] = "ruler_frequent"
    answer_tokens: ClassVar[int] = 50
    alpha: float = Field(2.0, gt=1, le=8)

    @property
    def made_of(self) -> str:
        return "coded words"

    def draw(self, random: Random) -> dict[str, Any]:
        return {"words": coded(random, ASKED), "seed": random.getrandbits(48)}

    def identity(self, drawn: Mapping[str, Any]) -> str:
        return f"coded {sorted(drawn['words'])}"

    def least(self, drawn: Mapping[str, Any]) -> int:
        """So many words that ranks 4 and 5 differ for good, and with them the answer from the rest.

        Rounded down, n a and n b differ for every n of 1 / (a - b) and more.
        """
        sure = ceil(zeta(self.alpha) / ((ASKED + 1) ** -self.alpha - (ASKED + 2) ** -self.alpha))
        ties = (units for units in range(sure, ASKED, -1) if not distinct(shares(units, self.alpha)))
        return next(ties, ASKED) + 1

    def text(self, drawn: Mapping[str, Any], units: int) -> str:
        random, counts = Random(drawn["seed"]), shares(units, self.alpha)
        others = coded(random, max(0, len(counts) - 1 - ASKED), set(drawn["words"]))
        names = [DOTS, *drawn["words"], *others]
        words = [name for name, count in zip(names, counts) for _ in range(count)]
        random.shuffle(words)
        return FREQUENT.format(context=" ".join(words))

    def answers(self, secret: Mapping[str, Any]) -> list[str]:
        return list(secret["words"])


def coded(random: Random, count: int, taken: set[str] | None = None) -> list[str]:
    """`count` different words of six letters, none of `taken`."""
    found: dict[str, None] = {}
    while len(found) < count:
        word = "".join(random.choices(ascii_lowercase, k=LETTERS))
        if word not in (taken or ()):
            found[word] = None
    return list(found)


def shares(units: int, alpha: float) -> list[int]:
    """How often each rank stands in a text of `units` words, as far as it stands there at all."""
    whole = zeta(alpha)
    counts = (int(units * rank**-alpha / whole) for rank in range(1, units + 1))
    return list(takewhile(bool, counts))


def zeta(alpha: float) -> float:
    """Riemann's zeta, by a hundred terms and the rest that Euler and Maclaurin's formula gives."""
    n = 100
    rest = n ** (1 - alpha) / (alpha - 1) - n**-alpha / 2 + alpha * n ** (-alpha - 1) / 12
    rest -= alpha * (alpha + 1) * (alpha + 2) * n ** (-alpha - 3) / 720
    return sum(rank**-alpha for rank in range(1, n + 1)) + rest


def distinct(counts: list[int]) -> bool:
    """Whether ranks 2 to 4 stand there more often than any after them."""
    return len(counts) > ASKED and Counter(counts[1 + ASKED :])[counts[ASKED]] == 0
