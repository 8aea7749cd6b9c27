"""How a trace is graded (L0-Bench, arXiv 2503.22832): line by line from the first `L2,`, up to the first wrong one.

Spaces do not count, and neither does what follows the last line that was asked for. Of a line that only decides, its
number is compared alone: `L10,` and `L10, cond_a:True` are the same step. All else is compared sign by sign.
"""

from collections.abc import Sequence

START = "L2,"


def cleaned(answer: str) -> str | None:
    """The answer from its first step on, without spaces and empty lines; None where there is no step. Two answers are
    one vote where these are equal."""
    start = answer.find(START)
    if start < 0:
        return None
    lines = ("".join(line.split()) for line in answer[start:].split("\n"))
    return "\n".join(line for line in lines if line)


def right_steps(answer: str, expected: Sequence[str]) -> int:
    """How many steps are right before the first that is not: len(expected) for the whole trace."""
    said = (cleaned(answer) or "").split("\n")
    right = [same(line, wanted) for line, wanted in zip(said, expected)]
    return right.index(False) if False in right else len(right)


def same(line: str, wanted: str) -> bool:
    """Whether a cleaned line is the step `wanted`."""
    return line.partition(",")[:2] == wanted.partition(",")[:2] if wanted.endswith(",") else line == wanted
