"""Sums in columns: the thought goes through them from the right, as on paper; the answer is the number in plain digits.

    47+85=?      thought  7+5=12 4+8+1=13      answer  132
    52-18=?      thought  12-8=4 5-1-1=3       answer  34

Three or more terms are added to one another in turn, a line each, with the total so far at the line's end.
"""

from itertools import accumulate
from random import Random
from typing import ClassVar, Literal

from pydantic import Field

from trimaran.tasks.draw import drawn
from trimaran.tasks.task import REWARD, Message, Prompt, Split, Task, Trace

NAMES = ("Ann", "Bo", "Cleo", "Dan", "Eve", "Finn")
THINGS = ("boats", "sails", "nets", "maps", "ropes", "oars")


class Arithmetic(Task):
    """Additions and subtractions of whole numbers; totals on the way are never negative.

    digits: of each term; varied: from one digit up to that. distractors: sentences beside the sum that do not matter.
    A sum is held out together with every order of its terms.
    """

    name: ClassVar[str] = "arithmetic"
    digits: int = Field(2, ge=1, le=12)
    terms: int = Field(2, ge=2, le=6)
    operations: Literal["add", "subtract", "both"] = "add"
    varied: bool = False
    distractors: int = Field(0, ge=0, le=4)
    thinking: bool = True

    def prompt(self, number: int, split: Split = "train") -> Prompt:
        terms, before, after = drawn(self.name, number, split, self._make, lambda made: identity(made[0]))
        text = " ".join([*before, f"{written(terms)}=?", *after])
        messages = ({"role": "user", "content": text},)
        return Prompt(self.name, split, number, messages, secret={"terms": list(terms)}, thinking=self.thinking)

    def gold(self, prompt: Prompt) -> tuple[Message, ...]:
        terms = prompt.secret["terms"]
        said = {"role": "assistant", "content": str(sum(terms))}
        return (said | {"reasoning_content": scratchpad(terms)} if prompt.thinking else said,)

    def score(self, trace: Trace) -> dict[str, float]:
        return {REWARD: float(trace.final == str(sum(trace.prompt.secret["terms"])))}

    def _make(self, random: Random) -> tuple[tuple[int, ...], list[str], list[str]] | None:
        terms: list[int] = []
        share = {"add": 0.0, "subtract": 1.0, "both": 0.5}[self.operations]
        for place in range(self.terms):
            minus = place > 0 and random.random() < share
            if minus and sum(terms) == 0:
                return None  # nothing is left to take from
            digits = random.randint(1, self.digits) if self.varied else self.digits
            most = min(10**digits - 1, sum(terms)) if minus else 10**digits - 1
            least = min(0 if digits == 1 else 10 ** (digits - 1), most)
            terms.append(random.randint(least, most) * (-1 if minus else 1))
        beside = [
            f"{random.choice(NAMES)} has {random.randrange(10**self.digits)} {random.choice(THINGS)}."
            for _ in range(self.distractors)
        ]
        border = random.randint(0, self.distractors)
        return tuple(terms), beside[:border], beside[border:]


def identity(terms: tuple[int, ...]) -> str:
    """The sum whatever the order of its terms."""
    return f"sum {sorted(terms)}"


def written(terms: tuple[int, ...]) -> str:
    """47+85-3. A term that is 0 is added."""
    return "".join(f"{term:+}" for term in terms).removeprefix("+")


def scratchpad(terms: list[int]) -> str:
    """The thought: a line of columns for each term after the first."""
    totals = list(accumulate(terms))
    lines = [columns(total, term) for total, term in zip(totals, terms[1:])]
    ends = [f" {total}" for total in totals[1:-1]] + [""]
    return "\n".join(line + end for line, end in zip(lines, ends))


def columns(total: int, term: int) -> str:
    """Every column of `total` + `term` from the right, with what is carried or borrowed as a last operand."""
    minus, other, carried, steps = term < 0, abs(term), 0, []
    for place in range(max(len(str(total)), len(str(other)))):
        above, below = total // 10**place % 10, other // 10**place % 10
        kept = f"{'-' if minus else '+'}1" if carried else ""
        if minus:
            borrow = above - below - carried < 0
            above += 10 * borrow
            steps.append(f"{above}-{below}{kept}={above - below - carried}")
            carried = int(borrow)
        else:
            column = above + below + carried
            steps.append(f"{above}+{below}{kept}={column}")
            carried = column // 10
    return " ".join(steps)
