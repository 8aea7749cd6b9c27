"""How far a long piece of work has come, and how fast: the live line."""

import bisect
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Self, TextIO

from trimaran.errors import Refusal
from trimaran.report.curve import curve_png, curve_terminal
from trimaran.report.environment import cpu_seconds, memory_in_use
from trimaran.report.metrics import Metrics, series
from trimaran.report.terminal import (
    CLEAR,
    bar,
    colourful,
    hours,
    is_terminal,
    put,
    say,
    short,
    size_text,
    terminal_columns,
)

LEADING = ("apart", "reward")  # what a stage works on, where that is not the loss: the first that it reports is shown


class Pace:
    """How fast it goes. The ETA rests on the latter half of what has run in this process: warm-up is forgotten, pauses
    (validation, checkpoints) count in their true share, and a machine that slows down is noticed.
    """

    def __init__(self, step: int, clock: Callable[[], float]):
        self._clock = clock
        self.began = clock()
        self._samples: list[tuple[int, float]] = [(step, self.began)]
        self._recent: deque[tuple[float, int]] = deque([(self.began, 0)], maxlen=21)
        self.tokens = 0

    def add(self, step: int, tokens: int) -> None:
        now = self._clock()
        self.tokens += tokens
        self._recent.append((now, self.tokens))
        self._samples.append((step, now))
        if len(self._samples) > 1024:
            self._samples = self._samples[::2] + self._samples[-1:]

    @property
    def tokens_per_second(self) -> float:
        """Over the last twenty updates."""
        (then, before), (now, after) = self._recent[0], self._recent[-1]
        return (after - before) / (now - then) if now > then else 0.0

    def seconds_left(self, total: int) -> float | None:
        """None until there is anything to judge by."""
        step, now = self._samples[-1]
        half = bisect.bisect_left(self._samples, ((self._samples[0][0] + step) / 2, 0.0))
        warm = 1 if len(self._samples) > 2 else 0  # the first step compiles, allocates, touches the files
        then_step, then = self._samples[max(warm, min(half, len(self._samples) - 2))]
        return (now - then) / (step - then_step) * max(0, total - step) if step > then_step else None


