"""L0-Bench: execute a small program in one's head and write down every step (arXiv 2503.22832).

No step is hard, so what is measured is whether a model stays right over many. Programs come from `l0_grammar`, traces
from `l0_trace`, marks from `l0_grade`; nothing that was generated is ever run. A program is held out by its text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from trimaran.errors import Refusal
from trimaran.tasks import l0_wording
from trimaran.tasks.draw import digest, drawn, split_of
from trimaran.tasks.l0_grade import right_steps
from trimaran.tasks.l0_grammar import FIXED, LISTS_IN, SHORTEST_LOOP, Program, Shape, inputs, program
from trimaran.tasks.l0_trace import Crashed, Value, trace_of
from trimaran.tasks.task import REWARD, Message, Prompt, Split, Task, Trace

BINS = (13, 80, 164, 246)  # mean steps of the published baseline set's four bins
LONGEST = 500  # steps of a trace where no number is asked for
TRIED, SOUND = 8, 4  # further inputs that a program is tried on, and how many of them it must take
TRIES = 200  # inputs drawn for each demonstration


@dataclass(frozen=True)
class Call:
    """One execution. inputs: the arguments; trace: its steps, a line each."""

    inputs: dict[str, Value]
    trace: tuple[str, ...]

    @property
    def written(self) -> str:
        return f"function({', '.join(f'{name}={value}' for name, value in self.inputs.items())})"


class L0(Task):
    """Write the trace of a program. The reward is 1 for a trace that is right to its last step, else 0;
    `steps_to_error` counts the right steps before the first wrong one, `right` is their share, `steps` how many there
    are to write. What an answer that was cut off has said counts.

    steps: length of the trace, up to `spread` of it more or less (2 steps at least); None: any up to 500.
    demonstrations: executions shown; 0: zero-shot, in one of three wordings. of: whose they are: the same program's,
    other programs' (`other`), or the same one's while it is not shown itself (`hidden`). lines, depth, lists, numbers,
    loop: of the programs, as in `l0_grammar.Shape`.
    """

    name: ClassVar[str] = "l0"
    steps: int | None = Field(80, ge=5, le=2000)
    spread: float = Field(0.15, ge=0, lt=1)
    demonstrations: int = Field(4, ge=0, le=64)
    of: Literal["same", "other", "hidden"] = "same"
    wording: int = Field(1, ge=1, le=3)
    lines: tuple[int, int] = (10, 50)
    depth: int = Field(1, ge=0, le=4)
    lists: tuple[int, int] = (5, 10)
    numbers: int = Field(10, ge=2, le=100)
    loop: int = Field(100, gt=SHORTEST_LOOP, le=1000)
    thinking: bool = True

    @model_validator(mode="after")
    def _can_be_met(self) -> "L0":
        low, high = self.lines
        if not 2 <= low < high - 1 <= 149:
            found = f"lines = {[low, high]}"
            raise Refusal(found, "two numbers, 2 to 150, with a whole one between them", "such as lines = [10, 50]")
        if not 1 <= self.lists[0] <= self.lists[1] <= 1000:
            raise Refusal(f"lists = {list(self.lists)}", "two lengths, 1 to 1000, the smaller first", "swap or lower")
        if self.demonstrations == 0 and self.of != "same":
            raise Refusal(f"of = {self.of!r} without demonstrations", "demonstrations = 1 to 64", "ask for some")
        if self.demonstrations and self.wording != 1:
            allowed = "wording = 1, or demonstrations = 0"
            raise Refusal(f"wording = {self.wording} with demonstrations", allowed, "the three are for zero-shot")
        fewest = int(FIXED * low) + 2  # each statement has a step, and so has the return
        if self.steps is not None and self.reach[1] < fewest:
            found = f"steps = {self.steps} with more than {low} lines"
            raise Refusal(found, f"at least {fewest} steps", "raise steps, or ask for fewer lines")
        if self.steps is not None and self.depth == 0 and self.reach[0] > high - 2:
            found = f"steps = {self.steps} with depth = 0 and fewer than {high} lines"
            raise Refusal(found, f"up to {high - 2} steps without loops", "allow more lines, or depth = 1")
        return self

    @property
    def shape(self) -> Shape:
        return Shape(self.lines, self.depth, self.lists, self.numbers, self.loop)

    @property
    def reach(self) -> tuple[int, int]:
        """The fewest and the most steps of a trace."""
        if self.steps is None:
            return 1, LONGEST
        room = max(2, int(self.spread * self.steps))
        return max(1, self.steps - room), self.steps + room

    def prompt(self, number: int, split: Split = "train") -> Prompt:
        """Raises Refusal where programs as asked for are too rare to be found."""
        made, call = self._drawn(number, split)
        others = self._others(number) if self.of == "other" else self._calls(made, call)
        shown = [next(others) for _ in range(self.demonstrations)]
        text = l0_wording.question(
            made.numbered if self.of != "hidden" else None,
            call.written,
            [(other.numbered if self.of == "other" else None, one.written, one.trace) for other, one in shown],
            self.wording,
        )
        secret = {"source": made.source, "inputs": call.inputs, "trace": list(call.trace)}
        messages = ({"role": "user", "content": text},)
        return Prompt(self.name, split, number, messages, secret=secret, thinking=self.thinking)

    def gold(self, prompt: Prompt) -> tuple[Message, ...]:
        said = {"role": "assistant", "content": l0_wording.fenced(prompt.secret["trace"])}
        return (said | {"reasoning_content": l0_wording.THOUGHT} if prompt.thinking else said,)

    def score(self, trace: Trace) -> dict[str, float]:
        expected = trace.prompt.secret["trace"]
        right = right_steps(trace.answer, expected)
        return {
            REWARD: float(right == len(expected)),
            "steps_to_error": float(right),
            "right": right / len(expected),
            "steps": float(len(expected)),
        }

    def _drawn(self, number: int, split: Split) -> tuple[Program, Call]:
        try:
            return drawn(
                self.name, number, split, lambda random: self._make(random, split), lambda made: made[0].source
            )
        except Refusal as rare:
            axes = f"steps = {self.steps}, lines = {list(self.lines)}, depth = {self.depth}, loop = {self.loop}"
            allowed = "settings that programs meet now and then"
            raise Refusal(f"{rare.found} has {axes}", allowed, "raise spread, depth or loop, or move lines") from None

    def _make(self, random: Random, split: Split) -> tuple[Program, Call] | None:
        made = program(random, self.shape)
        # The split is asked before anything is traced: of five programs four are not held out.
        if made is None or split_of(made.source) != split or not set(made.parameters) & set(LISTS_IN):
            return None
        least, most = self.reach
        call = called(made, inputs(random, made.parameters, self.shape), most)
        if call is None or len(call.trace) < least:
            return None
        # Whether a program can be demonstrated must not depend on how often: the same problems for any number.
        tried = [called(made, inputs(random, made.parameters, self.shape), 2 * most) for _ in range(TRIED)]
        return (made, call) if sum(one is not None for one in tried) >= SOUND else None

    def _calls(self, made: Program, call: Call) -> Iterator[tuple[Program, Call]]:
        """Other executions of the same program, no inputs twice."""
        random, seen = Random(digest(f"{made.source} {call.inputs}")), [call.inputs]
        for _ in range(TRIES * (self.demonstrations + 1)):
            other = called(made, inputs(random, made.parameters, self.shape), 2 * self.reach[1])
            if other is not None and other.inputs not in seen:
                seen.append(other.inputs)
                yield made, other
        found = f"{len(seen) - 1} inputs that differ, for {self.demonstrations} demonstrations"
        raise Refusal(found, "programs with so many", "raise numbers or lists, or lower demonstrations")

    def _others(self, number: int) -> Iterator[tuple[Program, Call]]:
        """Executions of other programs, of the training split alone: no held-out one is ever shown."""
        for place in range(self.demonstrations):
            yield self._drawn(-1 - (number * 64 + place), "train")


def called(made: Program, values: dict[str, Value], limit: int) -> Call | None:
    """One execution; None where it crashes or takes more than `limit` steps."""
    try:
        steps = trace_of(made.source, values, limit)
    except Crashed:
        return None
    return None if steps is None else Call(values, tuple(map(str, steps)))


def thresholds(fewest_lines: int, most_steps: int, bins: int) -> list[float]:
    """Where the published sampling parts traces into `bins` by their length: bins - 1 steps, evenly from 1.5 times the
    fewest lines to 0.8 times the most steps. Raises Refusal for fewer than two bins."""
    if bins < 2:
        raise Refusal(f"bins = {bins}", "2 or more", "ask for at least two bins")
    low, high = 1.5 * fewest_lines, 0.8 * most_steps
    return [low + (high - low) * place / max(1, bins - 2) for place in range(bins - 1)]
