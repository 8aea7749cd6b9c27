"""`trimaran score RUN l0`: L0-Bench (arXiv 2503.22832), by length of the trace and along its axes.

    trimaran score runs/sft l0 n=50 samples=15
    trimaran score runs/sft l0 'suites.l0.demonstrations=[1,2,4,8]' 'suites.l0.budgets=[256,1024]'

A row for each bin of trace lengths; for each axis asked for, rows at `at` steps that differ from the bins' task in that
alone. Three of the axes scale with the compute of a test: demonstrations (a longer prompt), votes (more samples, which
every row has) and budgets (a longer thought). Figures are in `l0_figures`, the picture in `l0_picture`.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from trimaran.errors import Refusal
from trimaran.evals.l0_figures import figures, table
from trimaran.evals.l0_picture import picture
from trimaran.evals.suites import Context, Report, Result, Row, Suite
from trimaran.tasks.l0 import BINS, L0
from trimaran.tasks.l0_wording import fenced
from trimaran.tasks.task import Task
from trimaran.text.tokenizer import Tokenizer

SLACK = 200  # tokens that an answer may have beyond its trace
THOUGHT = 20  # times as many for models that think
PROBED, MARGIN = 8, 1.5  # traces that are measured; how much longer than the longest of them another may be


class L0Bench(Suite):
    """bins: mean steps of each bin; task: settings of all rows. demonstrations, lines, depths, lists, budgets: the
    axes, values to try at `at` steps; budgets are tokens of the thought. votes: how many samples vote. thinking:
    whether answers may begin with a thought, which has room for 20 times the trace (the published bound). max_tokens:
    of each answer; None: told from the rows' traces by the folder's tokenizer.
    """

    name: ClassVar[str] = "l0"
    bins: tuple[int, ...] = Field(BINS, min_length=1)
    at: int = Field(BINS[1], ge=5)
    task: L0 = L0()
    demonstrations: tuple[int, ...] = ()
    lines: tuple[tuple[int, int], ...] = ()
    depths: tuple[int, ...] = ()
    lists: tuple[tuple[int, int], ...] = ()
    budgets: tuple[int, ...] = ()
    votes: tuple[int, ...] = (1, 5, 15, 31)
    thinking: bool = False
    max_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _budgets_are_of_thoughts(self) -> "L0Bench":
        if self.budgets and not self.thinking:
            raise Refusal("budgets without thinking", "thinking = true", "set suites.l0.thinking=true, or no budgets")
        if bad := [count for count in [*self.votes, *self.budgets] if count < 1]:
            raise Refusal(f"votes or budgets of {bad}", "numbers from 1", "leave them out")
        return self

    def axes(self) -> dict[str, list[tuple[Any, L0 | Refusal, dict[str, Any]]]]:
        """Axis -> its (value, task or why there is none, fields of the way of answering), the trace lengths first."""
        varied: dict[str, tuple[Any, ...]] = {
            "demonstrations": self.demonstrations,
            "lines": self.lines,
            "depth": self.depths,
            "lists": self.lists,
        }
        rows = {"steps": [(steps, self.variant(steps=steps), dict[str, Any]()) for steps in self.bins]}
        for field, values in varied.items():
            rows[field] = [(value, self.variant(**{field: value}), {}) for value in values]
        rows["budget"] = [(tokens, self.variant(), {"budget": tokens}) for tokens in self.budgets]
        return {axis: of_axis for axis, of_axis in rows.items() if of_axis}

    def variant(self, **changes: Any) -> L0 | Refusal:
        """The task at `at` steps with these changes, or why no program can be like that: one row's fault."""
        try:
            return self.task.replace(**{"steps": self.at, "thinking": self.thinking, **changes})
        except Refusal as fault:
            return fault

    def places(self) -> Iterator[tuple[str, Any, str, Row]]:
        """(axis, value, name of its row, the row). A point that several axes share is one row, the first one's."""
        known: list[tuple[str, Row]] = []
        for axis, points in self.axes().items():
            for value, task, play in points:
                row = Row(task, {"thinking": self.thinking, **play})
                same = [name for name, other in known if other == row]
                name = same[0] if same else f"{axis}-{written(value)}"
                known.append((name, row))
                yield axis, value, name, row

    def rows(self, context: Context) -> Mapping[str, Row]:
        """Raises Refusal for a folder without a tokenizer. A row whose programs cannot be drawn has no task."""
        tokenizer = None if self.max_tokens else tokenizer_of(context.folder)
        found = dict[str, Row]()
        for _, _, name, row in self.places():
            if name not in found:
                found[name] = row if isinstance(row.task, Refusal) else self.roomy(row, row.task, tokenizer)
        return found

    def roomy(self, row: Row, task: Task, tokenizer: Tokenizer | None) -> Row:
        """The row with the room that its answers need."""
        tokens = self.max_tokens
        if tokenizer is not None:
            try:
                tokens = longest(tokenizer, task) * (THOUGHT if self.thinking else 1) + SLACK
            except Refusal as fault:
                return Row(fault)
        return Row(task, {**row.play, "max_tokens": tokens})

    def report(self, context: Context, results: Mapping[str, Result]) -> Report:
        rows = {
            name: {**figures(one.records, self.votes), "failed": one.score.failed}
            for name, one in results.items()
            if one.score is not None
        }
        axes: dict[str, list[dict[str, Any]]] = {}
        for axis, value, name, _ in self.places():
            axes.setdefault(axis, []).append({"value": written(value), "row": name})
        faults = {name: str(one.fault) for name, one in results.items() if one.fault is not None}
        document = {"axes": axes, "at": self.at, "figures": rows, "faults": faults}
        lines = chain([table(axes, rows)], (f"{name}: {fault}" for name, fault in faults.items()))
        return Report(document, "\n".join(lines), picture(document) if rows else None)


def written(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def tokenizer_of(folder: str) -> Tokenizer:
    """Raises Refusal where there is none, as may be beside a model that a server holds."""
    if not (Path(folder) / "tokenizer.json").is_file():
        allowed = "a folder with a tokenizer, or suites.l0.max_tokens"
        raise Refusal(f"no tokenizer.json in {folder}", allowed, "say suites.l0.max_tokens=2000")
    return Tokenizer.load(folder)


def longest(tokenizer: Tokenizer, task: Task) -> int:
    """Tokens that a trace of the task may need. Lists grow, so now and then one may need more: `cut` tells."""
    traces = [task.prompt(number, "held_out").secret["trace"] for number in range(PROBED)]
    return int(MARGIN * max(len(tokenizer.encode(fenced(trace))) for trace in traces))
