"""Small programming exercises without end: a wording, a solution, and arguments to try it on.

Levels 1 and 2 are put together of steps on a list of whole numbers; level 3 are classical ones with a number drawn in.
A solution is source text of ours: `Exercise.answers` runs it in this process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

Arguments = list[Any]  # of one call, JSON values


@dataclass(frozen=True)
class Exercise:
    """`wording` says what solve(…) is to do; `arguments` draws those of one call; `thought`: how one would go about."""

    wording: str
    source: str
    thought: str
    arguments: Callable[[Random], Arguments]

    def answers(self, calls: list[Arguments]) -> list[Any]:
        """What the solution says to each call."""
        space: dict[str, Any] = {}
        exec(compile(self.source, "exercise.py", "exec"), space)
        return [space["solve"](*arguments) for arguments in calls]


# In words and as Python, with {k} for a number. A number is called x, all that are left are `values`.
KEEP = (
    ("are even", "x % 2 == 0"),
    ("are odd", "x % 2 == 1"),
    ("are greater than {k}", "x > {k}"),
    ("are smaller than {k}", "x < {k}"),
    ("can be divided by {k}", "x % {k} == 0"),
    ("cannot be divided by {k}", "x % {k} != 0"),
)
CHANGE = (
    ("its square", "x * x"),
    ("{k} times itself", "x * {k}"),
    ("itself plus {k}", "x + {k}"),
    ("{k} minus itself", "{k} - x"),
    ("its absolute value", "abs(x)"),
    ("itself modulo {k}", "x % {k}"),
)
END = (
    ("their sum", "sum(values)"),
    ("how many there are", "len(values)"),
    ("the largest of them, or {k} if there are none", "max(values, default={k})"),
    ("the smallest of them, or {k} if there are none", "min(values, default={k})"),
    ("them in ascending order", "sorted(values)"),
    ("them in reverse order", "values[::-1]"),
    ("them without repetitions, in the order in which each appears first", "list(dict.fromkeys(values))"),
    ("those of them at places 0, {k}, twice {k} and so on", "values[::{k}]"),
)


def numbers(random: Random) -> Arguments:
    return [[random.randint(-20, 20) for _ in range(random.randint(0, 12))]]


def steps(random: Random, level: int) -> Exercise:
    """Level 1: one step and an end; level 2: both steps and an end."""
    kept = random.random() < 0.5 or level == 2
    changed = not kept or level == 2
    words, lines, filled = [], [], Random(random.random())

    def fill(pair: tuple[str, str]) -> tuple[str, str]:
        k = str(filled.randint(3, 9))  # 2 would say "even" a second time
        return pair[0].replace("{k}", k), pair[1].replace("{k}", k)

    if kept:
        said, test = fill(random.choice(KEEP))
        words.append(f"keeps those that {said}")
        lines.append(f"values = [x for x in values if {test}]")
    if changed:
        said, change = fill(random.choice(CHANGE))
        words.append(f"replaces each by {said}")
        lines.append(f"values = [{change} for x in values]")
    said, end = fill(random.choice(END))
    words.append(f"returns {said}")
    lines.append(f"return {end}")
    wording = f"`solve(values)` takes a list of whole numbers, {', '.join(words[:-1])} and {words[-1]}."
    return Exercise(wording, "def solve(values):\n    " + "\n    ".join(lines) + "\n", "; ".join(lines), numbers)


def windows(random: Random) -> Exercise:
    k = random.randint(2, 6)
    return Exercise(
        f"`solve(values)` returns the list of the sums of every {k} neighbours in a list of whole numbers.",
        f"def solve(values):\n    return [sum(values[i:i + {k}]) for i in range(len(values) - {k - 1})]\n",
        f"len(values) - {k - 1} windows of {k}",
        numbers,
    )


def runs(random: Random) -> Exercise:
    k = random.randint(1, 5)
    source = f"""\
from itertools import groupby

def solve(text):
    pairs = [[letter, len(list(group))] for letter, group in groupby(text)]
    return [pair for pair in pairs if pair[1] >= {k}]
"""
    wording = f"""\
