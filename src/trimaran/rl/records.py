"""What a run leaves to be read: every rollout as a JSON line, and some of them as a page of text.

Both files are only ever appended to. Their lengths are part of the run's position, so a run that goes on from a
checkpoint cuts away what was written after it: nothing is there twice, nothing is missing.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimaran.disk import sync
from trimaran.errors import writing
from trimaran.rl.recipe import LogSettings
from trimaran.rl.rollout import Rollout
from trimaran.tasks.task import REWARD
from trimaran.text.tokenizer import Tokenizer

ROLLOUTS, TRANSCRIPTS = "rollouts.jsonl", "transcripts.md"


class Ledger:
    """A file that grows from a known length. What lies beyond it, of a run that was killed, is cut away first."""

    def __init__(self, path: Path):
        self.path, self.length = path, 0
        self.opened = False

    def append(self, text: str) -> None:
        data = text.encode("utf-8")
        with writing(self.path), open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            if not self.opened:
                file.truncate(self.length)
                self.opened = True
            file.seek(self.length)
            file.write(data)
        self.length += len(data)

    def state(self) -> int:
        """Its length, once all of it is on the disk."""
        if self.opened:
            sync(self.path)
        return self.length

    def load(self, length: int) -> None:
        self.length, self.opened = length, False
        if length or self.path.exists():
            with writing(self.path):
                os.truncate(self.path, length)


class Records:
    """The records of a run folder."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, settings: LogSettings):
        self.tokenizer, self.settings = tokenizer, settings
        self.rollouts, self.transcripts = Ledger(folder / ROLLOUTS), Ledger(folder / TRANSCRIPTS)

    def write(self, step: int, rollouts: Sequence[Rollout], advantages: Sequence[float | None]) -> None:
        """The batch that step `step` (from 1) learns from first; advantages: None where a rollout is left out."""
        pairs = list(zip(rollouts, advantages, strict=True))
        self.rollouts.append("".join(json.dumps(record(step, *pair)) + "\n" for pair in pairs))
        count = self.settings.transcripts
        if count and (step - 1) % self.settings.every == 0:
            # from all over the batch, and another sample of its group each time
            stride = max(1, len(pairs) // count)
            chosen = [
                pairs[min(place * stride + step % stride, len(pairs) - 1)] for place in range(min(count, len(pairs)))
            ]
            self.transcripts.append("".join(self.page(step, *pair) for pair in chosen))

    def page(self, step: int, one: Rollout, advantage: float | None) -> str:
        """A rollout for people: what the model read and said, control tokens included, and what it was worth."""
        worth = "left out" if advantage is None else f"advantage {advantage:+.3f}"
        scores = ", ".join(f"{name} {value:g}" for name, value in one.scores.items())
        title = f"## Step {step}: {one.environment}, prompt {one.number}, sample {one.sample}"
        text = one.error if one.error is not None else self.tokenizer.decode(one.ids)
        fenced = "\n".join(f"    {line}" for line in text.splitlines())
        return f"{title}\n\n{scores or 'failed'}; {worth}; ended by {one.finish}\n\n{fenced}\n\n"

    def state(self) -> dict[str, int]:
        return {ROLLOUTS: self.rollouts.state(), TRANSCRIPTS: self.transcripts.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.rollouts.load(state[ROLLOUTS])
        self.transcripts.load(state[TRANSCRIPTS])


def record(step: int, one: Rollout, advantage: float | None) -> dict[str, Any]:
    """A line of rollouts.jsonl; log-probabilities to the sixth place."""
    logprobs = [round(value, 6) for value in one.logprobs]
    return {"step": step, **one.plain(), "logprobs": logprobs, REWARD: one.reward, "advantage": advantage}
