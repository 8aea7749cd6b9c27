"""What a generated program does, step by step: a small interpreter over Python's `ast`. Nothing is ever executed.

    L2 cond_a = x != 3      a step per executed line, the value after it      L2,cond_a:True
    L3 if cond_a:           a line that only decides has no value             L3,
    L4     lst_x.pop()      a list is written whole, without spaces           L4,lst_x:[4,0,7]
    L5 return                                                                 L5,

Line 1 is the `def`. The steps are those of CPython's own `line` events, on every version: what a line changes is read
from the tree, not from frames or bytecode (L0-Bench, arXiv 2503.22832, whose tracer needs one version).
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from trimaran.errors import Refusal

Value = int | bool | list[int]
Names = dict[str, Value]


class Crashed(Exception):
    """The program fails as Python would: a name without a value, an index out of range, a pop from an empty list."""


@dataclass(frozen=True)
class Step:
    """An executed line, and what it changed; name None: nothing."""

    line: int
    name: str | None = None
    value: str = ""

    def __str__(self) -> str:
        return f"L{self.line}," if self.name is None else f"L{self.line},{self.name}:{self.value}"


def trace_of(source: str, inputs: Mapping[str, Value], limit: int) -> list[Step] | None:
    """The steps of one call; None where there are more than `limit`.

    Raises Crashed where the program fails within them, and Refusal for a program outside of the grammar.
    """
    [function] = ast.parse(source).body
    if not isinstance(function, ast.FunctionDef):
        raise outside(function)
    names: Names = {name: list(value) if isinstance(value, list) else value for name, value in inputs.items()}
    found = list(islice(block(function.body, names), limit + 1))
    return found if len(found) <= limit else None


def block(body: Sequence[ast.stmt], names: Names) -> Iterator[Step]:
    """Runs statements on `names` as its steps are asked for."""
    for statement in body:
        line = statement.lineno
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=expression):
                names[name] = evaluate(expression, names)
                yield Step(line, name, str(names[name]))
            case ast.If(test=test, body=inner, orelse=[]):
                taken = evaluate(test, names)
                yield Step(line)
                if taken:
                    yield from block(inner, names)
            case ast.While(test=test, body=inner, orelse=[]):
                while True:
                    taken = evaluate(test, names)
                    yield Step(line)
                    if not taken:
                        break
                    yield from block(inner, names)
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method), args=arguments)):
                items = change(statement, method, name, arguments, names)
                yield Step(line, name, str(items).replace(" ", ""))
            case ast.Return(value=None) if statement is body[-1]:  # the grammar has one, at the end
                yield Step(line)
            case _:
                raise outside(statement)


def change(where: ast.stmt, method: str, name: str, arguments: Sequence[ast.expr], names: Names) -> list[int]:
    """Appends to a list, or pops from it; the list after that."""
    items = value_of(name, names)
    if not isinstance(items, list):
        raise outside(where)
    match method, arguments:
        case "append", [item]:
            items.append(number(item, names))
        case "pop", []:
            if not items:
                raise Crashed(f"pop from an empty {name}")
            items.pop()
        case _:
            raise outside(where)
    return items


def evaluate(expression: ast.expr, names: Names) -> Value:
    match expression:
        case ast.Constant(value=int() as value):
            return value
        case ast.Name(id=name):
            return value_of(name, names)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return number(left, names) + number(right, names)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return number(left, names) - number(right, names)
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
            return number(left, names) == number(right, names)
        case ast.Compare(left=left, ops=[ast.NotEq()], comparators=[right]):
            return number(left, names) != number(right, names)
        case ast.Subscript(value=ast.Name(id=name), slice=index):
            items, place = value_of(name, names), number(index, names)
            if not isinstance(items, list):
                raise outside(expression)
            if not -len(items) <= place < len(items):
                raise Crashed(f"index {place} of {len(items)} items")
            return items[place]
    raise outside(expression)


def number(expression: ast.expr, names: Names) -> int:
    value = evaluate(expression, names)
    if isinstance(value, list):
        raise outside(expression)
    return value


def value_of(name: str, names: Names) -> Value:
    if name not in names:
        raise Crashed(f"{name} has no value")
    return names[name]


def outside(node: ast.AST) -> Refusal:
    allowed = "assignments, if, while, append, pop and a last return, over numbers, truth values and lists of numbers"
    return Refusal(f"`{ast.unparse(node)[:80]}` in a program", allowed, "trace programs of l0_grammar")
