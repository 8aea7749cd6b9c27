"""JSON of strangers: read whole or refused, before any of it is looked at."""

import json
import math
import re
from typing import Any, NoReturn

from trimaran.serve.problem import Problem


def read(raw: bytes, depth: int) -> Any:
    """The value that `raw` spells. Refuses what Python would let pass: NaN, infinities, numbers too large for a float,
    half surrogate pairs, keys given twice, and brackets nested deeper than `depth`."""
    if nesting(raw) > depth:
        raise Problem(400, f"the body nests more than {depth} brackets", code="json_too_deep")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=no_number, object_pairs_hook=unique)
    except UnicodeDecodeError as problem:
        raise Problem(400, f"the body is no UTF-8 (byte {problem.start})", code="json_invalid") from None
    except json.JSONDecodeError as problem:
        message = f"the body is no JSON: {problem.msg} at character {problem.pos}"
        raise Problem(400, message, code="json_invalid") from None
    except ValueError:  # an integer of more digits than Python reads
        raise Problem(400, "the body holds a number of thousands of digits", code="json_invalid") from None
    check(value)
    return value


def nesting(raw: bytes) -> int:
    """The deepest nesting of brackets outside of strings, counted without recursion."""
    deepest = level = 0
    for sign in STRING.sub(b"", raw).translate(None, delete=OTHER_SIGNS):
        level += 1 if sign in b"[{" else -1
        deepest = max(deepest, level)
    return deepest


STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
OTHER_SIGNS = bytes(sign for sign in range(256) if sign not in b"[]{}")


def no_number(name: str) -> NoReturn:
    raise Problem(400, f"the body holds {name}, which is no JSON", code="json_invalid")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in table if keys.count(key) > 1)
        raise Problem(400, f"the key {twice!r} is given twice", param=twice, code="json_invalid")
    return table


def check(value: Any) -> None:
    """Refuses text that UTF-8 can not spell and numbers that no float holds, wherever in `value`."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, str):
            if not one.isascii() and any("\ud800" <= sign <= "\udfff" for sign in one):
                raise Problem(400, "a text with half a surrogate pair", code="json_invalid")
        elif isinstance(one, float) and not math.isfinite(one):
            raise Problem(400, "a number too large for a float", code="json_invalid")
        elif isinstance(one, int) and abs(one) >= 2**63:
            raise Problem(400, "an integer of more than 64 bits", code="json_invalid")
