"""Tools that a model may call: definitions checked and bounded, arguments read by the definitions' JSON schemas.

A call in the template's form carries its arguments as bare text, and only the schema tells 5 from "5". What the schema
does not name is read as JSON where it is JSON, else as a string. A value that is not what the schema asks for is handed
on as the string that it was: whoever carries out the call sees what the model wrote.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from trimaran.config import Settings
from trimaran.errors import Refusal

KINDS = ("array", "boolean", "integer", "null", "number", "object", "string")
NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
PARAMETER = re.compile(r"[^<>\x00-\x1f]{1,128}")  # it is written into a tag
ALTERNATIVES = ("anyOf", "oneOf", "allOf")
MOST_REFERENCES = 32  # followed to type one value
WORDS = {"true": "true", "True": "true", "false": "false", "False": "false", "null": "null", "None": "null"}

Schema = Mapping[str, Any]


class ToolLimits(Settings):
    """How much of the context, and of everybody's time, tool definitions may take."""

    count: int = Field(128, ge=1)
    characters: int = Field(1 << 18, ge=1)  # of all definitions, as JSON
    depth: int = Field(32, ge=4)  # tables and lists inside one another


class Tools:
    """Checked definitions, as OpenAI writes them: `{"type": "function", "function": {name, description, parameters}}`.

    `definitions` is what a chat template gets. Raises `Refusal` for anything that is not a definition or is too much.
    """

    def __init__(self, definitions: Sequence[Mapping[str, Any]], limits: ToolLimits = ToolLimits()):  # noqa: B008
        check_size(definitions, limits)
        functions = [checked_tool(one, place) for place, one in enumerate(definitions)]
        self.definitions: list[dict[str, Any]] = [{"type": "function", "function": one} for one in functions]
        self.parameters: dict[str, Schema] = {}
        for function in functions:
            if function["name"] in self.parameters:
                raise Refusal(f"two tools called {function['name']!r}", "one of each name", "rename one of them")
            self.parameters[function["name"]] = function.get("parameters", {})

    @property
    def names(self) -> list[str]:
        return list(self.parameters)

    def schema(self, function: str, parameter: str) -> Schema | None:
        """The schema of a parameter; None where function or parameter is unknown, or anything is allowed."""
        root = self.parameters.get(function, {})
        schema = resolved(root, root).get("properties", {}).get(parameter)
        return schema if isinstance(schema, Mapping) else None

    def is_text(self, function: str, parameter: str) -> bool:
        """Whether a value can only be a string, so that it can be handed on before it is complete."""
        schema, root = self.schema(function, parameter), self.parameters.get(function, {})
        return schema is not None and kinds(schema, root, set()) == {"string"}

    def json_of(self, function: str, parameter: str, text: str) -> str:
        """The JSON source of a value that the model wrote as `text`."""
        return json_of(text, self.schema(function, parameter), self.parameters.get(function, {}))


# reading values


def quoted(text: str) -> str:
    """`text` as a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def json_of(text: str, schema: Schema | None, root: Schema) -> str:
    """The JSON source of a value written as bare text. Strings are verbatim; tables and lists keep their own source."""
    schema = None if schema is None else resolved(schema, root)
    allowed = None if schema is None else kinds(schema, root, set()) or None  # none at all: a circle
    if allowed == {"string"} or (schema is not None and text in members(schema)):
        return quoted(text)
    source = WORDS.get(text.strip(), text.strip())
    try:
        value = json.loads(source, parse_constant=not_json)
    except (ValueError, RecursionError):
        return quoted(text)
    if schema is not None and ("enum" in schema or "const" in schema):
        return source if any(same(value, member) for member in members(schema)) else quoted(text)
    kind = kind_of(value)
    if allowed is None or kind in allowed - {"string"} or (kind == "integer" and "number" in allowed):
        return source
    if kind == "number" and "integer" in allowed and value.is_integer():
        return str(int(value))
    return quoted(text)


def not_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def same(value: Any, member: Any) -> bool:
    """Equality without Python's True == 1."""
    return value == member and isinstance(value, bool) == isinstance(member, bool)


def kind_of(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}
    return names.get(type(value), "null")


def members(schema: Schema) -> list[Any]:
    """The values that an enumeration allows; none where it is not one."""
    return [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else ())]


def kinds(schema: Any, root: Schema, visited: set[str]) -> set[str] | None:
    """The JSON types that a schema allows, None: all. `visited`: references on the way, each followed once."""
    if not isinstance(schema, Mapping):
        return None
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference in visited or len(visited) > MOST_REFERENCES:
            return set() if reference in visited else None
        visited.add(reference)
        return kinds(target(reference, root), root, visited)
    if "enum" in schema or "const" in schema:
        return {kind_of(member) for member in members(schema)}
    if "type" in schema:
        return {schema["type"]} if isinstance(schema["type"], str) else set(schema["type"])
    for word in ALTERNATIVES:
        if word in schema:
            return combined([kinds(one, root, visited) for one in schema[word]], all_hold=word == "allOf")
    return None


def combined(each: list[set[str] | None], all_hold: bool) -> set[str] | None:
    known = [one for one in each if one is not None]
    if all_hold:
        return set.intersection(*filter(None, known)) if any(known) else None
    return None if len(known) < len(each) else set().union(*known)


def resolved(schema: Schema, root: Schema) -> Schema:
    """The schema that a chain of local references ends in; an empty one where it ends in nothing."""
    visited = set()
    while isinstance(reference := schema.get("$ref"), str) and reference not in visited:
        visited.add(reference)
        schema = target(reference, root)
    return schema


