"""The tags round what an assistant thinks and calls, and text that may yet become one."""

from collections.abc import Sequence

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"

WHITE = " \t\r\n"  # what may stand between tags


def unfinished(text: str, marks: Sequence[str]) -> int:
    """How many last characters of `text` are the beginning of one of `marks`."""
    longest = max((len(mark) - 1 for mark in marks), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0


def first_of(text: str, marks: Sequence[str]) -> tuple[int, str] | None:
    """(place, mark) of the mark that comes first in `text`."""
    return min(((place, mark) for mark in marks if (place := text.find(mark)) >= 0), default=None)
