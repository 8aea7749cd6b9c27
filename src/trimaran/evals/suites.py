"""Benchmarks of several tasks: what one name on the command line expands into, and what all scores say together.

    trimaran score runs/text ruler --lengths 1k,2k          the suite's settings: suites.ruler.lengths=[1024,2048]
    trimaran score runs/text arithmetic,ruler               beside plain tasks

A suite is a class of settings. Its rows are tasks (contract 5) with their own way of answering; rows are scored one
after the other, each recorded as any task is. A row whose problems cannot be drawn, or do not fit the engine's memory,
is a fault that the results tell, and the rest run. Analyses are no tasks: they have a `main` of their own.
"""

import tomllib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trimaran import config
from trimaran.config import Settings
from trimaran.errors import Refusal
from trimaran.evals.tally import Record, Score
from trimaran.tasks.task import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUITES: dict[str, str] = {"l0": "trimaran.evals.l0:L0Bench", "ruler": "trimaran.evals.ruler:Ruler"}
ANALYSES: dict[str, str] = {"representation": "trimaran.evals.representation_run:main"}  # main(target, overrides, json)


@dataclass(frozen=True)
class Context:
    """Whom a suite is for: the model's folder, whose tokenizer counts, and the longest row in tokens that it was
    trained on, where its recipe says so."""

    folder: str
    trained: int | None = None


@dataclass(frozen=True)
class Row:
    """A task of a suite, or why there is none with these settings. play: fields of `ScoreSettings` that it has another
    value of than was asked for."""

    task: Task | Refusal
    play: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What became of a row: a score and the records of its episodes that did not fail, or the fault for which it has
    none."""

    score: Score | None
    records: Sequence[Record] = ()
    fault: Refusal | None = None


@dataclass(frozen=True)
class Report:
    """What a suite says of its rows: JSON values, lines for the terminal, a picture."""

    document: Mapping[str, Any]
    text: str
    picture: "Figure | None" = None


class Suite(Settings):
    """A benchmark. Its fields are its settings."""

    name: ClassVar[str]

    @abstractmethod
    def rows(self, context: Context) -> Mapping[str, Row]:
        """The tasks by name, in the order of the report."""

    @abstractmethod
    def report(self, context: Context, results: Mapping[str, Result]) -> Report:
        """What all rows say together."""


def suite(name: str, settings: Mapping[str, Any]) -> Suite:
    """The suite called `name` with `settings`. Raises Refusal for an unknown name and for settings it does not have."""
    found: type[Suite] = config.named(name, SUITES, "suite")
    return found(**dict(settings))


def context_of(folder: str) -> Context:
    """The context of a model's folder."""
    path = Path(folder) / "recipe.toml"
    tables = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    length = tables.get("data", {}).get("sequence_length")
    return Context(folder, length if isinstance(length, int) else None)


def lengths_of(words: str) -> list[int]:
    """Tokens from words such as "4k,8k,1M": k is 1024, M is 1024 k. Raises Refusal for anything else."""
    factors = {"k": 1 << 10, "M": 1 << 20}
    found = []
    for word in words.split(","):
        digits, factor = (word[:-1], factors[word[-1]]) if word[-1:] in factors else (word, 1)
        if not (digits.isascii() and digits.isdigit() and int(digits) > 0):
            raise Refusal(f"--lengths {words!r}: {word!r}", "numbers of tokens such as 4096, 4k, 1M", "correct it")
        found.append(int(digits) * factor)
    return found