def target(reference: str, root: Schema) -> Schema:
    """What "#/$defs/Place" names in `root`."""
    place: Any = root
    for word in reference.removeprefix("#").split("/")[1:] if reference.startswith("#") else [""]:
        place = place.get(word.replace("~1", "/").replace("~0", "~")) if isinstance(place, Mapping) else None
    return place if isinstance(place, Mapping) else {}


# checking definitions


def check_size(definitions: Any, limits: ToolLimits) -> None:
    """Refuses what is too much, too deep, or no JSON at all, before anything walks through it by recursion."""
    if not isinstance(definitions, Sequence) or isinstance(definitions, str):
        raise Refusal(f"tools of type {type(definitions).__name__}", "a list of definitions", "give a list")
    if len(definitions) > limits.count:
        raise Refusal(f"{len(definitions)} tools", f"at most {limits.count}", "offer fewer")
    level, depth = list(definitions), 1
    while level:
        if depth > limits.depth:
            raise Refusal("tool definitions nested too deeply", f"{limits.depth} levels", "flatten their schemas")
        level, depth = [inner for value in level for inner in inside(value)], depth + 1
    size = len(json.dumps(list(definitions), ensure_ascii=False))
    if size > limits.characters:
        raise Refusal(f"tool definitions of {size} characters", f"at most {limits.characters}", "shorten them")


def inside(value: Any) -> Iterator[Any]:
    """The values that a table or list holds."""
    if isinstance(value, dict):
        for key, inner in value.items():
            check_text(key)
            yield inner
    elif isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, str):
        check_text(value)
    elif not (value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))):
        raise Refusal(f"{value!r:.60} in a tool definition", "JSON values", "write the definition as JSON")


def check_text(text: Any) -> None:
    if not isinstance(text, str) or any("\ud800" <= sign <= "\udfff" for sign in text):
        raise Refusal(f"{text!r:.60} in a tool definition", "text that UTF-8 can spell", "correct the definition")


def checked_tool(tool: Any, place: int) -> dict[str, Any]:
    """The function of a definition, without what is empty and without `strict`, which is not the model's business."""
    where = f"tool {place}"
    if not isinstance(tool, Mapping):
        raise malformed(where, f"a {type(tool).__name__}", "a table")
    if tool.get("type", "function") != "function":
        raise malformed(where, f"of type {tool['type']!r:.60}", "'function'")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping):
        raise malformed(where, f"function = {function!r:.60}", "a table with a name")
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise malformed(where, f"name = {name!r:.60}", "1 to 128 of A-Z a-z 0-9 _ . : / -")
    if not isinstance(function.get("description"), str | None):
        raise malformed(name, "a description that is no text", "text")
    parameters = function.get("parameters")
    if parameters is not None:
        check_schema(parameters, f"{name}: parameters")
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise malformed(name, "parameters that are no object", "a JSON schema of type object")
        for parameter in parameters.get("properties", {}):
            if not PARAMETER.fullmatch(parameter):
                raise malformed(name, f"parameter {parameter!r:.60}", "1 to 128 characters, none of < > or line ends")
    return {key: value for key, value in function.items() if value is not None and key not in ("strict", "type")}


def check_schema(root: Any, where: str) -> None:
    """Refuses a JSON schema whose words are of the wrong shape, what it refers to included; lets unknown words pass."""
    waiting, visited = [(where, root)], set()
    while waiting:
        where, schema = waiting.pop()
        if isinstance(schema, bool):
            continue
        if not isinstance(schema, Mapping):
            raise malformed(where, f"a {type(schema).__name__}", "a JSON schema: a table, true or false")
        check_words(schema, where)
        reference = schema.get("$ref")
        if reference is not None and reference not in visited:
            visited.add(reference)
            waiting.append((f"{where}: {reference:.60}", target(reference, root)))
        waiting += [(f"{where}.{label:.60}", inner) for label, inner in subschemas(schema)]


def check_words(schema: Schema, where: str) -> None:
    """Refuses words of one schema that are of the wrong shape."""
    named = schema.get("type", "object")
    listed = isinstance(named, list | tuple) and len(named) > 0
    if not all(isinstance(one, str) and one in KINDS for one in (named if listed else [named])):
        raise malformed(where, f"type = {named!r:.60}", ", ".join(KINDS))
    for word, shape in (("pattern", str), ("$ref", str), ("properties", Mapping), ("$defs", Mapping)):
        if word in schema and not isinstance(schema[word], shape):
            raise malformed(where, f"{word} = {schema[word]!r:.60}", "text" if shape is str else "a table")
    for word in ("enum", "required", *ALTERNATIVES):
        listed = isinstance(schema.get(word, []), list | tuple)
        if not listed or (word in schema and word != "required" and not schema[word]):
            raise malformed(where, f"{word} = {schema[word]!r:.60}", "a list that is not empty")
    if not all(isinstance(name, str) for name in schema.get("required", ())):
        raise malformed(where, f"required = {schema['required']!r:.60}", "a list of names")


def subschemas(schema: Schema) -> Iterator[tuple[str, Any]]:
    """(where, schema) of every schema directly inside one."""
    for word in ("properties", "$defs", "definitions", "patternProperties"):
        if isinstance(schema.get(word), Mapping):
            yield from ((str(name), inner) for name, inner in schema[word].items())
    for word in ALTERNATIVES:
        yield from ((f"{word}[{place}]", inner) for place, inner in enumerate(schema.get(word, ())))
    items = schema.get("items")
    if isinstance(items, list | tuple):
        yield from ((f"items[{place}]", inner) for place, inner in enumerate(items))
    elif items is not None:
        yield "items", items
    for word in ("additionalProperties", "not"):
        if word in schema:
            yield word, schema[word]


def malformed(where: str, found: str, allowed: str) -> Refusal:
    return Refusal(f"{where}: {found}", allowed, "correct the tool's definition")
