"""The grammar of tool calls, for answers that have to make one: Lark's notation, as llguidance reads it.

It is the form of `text/call.py`, tightened: known functions, the schema's parameters in its own order, none that is
required left out, and values of the schema's types, written as the chat template writes them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trimaran.text.tags import CALL_CLOSE, CALL_OPEN
from trimaran.text.tokenizer import Tokenizer
from trimaran.text.tools import Tools, kinds, members, quoted, resolved

# As the template's tojson writes tables and lists.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
END = "\n</parameter>\n"


def call_grammar(
    tools: Tools, tokenizer: Tokenizer, names: Sequence[str], *, one: bool, otherwise: Mapping[str, Any] | None = None
) -> str:
    """Calls of the functions `names`: exactly one, or at least one. otherwise: the JSON schema of an answer that may be
    given instead."""
    opens, closes = (tag(name, tokenizer) for name in (CALL_OPEN, CALL_CLOSE))
    functions = [f"f{place}" for place in range(len(names))]
    starts = [f"call{'' if one else '+'}", *(["answer"] if otherwise is not None else [])]
    lines = [
        f"start: {' | '.join(starts)}",
        f'call: {opens} "\\n" ({" | ".join(functions)}) "</function>\\n" {closes} "\\n"?',
        f"text[suffix={quoted(END)}]: /(.|\\n)*/",
    ]
    if otherwise is not None:
        lines.append(f"answer: %json {json.dumps(otherwise)}")
    for function, name in zip(functions, names, strict=True):
        lines += function_lines(function, name, tools)
    return "\n".join(lines) + "\n"


def tag(name: str, tokenizer: Tokenizer) -> str:
    """A tag of the call: the token that stands for it, or its letters where there is none."""
    return f"<[{tokenizer.id_of(name)}]>" if name in tokenizer.controls else quoted(name)


def function_lines(rule: str, name: str, tools: Tools) -> list[str]:
    """The rules of one function's call."""
    root = tools.parameters[name]
    schema = resolved(root, root)
    required = set(schema.get("required", ()))
    lines, parts = [], [quoted(f"<function={name}>\n")]
    for place, (key, about) in enumerate(schema.get("properties", {}).items()):
        parameter = f"{rule}p{place}"
        parts.append(parameter if key in required else f"{parameter}?")
        lines.append(f"{parameter}: {quoted(f'<parameter={key}>' + chr(10))} {value(about, root)}")
    return [f"{rule}: {' '.join(parts)}", *lines]


def value(schema: Any, root: Mapping[str, Any]) -> str:
    """What a parameter may be, its end included. Where a string may stand it is written bare, and any text is one."""
    schema = resolved(schema, root) if isinstance(schema, Mapping) else {}
    choices = members(schema)
    if choices and all(isinstance(choice, str) for choice in choices):
        return f"({' | '.join(quoted(choice) for choice in choices)}) {quoted(END)}"
    allowed = kinds(schema, root, set())
    if allowed is None or "string" in allowed:
        return "text"
    definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
    return f"%json {json.dumps({**definitions, **schema, 'x-guidance': JSON_STYLE})} {quoted(END)}"
