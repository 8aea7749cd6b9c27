"""RULER (Hsieh et al. 2024, arXiv 2404.06654): thirteen problems of any length that tell how much context a model uses.

    niah      sentences that give secret values, hidden in a long text, and a question for some of them
    tracing   a chain of variables through a long text: which of them have this value?
    common    the ten words that a long list has most often
    frequent  the three words that a long coded text has most often
    qa        a question that one or two of many documents answer

`PUBLISHED` has the thirteen settings of the paper. A problem is as long as its token budget lets it be: the
message, the chat template round it and the tokens kept for the answer are within `length`, and with one unit more they
would not be. The parts of each prompt are those of the paper in their order, in words of our own: what is asked, the
text, the question, and the beginning of the answer, with which the message ends.

The score is the paper's: how many of the expected strings are in the answer, upper and lower case alike; for `qa`
whether any is. Only as many tokens of an answer are read as were kept for it (`answer_tokens`, the published number, or
more where a perfect answer needs them), so nothing is won by repeating the text.
"""

import re
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from pydantic import Field, field_serializer

from trimaran import config
from trimaran.errors import Refusal
from trimaran.tasks.draw import drawn
from trimaran.tasks.ruler_fit import Ruled, largest, ruled
from trimaran.tasks.task import REWARD, Message, Prompt, Split, Task, Trace

CONTROL = re.compile(r"[\x00-\x1f]")
SHORT = 4096  # below this length the paper's lists are smaller

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "niah_single_1": ("niah", {"haystack": "noise"}),
    "niah_single_2": ("niah", {"haystack": "essay"}),
    "niah_single_3": ("niah", {"haystack": "essay", "value_kind": "uuids"}),
    "niah_multikey_1": ("niah", {"haystack": "essay", "keys": 4}),
    "niah_multikey_2": ("niah", {"haystack": "needle"}),
    "niah_multikey_3": ("niah", {"haystack": "needle", "key_kind": "uuids", "value_kind": "uuids"}),
    "niah_multivalue": ("niah", {"haystack": "essay", "values": 4}),
    "niah_multiquery": ("niah", {"haystack": "essay", "keys": 4, "queries": 4}),
    "vt": ("tracing", {"chains": 1, "hops": 4}),
    "cwe": ("common", {}),
    "fwe": ("frequent", {"alpha": 2.0}),
    "qa_1": ("qa", {"form": "squad"}),
    "qa_2": ("qa", {"form": "hotpot"}),
}
FAMILIES: dict[str, str] = {
    "niah": "trimaran.tasks.ruler_niah:Niah",
    "tracing": "trimaran.tasks.ruler_tracing:Tracing",
    "common": "trimaran.tasks.ruler_words:Common",
    "frequent": "trimaran.tasks.ruler_words:Frequent",
    "qa": "trimaran.tasks.ruler_qa:Qa",
}


