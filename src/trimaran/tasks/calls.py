"""Tool calls by JSON schema: a request in words, some tools on offer, one right call with the right typed arguments."""

import json
from collections.abc import Mapping
from random import Random
from typing import Any, ClassVar, Literal

from pydantic import Field

from trimaran.tasks.draw import drawn
from trimaran.tasks.task import REWARD, Message, Prompt, Split, Task, Trace
from trimaran.tasks.toolbox import TOOLBOX, Made, message, only_call, parsed, same


class Calls(Task):
    """One call for one request. A tool that is not offered, a malformed call and several calls are worth nothing.

    offered: tools to choose from, the right one among them. form: "native", tools and calls as the chat template writes
    them; "json", tools as signatures in the question and the call as JSON in the answer, {"timer": {"minutes": 5}}, for
    models whose context is too dear for a template's instructions. A request is held out with its arguments.
    """

    name: ClassVar[str] = "calls"
    offered: int = Field(2, ge=1, le=len(TOOLBOX))
    form: Literal["native", "json"] = "native"

    def prompt(self, number: int, split: Split = "train") -> Prompt:
        text, wanted, names = drawn(self.name, number, split, self._make, lambda made: identity(made[1]))
        tools = [tool for name in names for tool in TOOLBOX if tool.name == name]
        definitions = tuple(tool.definition() for tool in tools) if self.form == "native" else ()
        if self.form == "json":
            text = "\n".join([*(signature(tool.definition()["function"]) for tool in tools), text])
        messages = ({"role": "user", "content": text},)
        secret = {"name": wanted.name, "arguments": wanted.arguments}
        return Prompt(self.name, split, number, messages, definitions, secret, thinking=False)

    def gold(self, prompt: Prompt) -> tuple[Message, ...]:
        wanted = Made(**prompt.secret)
        if self.form == "native":
            return (message([wanted]),)
        return ({"role": "assistant", "content": json.dumps({wanted.name: wanted.arguments})},)

    def score(self, trace: Trace) -> dict[str, float]:
        """`reward`; `called`: a call was made that could be carried out; `tool`: it was the right tool."""
        call, wanted = self._call(trace), Made(**trace.prompt.secret)
        tool = call is not None and call.name == wanted.name
        right = call is not None and tool and same(call.arguments, wanted.arguments)
        return {REWARD: float(right), "called": float(call is not None), "tool": float(tool)}

    def _call(self, trace: Trace) -> Made | None:
        if self.form == "native":
            return only_call(trace.messages[-1]) if trace.finish == "stop" and trace.messages else None
        table = parsed(trace.final or "")
        if not isinstance(table, Mapping) or len(table) != 1:
            return None
        [(name, arguments)] = table.items()
        return Made(name, arguments) if isinstance(arguments, Mapping) else None

    def _make(self, random: Random) -> tuple[str, Made, list[str]]:
        tool, *others = random.sample(TOOLBOX, self.offered)
        text, wanted = tool.request(random)
        names = [tool.name, *(other.name for other in others)]
        random.shuffle(names)
        return text, wanted, names


def identity(wanted: Made) -> str:
    """The call, whatever words ask for it, whatever else is offered, in whatever order its lists stand."""
    arguments = {name: sorted(value) if isinstance(value, list) else value for name, value in wanted.arguments.items()}
    return f"call {wanted.name} {json.dumps(arguments)}"


def signature(function: Mapping[str, Any]) -> str:
    """light(room: string, level: integer)"""
    parameters = function["parameters"]["properties"]
    return f"{function['name']}({', '.join(f'{name}: {written(schema)}' for name, schema in parameters.items())})"


def written(schema: Mapping[str, Any]) -> str:
    """A type in short: integer, or string[] for a list of strings."""
    return f"{schema['items']['type']}[]" if "items" in schema else str(schema["type"])
