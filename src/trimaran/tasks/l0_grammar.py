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
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from trimaran.tasks.l0_trace import Value

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


class TooLong(Exception):
    """More lines than allowed: the program is given up at once."""


def program(random: Random, shape: Shape) -> Program | None:
    """A program, or None for a draw that is too short or too long. It may still crash."""
    writer = Writer(random, shape)
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

    def value(name: str) -> Value:
        if name in TRUTHS_IN:
            return random.random() < 0.5
        if name in LISTS_IN:
            return [random.randrange(shape.numbers) for _ in range(random.randint(*shape.lists))]
        return random.randrange(shape.numbers)

    return {name: value(name) for name in parameters}


class Writer:
    """Writes the lines of one program; knows which names have been written."""

    def __init__(self, random: Random, shape: Shape):
        self.random, self.shape = random, shape
        self.lines: list[str] = []
        self.numbers = random.sample(NUMBERS_IN, random.randint(1, len(NUMBERS_IN)))
        self.lists = random.sample(LISTS_IN, random.randint(2, len(LISTS_IN)))
        self.truths = random.sample(TRUTHS_IN, random.randint(1, len(TRUTHS_IN)))
        self.parameters = (*self.numbers, *self.lists, *self.truths)
        self.around: list[str] = []  # conditions of the loops that this line is in

    def write(self, indent: int, line: str) -> None:
        if len(self.lines) + 3 >= self.shape.lines[1]:  # with this one, def and return
            raise TooLong
        self.lines.append(f"{'    ' * indent}{line}")

    def statements(self, indent: int) -> None:
        self.statement(indent)
        while self.random.random() < 0.5:
            self.statement(indent)

    def statement(self, indent: int) -> None:
        kinds: list[Callable[[int], None]] = [self.assignment, self.list_change]
        if indent <= self.shape.depth:
            kinds += [self.branch, self.loop]
        self.random.choice(kinds)(indent)

    def assignment(self, indent: int) -> None:
        kind, known, every = self.random.choice([
            (self.number, self.numbers, NUMBERS_IN + NUMBERS), (self.truth, self.truths, TRUTHS_IN + TRUTHS),
        ])  # fmt: skip
        name, expression = self.random.choice(every), kind()
        self.write(indent, f"{name} = {expression}")
        if name not in known:
            known.append(name)

    def list_change(self, indent: int) -> None:
        change = f"append({self.operand()})" if self.random.random() < 0.5 else "pop()"
        self.write(indent, f"{self.random.choice(self.lists)}.{change}")

    def branch(self, indent: int) -> None:
        self.write(indent, f"if {self.random.choice(self.truths)}:")
        self.statements(indent + 1)

    def loop(self, indent: int) -> None:
        free = [name for name in TRUTHS_IN + TRUTHS if name not in self.around]
        condition, counter = self.random.choice(free), f"cnter_{indent - 1}"
        asked = f"{condition} = {counter} != {self.random.randrange(SHORTEST_LOOP, self.shape.loop, STRIDE)}"
        for line in (f"{counter} = 0", asked, f"while {condition}:"):
            self.write(indent, line)
        self.around.append(condition)
        self.statements(indent + 1)
        self.around.pop()
        self.write(indent + 1, f"{counter} = {counter} + {STRIDE}")
        self.write(indent + 1, asked)

    def digit(self) -> str:
        return str(self.random.randrange(self.shape.numbers))

    def operand(self) -> str:
        return self.digit() if self.random.random() < 0.5 else self.random.choice(self.numbers)

    def number(self) -> str:
        kind = self.random.randrange(3)
        if kind == 0:
            return self.operand()
        if kind == 1:
            sides, sign = [self.operand(), self.digit()], self.random.choice("+-")
            return f" {sign} ".join(sides if self.random.random() < 0.5 else sides[::-1])
        places = range(max(1, self.shape.lists[1] // 2))
        index = str(self.random.choice(places)) if self.random.random() < 0.5 else self.random.choice(self.numbers)
        return f"{self.random.choice(self.lists)}[{index}]"

    def truth(self) -> str:
        sides, sign = [self.operand(), self.digit()], self.random.choice(("==", "!="))
        return f" {sign} ".join(sides if self.random.random() < 0.5 else sides[::-1])