class Progress:
    """Step after step on one live line (on a terminal) or on a plain line every few seconds (anywhere else).

    `start` is the step already done when a run is resumed. Losses are plain floats: reading them off a device is the
    caller's choice, so that nothing waits for the device unseen. `clock` counts seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        label: str = "train",
        metrics: str | os.PathLike[str] | None = None,
        stream: TextIO | None = None,
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.label = total, label
        self._stream: TextIO | None = sys.stderr if stream is None else stream
        self._live = is_terminal(self._stream)
        self._colour = colourful(self._stream)
        self._every_s = 0.1 if self._live else every_s
        self._clock, self._pace, self._cpu = clock, Pace(start, clock), cpu_seconds()
        self._line, self._shown_at, self._first, self._step = "", -math.inf, start, start
        self._lead: tuple[str, float] | None = None  # the newest, since not every step has one
        self._metrics = None if metrics is None else Metrics(metrics, start, self.say)
        self._before = self._metrics.last if self._metrics else {}

    def update(
        self, step: int, *, tokens: int = 0, loss: float | None = None, lr: float | None = None, **extra: Any
    ) -> None:
        """Reports that `step` is done, with the `tokens` it took. `extra` goes to the metrics; of it, the first of
        `LEADING` is shown before the loss."""
        self._pace.add(step, tokens)
        self._step = step
        self._lead = next(((name, float(extra[name])) for name in LEADING if name in extra), self._lead)
        values = {"loss": loss, "lr": lr, "tokens": self._before.get("tokens", 0) + self._pace.tokens}
        rate = round(self._pace.tokens_per_second, 1)
        self.log(step, **{k: v for k, v in values.items() if v is not None}, tokens_per_second=rate, **extra)
        now = self._clock()
        if step >= self.total or now - self._shown_at >= self._every_s:
            self._shown_at = now
            self._show(loss, lr)

    def log(self, step: int, **values: Any) -> None:
        """Writes a record to the metrics; wall and process CPU seconds of the whole run so far stand beside it."""
        if self._metrics is None:
            return
        wall = self._before.get("wall_s", 0.0) + self._clock() - self._pace.began
        cpu = self._before.get("cpu_s", 0.0) + cpu_seconds() - self._cpu
        memory = memory_in_use()[1]
        self._metrics.write(step=step, **values, wall_s=round(wall, 3), cpu_s=round(cpu, 3), memory_bytes=memory)

    def say(self, text: str = "") -> None:
        """Prints a line on stdout, above the live one."""
        if self._line:
            self._put(CLEAR)
        say(text)
        if self._line:
            self._put(self._line)

    def curves(self, png: str | os.PathLike[str] | None = None, **columns: str) -> None:
        """Draws columns of the metrics in the terminal and, if asked, as PNG: curves(path, train="loss")."""
        found = series(self._metrics.path, **columns) if self._metrics else {}
        if not found:
            return
        self.say(curve_terminal(found, colour=colourful(sys.stdout)))
        if png is not None:
            try:
                curve_png(png, found)
            except Refusal as problem:
                self.say(f"warning: {problem.found}; the curve is not saved")

    def close(self) -> None:
        """Ends the live line and says how long it took, in wall time and in CPU time."""
        if self._line:
            self._put("\n")
            self._line = ""
        if self._step > self._first:
            wall, cpu = self._clock() - self._pace.began, cpu_seconds() - self._cpu
            tokens = f", {short(self._pace.tokens)} tokens" if self._pace.tokens else ""
            steps = f"{self._step - self._first} steps"
            self._put(f"{self.label}  {steps}{tokens} in {hours(wall)} ({hours(cpu)} of CPU time)\n")
            self._first = self._step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self, loss: float | None, lr: float | None) -> None:
        columns = terminal_columns(self._stream) if self._live else 120
        parts = self._parts(loss, lr)
        while len(parts) > 3 and sum(len(text) + 2 for _, text in parts) > columns - 1:
            parts.remove(max(parts))  # the least needed goes first
        room = columns - 1 - sum(len(text) + 2 for _, text in parts)
        texts = [text for _, text in parts]
        if self._live and room >= 8:
            texts.insert(2, bar(self._step / max(1, self.total), min(24, room - 2), self._colour))
        line = "  ".join(texts)[: None if room >= 0 else columns - 1]
        if self._live:
            self._line = line
            self._put(CLEAR + line)
        else:
            self._put(line + "\n")

    def _parts(self, loss: float | None, lr: float | None) -> list[tuple[int, str]]:
        """The pieces of the line, each with its rank: on a narrow terminal the highest ranks are left out."""
        width = len(str(self.total))
        left = self._pace.seconds_left(self.total)
        rate, (where, memory) = self._pace.tokens_per_second, memory_in_use()
        parts = [(0, self.label), (1, f"{self._step:>{width}}/{self.total}  {self._step / max(1, self.total):4.0%}")]
        if self._lead is not None:
            parts.append((2, "{} {:.3f}".format(*self._lead)))
        if loss is not None:
            parts.append((2 if self._lead is None else 7, f"loss {loss:.4g}" if loss >= 1000 else f"loss {loss:.3f}"))
        if lr is not None:
            parts.append((6, f"lr {lr:.1e}"))
        if rate:
            parts.append((4, f"{short(rate):>5} tok/s"))
        parts.append((5, f"{where}{size_text(memory)}"))
        if self._step >= self.total:
            parts.append((3, hours(self._clock() - self._pace.began)))
        else:
            parts.append((3, f"{'-' if left is None else hours(left)} left"))
        return parts

    def _put(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            put(self._stream, text)
        except (OSError, ValueError):  # the terminal has gone away, or the stream was closed: training goes on
            self._stream = None


class Silence:
    """What stands in for `Progress` in a process whose work another one reports."""

    def update(self, step: int, **values: Any) -> None:
        """Nothing."""

    def say(self, text: str = "") -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing."""
