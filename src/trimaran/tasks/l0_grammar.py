"""Small programs drawn from L0-Bench's grammar (arXiv 2503.22832, its `grammar_v0`).

    program     as many statements as int(0.4 * fewest lines), then one or more; a last `return`
    statement   a = …, cond_a = …, if, while, append or pop: the four kinds equally likely, if and while not too deep
    number      operand | operand ± digit | digit ± operand | lst_x[digit or variable]
    truth       operand == digit, and the like with != or the other way round
    while       cnter_0 = 0, cond_a = cnter_0 != N; at the end of each round cnter_0 grows by 2 and cond_a is asked
                again. N is even, so it ends. A loop within never takes the condition of one around it.

What stands to the right of `=` has been written before it, though maybe in an `if` that is not taken: such programs
crash and are drawn anew. Loops without an end, which the published generator practically never draws, are left out.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from trimaran.tasks.l0_trace import Value

T = TypeVar("T")

NUMBERS_IN = ("x", "y", "z", "u", "v", "w")
TRUTHS_IN = ("cond_x", "cond_y", "cond_z")
LISTS_IN = ("lst_x", "lst_y", "lst_z", "lst_u", "lst_v", "lst_w")
NUMBERS = ("i", "j", "k", "a", "b", "c", "m", "n")
TRUTHS = ("cond_a", "cond_b", "cond_c", "cond_d", "cond_e")
FIXED = 0.4  # statements that a program has at least, of the fewest lines
STRIDE, SHORTEST_LOOP = 2, 4


@dataclass(frozen=True)
class Shape:
    """What programs look like. lines: more than the first number and fewer than the second, def and return counted;
    depth: of blocks in one another; lists: lengths of those put in; numbers: what digits are below; loop: what ends
    of counters are below."""

    lines: tuple[int, int] = (10, 50)
    depth: int = 1
    lists: tuple[int, int] = (5, 10)
    numbers: int = 10
    loop: int = 100


@dataclass(frozen=True)
class Program:
    """source: the function; parameters: its arguments, in order."""

    source: str
    parameters: tuple[str, ...]

    @property
    def numbered(self) -> str:
        return "\n".join(f"L{place} {line}" for place, line in enumerate(self.source.split("\n"), start=1))


class Dice:
    """Draws by `Random.random` alone: its sequence is what Python promises to keep from version to version."""

    def __init__(self, random: Random):
        self.roll = random.random

    def below(self, end: int) -> int:
        return int(self.roll() * end)

    def one(self, options: Sequence[T]) -> T:
        return options[int(self.roll() * len(options))]

    def some(self, options: Sequence[T], least: int = 1) -> list[T]:
        """From `least` to all of the options, in any order."""
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in range(least + self.below(len(left) + 1 - least))]


class TooLong(Exception):
    """More lines than allowed: the program is given up at once."""


def program(random: Random, shape: Shape) -> Program | None:
    """A program, or None for a draw that is too short or too long. It may still crash."""
    writer = Writer(Dice(random), shape)
    try:
        for _ in range(int(FIXED * shape.lines[0])):
            writer.statement(1)
        writer.statements(1)
    except TooLong:
        return None
    body = "\n".join([*writer.lines, "    return"])
    if len(writer.lines) + 2 <= shape.lines[0]:
        return None
    used = set(re.findall(r"\w+", body))
    parameters = tuple(name for name in writer.parameters if name in used)
    return Program(f"def function({', '.join(parameters)}):\n{body}", parameters)


def inputs(random: Random, parameters: tuple[str, ...], shape: Shape) -> dict[str, Value]:
    """Values to call a program with."""

    dice, (least, most) = Dice(random), shape.lists

    def value(name: str) -> Value:
        if name in TRUTHS_IN:
            return dice.roll() < 0.5
        if name in LISTS_IN:
            return [dice.below(shape.numbers) for _ in range(least + dice.below(most + 1 - least))]
        return dice.below(shape.numbers)

    return {name: value(name) for name in parameters}


class Writer:
    """Writes the lines of one program; knows which names have been written."""

    def __init__(self, dice: Dice, shape: Shape):
        self.dice, self.shape = dice, shape
        self.lines: list[str] = []
        self.numbers = dice.some(NUMBERS_IN)
        self.lists = dice.some(LISTS_IN, 2)
        self.truths = dice.some(TRUTHS_IN)
        self.parameters = (*self.numbers, *self.lists, *self.truths)
        self.around: list[str] = []  # conditions of the loops that this line is in

    def write(self, indent: int, line: str) -> None:
        if len(self.lines) + 3 >= self.shape.lines[1]:  # with this one, def and return
            raise TooLong
        self.lines.append(f"{'    ' * indent}{line}")

    def statements(self, indent: int) -> None:
        self.statement(indent)
        while self.dice.roll() < 0.5:
            self.statement(indent)

    def statement(self, indent: int) -> None:
        kinds: list[Callable[[int], None]] = [self.assignment, self.list_change]
        if indent <= self.shape.depth:
            kinds += [self.branch, self.loop]
        self.dice.one(kinds)(indent)

    def assignment(self, indent: int) -> None:
        kind, known, every = self.dice.one([
            (self.number, self.numbers, NUMBERS_IN + NUMBERS), (self.truth, self.truths, TRUTHS_IN + TRUTHS),
        ])  # fmt: skip
        name, expression = self.dice.one(every), kind()
        self.write(indent, f"{name} = {expression}")
        if name not in known:
            known.append(name)

    def list_change(self, indent: int) -> None:
        change = f"append({self.operand()})" if self.dice.roll() < 0.5 else "pop()"
        self.write(indent, f"{self.dice.one(self.lists)}.{change}")

    def branch(self, indent: int) -> None:
        self.write(indent, f"if {self.dice.one(self.truths)}:")
        self.statements(indent + 1)

    def loop(self, indent: int) -> None:
        free = [name for name in TRUTHS_IN + TRUTHS if name not in self.around]
        condition, counter = self.dice.one(free), f"cnter_{indent - 1}"
        asked = f"{condition} = {counter} != {self.dice.one(range(SHORTEST_LOOP, self.shape.loop, STRIDE))}"
        for line in (f"{counter} = 0", asked, f"while {condition}:"):
            self.write(indent, line)
        self.around.append(condition)
        self.statements(indent + 1)
        self.around.pop()
        self.write(indent + 1, f"{counter} = {counter} + {STRIDE}")
        self.write(indent + 1, asked)

    def digit(self) -> str:
        return str(self.dice.below(self.shape.numbers))

    def operand(self) -> str:
        return self.digit() if self.dice.roll() < 0.5 else self.dice.one(self.numbers)

    def number(self) -> str:
        kind = self.dice.below(3)
        if kind == 0:
            return self.operand()
        if kind == 1:
            sides, sign = [self.operand(), self.digit()], self.dice.one("+-")
            return f" {sign} ".join(sides if self.dice.roll() < 0.5 else sides[::-1])
        places = range(max(1, self.shape.lists[1] // 2))
        index = str(self.dice.one(places)) if self.dice.roll() < 0.5 else self.dice.one(self.numbers)
        return f"{self.dice.one(self.lists)}[{index}]"

    def truth(self) -> str:
        sides, sign = [self.operand(), self.digit()], self.dice.one(("==", "!="))
        return f" {sign} ".join(sides if self.dice.roll() < 0.5 else sides[::-1])
