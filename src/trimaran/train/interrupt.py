"""Ctrl-C and SIGTERM as a request: the step is finished and saved first. A second one stops at once."""

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ANSWER = b"\nfinishing this step and saving it; the same signal again stops at once\n"


class Interrupts:
    """While entered, the first signal is noted in `asked` (its number) and answered; the second acts as usual.

    answer: whether to say so. Of several processes each gets the signal, also from a launcher that ends them all
    because one has died; then no step will be finished.
    """

    def __init__(self, *, answer: bool = True) -> None:
        self.asked: int | None = None
        self.answer = answer
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere signals cannot be caught
            self.before = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        self.restore()
        if self.answer:
            with contextlib.suppress(OSError):  # nobody listens
                os.write(2, ANSWER)  # not print: the signal may have come in the middle of one

    def restore(self) -> None:
        while self.before:
            signal.signal(*self.before.popitem())

    def __exit__(self, kind: type | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()
