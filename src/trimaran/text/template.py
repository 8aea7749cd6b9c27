"""Chat templates: messages -> one string with control tokens in it, as transformers' `apply_chat_template` gives it.

The Nemotron-3 template ships with every run; a folder that brings its own is read with that one.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trimaran.errors import Refusal

Message = Mapping[str, Any]

NEMOTRON_3 = Path(__file__).parent / "templates" / "nemotron_3.jinja"
EFFORTS = ("low", "medium")
MARKS = "generation marks"  # no name that a template could write
ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def render(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    generation_prompt: bool = True,
    budget: int | None = None,
    effort: str | None = None,
    keep_thoughts: bool = False,
    template: str | None = None,
    **variables: Any,
) -> str:
    """The chat as one string, by `template` (jinja source; Nemotron-3's where None).

    thinking            whether the generation prompt opens a thought, or closes an empty one
    generation_prompt   whether to end with what the assistant's answer starts with
    budget              tokens of thought to ask for;  effort  "low" or "medium"
    keep_thoughts       keep the thoughts of answers before the last question, too
    variables           more of what a foreign template reads, such as bos_token
    """
    options: dict[str, Any] = {"thinking": thinking, "generation_prompt": generation_prompt, "budget": budget}
    options |= {"effort": effort, "keep_thoughts": keep_thoughts, "tools": tools}
    source = NEMOTRON_3.read_text(encoding="utf-8") if template is None else template
    return fill(compiled(source), messages, options | variables)


def fill(template: jinja2.Template, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
    """The template's text. `options` are those of `render`, passed on under the names that templates use."""
    variables = {"thinking": True, "generation_prompt": True, "keep_thoughts": False, **options}
    effort, budget = variables.pop("effort", None), variables.pop("budget", None)
    if effort not in (None, *EFFORTS):
        raise Refusal(f"effort = {effort!r}", ", ".join(EFFORTS), "choose one, or leave it out")
    if budget is not None and budget < 0:
        raise Refusal(f"budget = {budget}", "0 or more tokens", "correct the thinking budget")
    if effort is not None:
        variables[f"{effort}_effort"] = True
    if budget is not None:
        variables["reasoning_budget"] = budget
    variables["add_generation_prompt"] = variables.pop("generation_prompt")
    variables["enable_thinking"] = variables.pop("thinking")
    variables["truncate_history_thinking"] = not variables.pop("keep_thoughts")
    variables["tools"] = list(variables.get("tools") or []) or None
    try:
        return template.render(messages=[checked(message) for message in messages], **variables)
    except jinja2.TemplateError as problem:
        raise Refusal(f"the chat template says: {problem}", "messages that it takes", "change the messages") from None


def checked(message: Message) -> dict[str, Any]:
    """A message as templates expect it: a known shape of role, tool arguments as tables."""
    role = message.get("role")
    if not isinstance(role, str) or not ROLE.fullmatch(role):
        raise Refusal(f"role {role!r}", "system, user, assistant, tool", "give every message a role")
    content = message.get("content")
    if content is not None and not isinstance(content, str | list | tuple):
        raise Refusal(f"content of type {type(content).__name__}", "a string or a list of parts", "write it as text")
    calls = message.get("tool_calls")
    return dict(message) | ({"tool_calls": [checked_call(call) for call in calls]} if calls else {})


def checked_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are a table; OpenAI's protocol writes them as a JSON string."""
    inner = dict(call.get("function", call))
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        try:
            inner["arguments"] = json.loads(arguments)
        except json.JSONDecodeError as problem:
            raise Refusal(f"tool arguments {arguments!r} ({problem})", "a JSON object", "correct them") from None
    if not isinstance(inner.get("arguments", {}), Mapping):
        raise Refusal(f"tool arguments {arguments!r}", "a JSON object", "name each argument")
    return dict(call) | {"function": inner} if "function" in call else inner


@cache
def compiled(source: str, marks: tuple[str, str] = ("", "")) -> jinja2.Template:
    """The template, in a sandbox set up as transformers sets up its own, so that both render alike.

    `marks` go round what the template declares to be the assistant's, with `{% generation %}`.
    """
    extensions = [GenerationBlock, loopcontrols]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.globals[MARKS] = marks
    sandbox.filters["tojson"] = to_json
    sandbox.globals["raise_exception"] = refuse
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return sandbox.from_string(source)
    except jinja2.TemplateSyntaxError as problem:
        raise Refusal(f"chat template, line {problem.lineno}: {problem}", "jinja", "correct the template") from None


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    """jinja's own tojson escapes <, > and & for web pages, which no chat format wants."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


class GenerationBlock(Extension):
    """`{% generation %} … {% endgeneration %}`, which some templates write round what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 (jinja declares it so)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("enclose"), [], [], body).set_lineno(line)

    def enclose(self, caller: Any) -> str:
        marks: Any = self.environment.globals[MARKS]
        before, after = marks
        return before + caller() + after
