"""RULER's needles in a haystack: eight of its thirteen tasks.

    Some secret numbers are hidden in the text below. Remember them: you will be asked for them afterwards.
    The wind is soft. … One of the secret numbers for misty-lantern is: 4073172. … So one day follows the other.
    Which secret numbers does the text above give for misty-lantern? The secret numbers … are

`haystack` is `noise` (five sentences again and again), `essay` (the text of `path`, or one made up), or `needle`: every
line gives a value of another key. Where one value is asked for, all is said in the singular.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal
from uuid import UUID

from pydantic import Field, model_validator

from trimaran.errors import Refusal
from trimaran.tasks.ruler import Ruler
from trimaran.tasks.ruler_haystack import DEPTHS, among, made_up, noise, own_words, with_needles
from trimaran.tasks.ruler_lexicon import keys

Kind = Literal["words", "numbers", "uuids"]
MANY = (
    "Some secret {kinds} are hidden in the text below. Remember them: you will be asked for them afterwards.\n"
    "{context}\nWhich secret {kinds} does the text above give for {query}? The secret {kinds} for {query} are"
)
ONE = (
    "A secret {kind} is hidden in the text below. Remember it: you will be asked for it afterwards.\n"
    "{context}\nWhich secret {kind} does the text above give for {query}? The secret {kind} for {query} is"
)
NEEDLE = "One of the secret {kinds} for {key} is: {value}."
STEP = 10  # words of an essay in one unit


class Niah(Ruler):
    """`keys` keys with `values` values each, of which `queries` keys are asked for (so many keys at least)."""

    name: ClassVar[str] = "ruler_niah"
    answer_tokens: ClassVar[int] = 128
    haystack: Literal["noise", "essay", "needle"] = "noise"
    path: Path | None = None  # the essay: a text file, or a folder of them
    key_kind: Kind = "words"
    value_kind: Kind = "numbers"
    keys: int = Field(1, ge=1)
    values: int = Field(1, ge=1)
    queries: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _path_of_an_essay(self) -> "Niah":
        if self.path is not None and self.haystack != "essay":
            found = f"path = {str(self.path)!r} with haystack = {self.haystack!r}"
            raise Refusal(found, "a path with haystack = 'essay'", "leave path out, or ask for the essay")
        return self

    @property
    def made_of(self) -> str:
        if self.haystack == "essay":
            return str(self.path) if self.path else "made-up sentences (no path was given)"
        return {"noise": "five sentences repeated", "needle": "other needles"}[self.haystack]

    def draw(self, random: Random) -> dict[str, Any]:
        count = max(self.keys, self.queries)
        names = many(random, self.key_kind, count)
        values = many(random, self.value_kind, count * self.values)
        pairs = [(name, values[place * self.values : (place + 1) * self.values]) for place, name in enumerate(names)]
        asked = random.sample(names, self.queries)
        return {"pairs": pairs, "asked": asked, "seed": random.getrandbits(48)}

    def identity(self, drawn: Mapping[str, Any]) -> str:
        return f"needles {sorted(drawn['pairs'])}"

    def least(self, drawn: Mapping[str, Any]) -> int:
        return max(1, len(drawn["pairs"]) * self.values)

    def text(self, drawn: Mapping[str, Any], units: int) -> str:
        kinds = self.value_kind
        needles = [
            NEEDLE.format(kinds=kinds, key=key, value=value) for key, values in drawn["pairs"] for value in values
        ]
        random = Random(drawn["seed"])
        random.shuffle(needles)
        context = self.hidden(needles, random, drawn, units)
        one = self.queries * self.values == 1
        return (ONE if one else MANY).format(
            kinds=kinds, kind=kinds.removesuffix("s"), context=context, query=listed(drawn["asked"])
        )

    def hidden(self, needles: list[str], random: Random, drawn: Mapping[str, Any], units: int) -> str:
        """The needles in a haystack of so many lines, or tens of words."""
        if self.haystack == "essay":
            depths = sorted(random.sample(DEPTHS, len(needles))) if len(needles) <= len(DEPTHS) else spread(needles)
            words = own_words(self.path, STEP * units) if self.path else made_up(drawn["seed"], STEP * units)
            return with_needles(words, needles, depths)
        lines = noise(units) if self.haystack == "noise" else self.others(random, drawn, units)
        return "\n".join(among(lines, needles, random))

    def others(self, random: Random, drawn: Mapping[str, Any], units: int) -> list[str]:
        """Needles of other keys."""
        taken = {key for key, _ in drawn["pairs"]}
        names = many(random, self.key_kind, units, taken)
        known = {value for _, values in drawn["pairs"] for value in values}
        values = many(random, self.value_kind, units, known)
        return [NEEDLE.format(kinds=self.value_kind, key=key, value=value) for key, value in zip(names, values)]

    def specimen(self) -> list[str]:
        return many(Random(0), self.value_kind, self.queries * self.values)

    def answers(self, secret: Mapping[str, Any]) -> list[str]:
        given = dict(secret["pairs"])
        return [value for key in secret["asked"] for value in given[key]]


def many(random: Random, kind: Kind, count: int, taken: set[str] | None = None) -> list[str]:
    """`count` different keys or values of a kind, none of `taken`."""
    if kind == "words":
        return keys(random, count, taken)
    found: dict[str, None] = {}
    while len(found) < count:
        number = random.randint(10**6, 10**7 - 1) if kind == "numbers" else None
        one = str(number or UUID(int=random.getrandbits(128), version=4))
        if taken is None or one not in taken:
            found[one] = None
    return list(found)


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"


def spread(needles: Sequence[str]) -> list[int]:
    """Depths of more needles than the grid has places."""
    return [100 * place // len(needles) for place in range(len(needles))]
