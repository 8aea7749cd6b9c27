"""Prompts from a file as a task, for what asks no score of an answer: healing a draft block, learning from a teacher.

    [environments.mine]
    task = "trimaran.rl.recorded:Recorded"
    settings = {path = "prompts.jsonl"}          # rows {"messages": [...]} or {"prompt": "..."}, "tools" beside them

An assistant's last message in a row is its answer and is left out. Every `held_out`-th row is kept for measuring.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from trimaran.data.messages import at, checked, listed, rows
from trimaran.errors import Refusal
from trimaran.tasks.task import REWARD, Message, Prompt, Split, Task, Trace
from trimaran.text.tools import Tools


class Recorded(Task):
    """The prompts of a JSONL file, in its order, over and over. Every answer scores 0."""

    name: ClassVar[str] = "recorded"
    path: Path
    held_out: int = Field(20, ge=2)

    @cached_property
    def rows(self) -> dict[Split, list[tuple[tuple[Message, ...], tuple[Any, ...]]]]:
        """(messages, tools) of every row, read whole and checked."""
        found = [self.row(row, place) for place, row in rows(self.path)]
        if len(found) < self.held_out:
            step = "give more prompts, or lower held_out"
            raise Refusal(f"{len(found)} prompts in {self.path}", f"at least held_out = {self.held_out}", step)
        kept = found[self.held_out - 1 :: self.held_out]
        return {"held_out": kept, "train": [one for n, one in enumerate(found, 1) if n % self.held_out]}

    @staticmethod
    def row(row: Any, place: str) -> tuple[tuple[Message, ...], tuple[Any, ...]]:
        """What a row asks. Raises Refusal, its place first, for one that asks nothing."""
        with at(place):
            tools = Tools(listed(row, "tools"))
            given = [{"role": "user", "content": row["prompt"]}] if "prompt" in row else listed(row, "messages")
            messages = [checked(message, tools) for message in given]
            if messages and messages[-1]["role"] == "assistant":
                messages.pop()
            if not messages:
                raise Refusal("a row that asks nothing", "'messages' or 'prompt'", "write what the model is asked")
        return tuple(messages), tuple(tools.definitions)

    def size(self, split: Split = "train") -> int:
        return len(self.rows[split])

    def prompt(self, number: int, split: Split = "train") -> Prompt:
        messages, tools = self.rows[split][number % self.size(split)]
        return Prompt(self.name, split, number, messages, tools)

    def gold(self, prompt: Prompt) -> tuple[Message, ...]:
        """None is known."""
        return ()

    def turn(self, prompt: Prompt, messages: Sequence[Message]) -> tuple[Message, ...]:
        return ()

    def score(self, trace: Trace) -> dict[str, float]:
        return {REWARD: 0.0}

    def check(self, problems: int = 32) -> None:
        """There is no score to trust; the rows must be readable."""
        assert self.rows
