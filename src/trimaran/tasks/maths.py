r"""Questions with one mathematical answer, in \boxed{…}: from a JSONL of problems, compared by value.

Numbers are compared exactly, as fractions, by our own few lines. What is no number is compared as text, or by
math-verify (the extra `rl`) with `verifier = "math-verify"`.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from trimaran.errors import Refusal
from trimaran.tasks.jsonl import rows
from trimaran.tasks.task import REWARD, Message, Prompt, Split, Task, Trace

Verifier = Literal["exact", "math-verify"]

OPEN = "\\boxed{"
LONGEST = 300  # characters of an answer that are compared at all
NUMBER = re.compile(r"([-+]?)([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(\.[0-9]+)?")
FRACTION = re.compile(r"([-+]?)\\frac\{([0-9]{1,30})\}\{([0-9]{1,30})\}|([-+]?[0-9]{1,30})/([0-9]{1,30})")
DRESS = re.compile(r"\\[,;!]|\\ |\\left|\\right|\\?[$%]|(?<![0-9])\s+|\s+(?![0-9])")  # "1 2" is not 12
COSTLY = re.compile(
    r"[0-9]{13}|!|\*\*|\^[{\s]*[0-9]{3}|\^\s*\w\s*\^|\)\s*\^.*\)\s*\^|\\(?:binom|sum|prod|int|lim)(?![a-z])"
)

REQUEST = "\n\nPut the final answer in \\boxed{}."


class Maths(Task):
    """Problems of two JSONL files with a `problem` and an `answer` a line, and a `solution` where there is one.

    train, held_out: the files; a problem that stands in both is refused. verifier: how answers are compared that are no
    numbers. The last thing said must have one answer in a box; several boxes must agree.
    """

    name: ClassVar[str] = "maths"
    train: Path
    held_out: Path
    verifier: Verifier = "exact"
    thinking: bool = True

    def prompt(self, number: int, split: Split = "train") -> Prompt:
        problems = self._problems(split)
        problem = problems[number % len(problems)]
        messages = ({"role": "user", "content": problem["problem"] + REQUEST},)
        secret = {"answer": problem["answer"], "solution": problem["solution"]}
        return Prompt(self.name, split, number, messages, secret=secret, thinking=self.thinking)

    def size(self, split: Split = "train") -> int | None:
        return len(self._problems(split))

    def gold(self, prompt: Prompt) -> tuple[Message, ...]:
        solution, box = prompt.secret["solution"], f"{OPEN}{prompt.secret['answer']}}}"
        said = {"role": "assistant", "content": box}
        return (said | {"reasoning_content": solution} if prompt.thinking and solution else said,)

    def score(self, trace: Trace) -> dict[str, float]:
        """`reward`; `boxed`: there was one answer to read."""
        answer = boxed(trace.final or "")
        right = answer is not None and equal(trace.prompt.secret["answer"], answer, self.verifier)
        return {REWARD: float(right), "boxed": float(answer is not None)}

    def _problems(self, split: Split) -> tuple[Mapping[str, str], ...]:
        return apart(self.train, self.held_out, self.read)[split]

    @staticmethod
    def read(row: Mapping[str, Any]) -> dict[str, str]:
        """problem, answer and solution of a row. Raises KeyError for what is missing."""
        return {name: str(row[name]) for name in ("problem", "answer")} | {"solution": str(row.get("solution", ""))}


@cache
def apart(train: Path, held_out: Path, read: Any) -> dict[Split, tuple[Mapping[str, str], ...]]:
    """The problems of two files, which must not share one."""
    problems: dict[Split, tuple[Mapping[str, str], ...]] = {
        "train": tuple(rows(train, read)),
        "held_out": tuple(rows(held_out, read)),
    }
    both = {one["problem"] for one in problems["train"]} & {one["problem"] for one in problems["held_out"]}
    if both:
        found = f"{len(both)} problems of {held_out} also in {train}, such as {min(both)[:60]!r}"
        raise Refusal(found, "held-out problems that training never shows", "take them out of the training file")
    return problems


def boxed(text: str) -> str | None:
    r"""What stands in the \boxed{…} of `text`, braces counted. None without a box, with an empty or open one, and with
    two that differ."""
    found = []
    at = text.find(OPEN)
    while at >= 0:
        inside = closed(text, at + len(OPEN))
        if inside is None:
            return None
        found.append(plain(inside))
        at = text.find(OPEN, at + len(OPEN) + len(inside))
    answers = set(found)
    return found[-1] if len(answers) == 1 and found[-1] and OPEN not in found[-1] else None


def closed(text: str, start: int) -> str | None:
    """What follows `start` up to the brace that closes it; None where none does. An escaped brace is no brace."""
    depth, at = 1, start
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] in "{}":
            depth += 1 if text[at] == "{" else -1
            if depth == 0:
                return text[start:at]
        at += 1
    return None


def plain(answer: str) -> str:
    """An answer without what only typesets it."""
    return DRESS.sub("", answer).rstrip(".").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


def number(answer: str) -> Fraction | None:
    r"""The value of 1,234, -3.50, 3/4 or \frac{3}{4} in ASCII digits; None for anything else."""
    text = plain(answer)
    if len(text) > LONGEST:
        return None
    if found := NUMBER.fullmatch(text):
        return Fraction(f"{found[1]}{found[2].replace(',', '')}{found[3] or ''}")
    if found := FRACTION.fullmatch(text):
        above, below = int(found[4] or found[1] + found[2]), int(found[5] or found[3])
        return Fraction(above, below) if below else None
    return None


def equal(right: str, answer: str, verifier: Verifier = "exact") -> bool:
    """Whether `answer` is the same as the `right` one: as numbers, as text, or, where asked for, by math-verify."""
    one, other = number(right), number(answer)
    if one is not None and other is not None:
        return one == other
    if len(answer) > LONGEST or not answer.isascii():
        return False
    return plain(right) == plain(answer) or (verifier == "math-verify" and verified(right, answer))


def costly(answer: str) -> bool:
    """Whether sympy might work on `answer` for ever: long numbers, factorials, sums, powers of powers."""
    powers = (closed(answer, place.end()) or "" for place in re.finditer(r"\^\s*{", answer))
    return COSTLY.search(answer) is not None or any("^" in power for power in powers)


def verified(right: str, answer: str) -> bool:
    """math-verify's judgement. An answer that would take sympy for ever is wrong; one in parts is no answer.

    Raises Refusal without the library. It watches the time by a signal, which only a program's main thread receives.
    """
    if costly(answer):
        return False
    try:
        from math_verify import parse, verify
    except ModuleNotFoundError as missing:
        if missing.name != "math_verify":
            raise
        allowed = "verifier = 'exact', or math-verify installed"
        raise Refusal("verifier = 'math-verify' without math-verify", allowed, "pip install 'trimaran[rl]'") from None
    gold, said = (parse(f"${OPEN}{one}}}$", raise_on_error=False) for one in (right, answer))
    return bool(gold and said and verify(gold, said, raise_on_error=False))
