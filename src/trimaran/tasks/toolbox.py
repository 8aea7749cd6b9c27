"""Tool calls as a score may trust them, and the tools that the small tasks offer.

A call counts only if it is whole: the one call of its answer, JSON without a key twice, the very types of the schema.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from trimaran.tasks.task import Message

LONGEST = 10_000  # characters of arguments that are read at all
KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
TAGS = ("<tool_call>", "</tool_call>", "<function=", "</function>", "<think>", "</think>")


@dataclass(frozen=True)
class Made:
    """A call that can be carried out."""

    name: str
    arguments: Mapping[str, Any]


def definition(name: str, parameters: Mapping[str, Mapping[str, Any]], description: str = "") -> dict[str, Any]:
    """A tool of OpenAI's form that needs all of `parameters`."""
    schema = {"type": "object", "properties": dict(parameters), "required": list(parameters)}
    said = {"description": description} if description else {}
    return {"type": "function", "function": {"name": name, **said, "parameters": schema}}


def message(calls: Sequence[Made], place: int = 0) -> dict[str, Any]:
    """An assistant's message that makes `calls`; `place`: its place in the episode, which names them."""
    made = [
        {
            "id": f"call_{place}_{number}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
        }
        for number, call in enumerate(calls)
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


def made(call: Mapping[str, Any]) -> Made | None:
    """A call of a message as written by the model, or None where nobody could carry it out."""
    function = call.get("function", call)
    name, arguments = function.get("name"), function.get("arguments", {})
    read = parsed(arguments) if isinstance(arguments, str) else arguments
    return Made(name, read) if isinstance(name, str) and isinstance(read, Mapping) else None


def only_call(answer: Message) -> Made | None:
    """The call of a message that makes exactly one and does not try for others in its text."""
    calls = list(answer.get("tool_calls") or [])
    tried = any(tag in str(answer.get("content") or "") for tag in TAGS)
    return made(calls[0]) if len(calls) == 1 and not tried else None


def parsed(text: str) -> Any:
    """The value of JSON source; None for what is not JSON, has a key twice, or is longer than any right answer."""
    if len(text) > LONGEST:
        return None
    try:
        return json.loads(text, object_pairs_hook=table, parse_constant=no_json)
    except (ValueError, RecursionError):
        return None


def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. What two readers may read differently, because a key stands there twice, is none."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)


def no_json(constant: str) -> None:
    """Python reads NaN and Infinity; JSON has none."""
    raise ValueError(f"{constant} is no JSON")


def same(one: Any, other: Any) -> bool:
    """Equality of JSON values: no True that is 1, but 5.0 is 5."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


@dataclass(frozen=True)
class Tool:
    """A tool with what may be asked of it.

    values: what each argument is drawn from; a list of one list means: some of its items. phrases: requests with the
    arguments in braces; one that goes with a certain value of a boolean stands under that value.
    """

    name: str
    values: Mapping[str, Sequence[Any]]
    phrases: Sequence[str] | Mapping[bool, Sequence[str]]

    def definition(self) -> dict[str, Any]:
        return definition(self.name, {name: self.schema(values) for name, values in self.values.items()})

    def schema(self, values: Sequence[Any]) -> dict[str, Any]:
        kind = KINDS[type(values[0])]
        return {"type": kind, "items": {"type": KINDS[type(values[0][0])]}} if kind == "array" else {"type": kind}

    def request(self, random: Random) -> tuple[str, Made]:
        """A request in words, and the call that it wants."""
        arguments = {name: self.value(random, values) for name, values in self.values.items()}
        flag = next((value for value in arguments.values() if isinstance(value, bool)), False)
        phrases = self.phrases[flag] if isinstance(self.phrases, Mapping) else self.phrases
        shown = {name: spoken(value) for name, value in arguments.items()}
        return random.choice(phrases).format(**shown), Made(self.name, arguments)

    def value(self, random: Random, values: Sequence[Any]) -> Any:
        value = random.choice(values)
        return random.sample(value, random.randint(2, 3)) if isinstance(value, list) else value


def spoken(value: Any) -> str:
    """An argument inside a sentence."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


PEOPLE = ("Ann", "Bo", "Cleo", "Dan", "Eve", "Finn", "Gus", "Ida")
ROOMS = ("hall", "kitchen", "cabin", "deck", "attic", "study")
NUMBERS = range(1, 100)

TOOLBOX = (
    Tool("timer", {"minutes": NUMBERS}, ("Wake me in {minutes} minutes.", "Set a timer to {minutes} minutes.")),
    Tool("light", {"room": ROOMS, "level": NUMBERS}, ("Light in the {room} to {level}.", "Set the {room} to {level}.")),
    Tool(
        "door",
        {"room": ROOMS, "locked": (True, False)},
        {True: ("Lock the {room}.", "Close up the {room}."), False: ("Unlock the {room}.", "Open up the {room}.")},
    ),
    Tool("call", {"person": PEOPLE}, ("Call {person}.", "Ring {person} up.")),
    Tool("pay", {"person": PEOPLE, "amount": NUMBERS}, ("Pay {person} {amount}.", "Send {amount} to {person}.")),
    Tool(
        "heat",
        {"room": ROOMS, "degrees": [half / 2 for half in range(31, 51, 2)]},
        ("Heat the {room} to {degrees}.", "Make it {degrees} in the {room}."),
    ),
    Tool("add", {"numbers": [list(NUMBERS)]}, ("Add up {numbers}.", "The sum of {numbers}.")),
    Tool("invite", {"people": [list(PEOPLE)]}, ("Invite {people}.", "Ask {people} to come.")),
)