class Ruler(Task):
    """What the five families share. Subclasses write `draw`, `identity`, `answers`, `text`, `least` and `most`.

    length: tokens of prompt and answer together. tokenizer: the folder whose tokenizer counts them and whose chat
    template is reckoned with; None: words and signs are counted. Raises Refusal, at the first problem, for a length
    that the smallest problem does not fit.
    """

    answer_tokens: ClassVar[int]  # as published
    every: ClassVar[bool] = True  # all expected strings count, each its share; else any one of them is enough
    length: int = Field(SHORT, ge=1)
    tokenizer: Path | None = None

    @field_serializer("tokenizer", when_used="json-unless-none")
    def _told(self, folder: Path) -> str:
        """What its tokens depend on, wherever it lies: two folders of one tokenizer pose the same problems."""
        counter = ruled(folder)
        return f"{counter.tokenizer.digest[:16]}+{counter.overhead}" if counter.tokenizer else str(folder)

    @abstractmethod
    def draw(self, random: Random) -> dict[str, Any]:
        """What a problem asks for, whatever its length."""

    @abstractmethod
    def identity(self, drawn: Mapping[str, Any]) -> str:
        """What makes two problems the same one."""

    @abstractmethod
    def text(self, drawn: Mapping[str, Any], units: int) -> str:
        """The message with a haystack of so many units."""

    @abstractmethod
    def least(self, drawn: Mapping[str, Any]) -> int:
        """Units of the smallest problem."""

    def most(self, drawn: Mapping[str, Any]) -> int | None:
        """Units that there are; None: no end of them."""
        return None

    @property
    def made_of(self) -> str:
        """Where the haystack is from, for the results."""
        return "generated"

    @cached_property
    def counter(self) -> Ruled:
        return ruled(self.tokenizer)

    def specimen(self) -> list[str]:
        """Strings that take about as many tokens as an answer of this task ever does; none: the published number
        is enough whatever the tokenizer."""
        return []

    @cached_property
    def kept(self) -> int:
        """Tokens kept for an answer: the published number, or more where few merges or many values need more."""
        said = ", ".join(self.specimen())
        return max(self.answer_tokens, self.counter.tokens(said)) if said else self.answer_tokens

    @property
    def budget(self) -> int:
        """Tokens that a message may have."""
        return self.length - self.counter.overhead - self.kept

    def prompt(self, number: int, split: Split = "train") -> Prompt:
        secret = self.drawn(number, split)
        units = self.fit(secret, self.usual)
        messages = ({"role": "user", "content": self.text(secret, units)},)
        told = {**secret, "units": units, "made_of": self.made_of}
        return Prompt(self.name, split, number, messages, secret=told, thinking=False)

    @cached_property
    def usual(self) -> int:
        """Units of one problem, near which those of others are."""
        return self.fit(self.drawn(0, "train"), None)

    def drawn(self, number: int, split: Split) -> dict[str, Any]:
        """What problem `number` asks for."""
        return drawn(self.name, number, split, self.sayable, self.identity)

    def sayable(self, random: Random) -> dict[str, Any] | None:
        """What a problem asks for, if its perfect answer is no longer than the tokens kept."""
        secret = self.draw(random)
        if not self.specimen():
            return secret
        return secret if self.counter.tokens(", ".join(self.answers(secret))) <= self.kept else None

    def fit(self, secret: Mapping[str, Any], guess: int | None) -> int:
        """The most units that are within the budget; guess: about how many."""
        least, most = self.least(secret), self.most(secret)

        def tokens(units: int) -> int:
            return self.counter.tokens(self.text(secret, units))

        try:
            if most is None:
                return largest(tokens, self.budget, least, guess=guess)
            units = largest(tokens, self.budget, least, most, guess)
        except Refusal as problem:
            found, allowed = f"{self.name} at length {self.length}: {problem.found}", problem.allowed
            raise Refusal(found, allowed, problem.next_step) from None
        if units == most:
            found = f"{self.name} at length {self.length}: all {most} documents have but {tokens(units)} tokens"
            raise Refusal(found, f"documents for {self.budget} tokens", "give a smaller length, or a longer file")
        return units

    @abstractmethod
    def answers(self, secret: Mapping[str, Any]) -> list[str]:
        """The strings that are looked for."""

    def gold(self, prompt: Prompt) -> tuple[Message, ...]:
        found = self.answers(prompt.secret)
        return ({"role": "assistant", "content": ", ".join(found if self.every else found[:1])},)

    def score(self, trace: Trace) -> dict[str, float]:
        last = trace.messages[-1] if trace.messages else {}
        if last.get("role") != "assistant":
            return {REWARD: 0.0}
        said = self.counter.head(trace.answer, self.kept)
        return {REWARD: matched(said, self.answers(trace.prompt.secret), self.every)}


def matched(said: str, expected: list[str], every: bool) -> float:
    """The paper's score of one answer, 0 to 1: the share of `expected` that it contains, or whether it contains any."""
    plain = CONTROL.sub("\n", said.strip()).strip().lower()
    inside = [one.lower() in plain for one in expected]
    return sum(inside) / len(inside) if every else float(any(inside))


def published(name: str, length: int, tokenizer: Path | None = None, **own: Any) -> Ruler:
    """One of the thirteen at a length. own: fields that the family has and that the paper's settings leave open."""
    family, settings = config.named(name, PUBLISHED, "RULER task")
    kind: type[Ruler] = config.named(family, FAMILIES, "RULER family")
    return kind(**settings, length=length, tokenizer=tokenizer, **own)