`solve(text)` returns a list [letter, length] for every run of equal letters in a text that is at least {k} long, in \
their order. A run is as long as it can be."""
    return Exercise(wording, source, "groupby gives the runs", lambda draw: [repeats(draw)])


def repeats(random: Random) -> str:
    return "".join(random.choice("abc") * random.randint(1, 6) for _ in range(random.randint(0, 8)))


def shift(random: Random) -> Exercise:
    k = random.randint(1, 25)
    source = f"""\
def solve(text):
    return "".join(chr((ord(c) - 97 + {k}) % 26 + 97) if "a" <= c <= "z" else c for c in text)
"""
    wording = f"""\
`solve(text)` returns the text with every letter from a to z moved {k} places on in the alphabet (after z comes a); \
all else stays."""

    def texts(draw: Random) -> Arguments:
        return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz AZ.,", k=draw.randint(0, 15)))]

    return Exercise(wording, source, f"(ord(c) - 97 + {k}) % 26", texts)


def base(random: Random) -> Exercise:
    k = random.randint(2, 16)
    source = f"""\
def solve(number):
    digits = [number % {k}]
    while number := number // {k}:
        digits.append(number % {k})
    return digits[::-1]
"""
    wording = f"`solve(number)` returns the list of digits of a whole number in base {k}, the highest first."
    return Exercise(wording, source, f"divide by {k} until 0 is left", lambda draw: [draw.getrandbits(20)])


def merge(random: Random) -> Exercise:
    k = random.randint(0, 9)
    source = f"""\
def solve(spans):
    merged = []
    for start, stop in sorted(spans):
        if merged and start - merged[-1][1] <= {k}:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    return merged
"""
    wording = f"""\
`solve(spans)` takes a list of [start, stop] in any order and returns the list of them by ascending start where those \
are merged into one that overlap or lie at most {k} apart."""

    def spans(draw: Random) -> Arguments:
        starts = [draw.randint(0, 60) for _ in range(draw.randint(0, 7))]
        return [[[start, start + draw.randint(0, 9)] for start in starts]]

    return Exercise(wording, source, "sort, then compare each with the last one merged", spans)


def survivor(random: Random) -> Exercise:
    k = random.randint(2, 40)
    source = f"""\
def solve(people):
    place = 0
    for size in range(2, people + 1):
        place = (place + {k}) % size
    return place + 1
"""
    wording = f"""\
People numbered from 1 stand in a circle. Counting begins with number 1; every {k}th who is counted leaves, and \
counting goes on with the next. `solve(people)` returns the number of the last one, for 1 or more people."""
    return Exercise(wording, source, "the survivor's place grows with the circle", lambda draw: [draw.randint(1, 60)])


def chunks(random: Random) -> Exercise:
    k, filler = random.randint(2, 6), random.randint(-9, 9)
    source = f"""\
def solve(values):
    padded = values + [{filler}] * (-len(values) % {k})
    return [padded[i:i + {k}] for i in range(0, len(padded), {k})]
"""
    wording = f"`solve(values)` cuts a list into lists of {k}, in order; the last one is filled up with {filler}."
    return Exercise(wording, source, f"pad to a multiple of {k}, then cut", numbers)


def balance(random: Random) -> Exercise:
    k = random.randint(1, 4)
    source = f"""\
def solve(text):
    waiting = []
    for c in text:
        if c in "([{{":
            waiting.append(c)
        elif not waiting or waiting.pop() + c not in ("()", "[]", "{{}}"):
            return False
        if len(waiting) > {k}:
            return False
    return not waiting
"""
    wording = f"""\
`solve(text)` says whether the brackets ()[]{{}} in a text of brackets are all closed in the right order and never \
more than {k} deep."""

    def brackets(draw: Random) -> Arguments:
        text = ""
        for _ in range(draw.randint(0, 8)):
            pair = draw.choice(("()", "[]", "{}"))
            text = draw.choice((f"{pair[0]}{text}{pair[1]}", text + pair))
        if text and draw.random() < 0.4:
            place = draw.randrange(len(text))
            text = text[:place] + draw.choice("([{)]}") + text[place + 1 :]
        return [text]

    return Exercise(wording, source, "a stack of what is open", brackets)


CLASSICS = (windows, runs, shift, base, merge, survivor, chunks, balance)
