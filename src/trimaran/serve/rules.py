"""What narrows the engine's choices on behalf of a request: the budget of its thought, the form of its answer."""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from trimaran.engine.budget import Thinking
from trimaran.engine.constrain import Constraint, ConstraintLimits, Constraints
from trimaran.engine.guide import Guide, Guides
from trimaran.errors import Refusal
from trimaran.serve.calls import call_grammar
from trimaran.serve.problem import Problem, refused
from trimaran.serve.reasoning import Reasoning
from trimaran.serve.requests import ChatRequest, Generation, NamedTool, ObjectFormat, SchemaFormat
from trimaran.text.tokenizer import Tokenizer
from trimaran.text.tools import Tools

KEPT = 64  # compiled forms: clients tend to ask for the same one again
ANY_OBJECT = {"type": "object"}

Form = tuple[str, str]  # a method of `Constraints`, and its argument as JSON


class Forms:
    """Compiled forms of answers for one tokenizer. Made by the first request that wants one."""

    def __init__(self, tokenizer: Tokenizer, limits: ConstraintLimits):
        self.tokenizer, self.limits = tokenizer, limits
        self.constraints = lru_cache(maxsize=1)(lambda: Constraints(tokenizer, limits))
        self.compiled = lru_cache(maxsize=KEPT)(self._compiled)

    def _compiled(self, form: Form) -> Constraint:
        kind, source = form
        compiled: Constraint = getattr(self.constraints(), kind)(json.loads(source))
        return compiled


def guide_of(
    body: Generation,
    forms: Forms,
    tools: Tools | None = None,
    reasoning: Reasoning | None = None,
    opened: bool = False,
) -> Callable[[], Guide] | None:
    """What makes the guide of each sample; None where nothing is narrowed."""
    tokenizer = forms.tokenizer
    makers: list[Callable[[], Guide]] = []
    if reasoning is not None and reasoning.budget is not None:
        budget, grace = reasoning.budget, reasoning.grace
        makers.append(lambda: Thinking(tokenizer, budget, grace, opened=opened))
    form, param = form_of(body, tools, tokenizer)
    if form is not None:
        try:
            constraint = forms.compiled(form)
        except Refusal as problem:
            raise refused(problem, param) from None
        makers.append(lambda: constraint.guide(opened=opened))
    if len(makers) < 2:
        return makers[0] if makers else None
    return lambda: Guides(*(maker() for maker in makers))


def form_of(body: Generation, tools: Tools | None, tokenizer: Tokenizer) -> tuple[Form | None, str | None]:
    """The form that an answer is to have, and the field that asks for it."""
    asked = {name: form for name, form in forms_asked(body).items() if form is not None}
    if len(asked) > 1:
        message = f"{' and '.join(asked)}: an answer has one form; leave the others out"
        raise Problem(400, message, param=list(asked)[1])
    param, form = next(iter(asked.items()), (None, None))
    if tools is None or not isinstance(body, ChatRequest):
        return form, param
    names, choice = tools.names, body.tool_choice
    if isinstance(choice, NamedTool):
        names = [choice.function.name]
    elif choice != "required":
        if form is None:
            return None, None
        if form[0] != "schema":
            raise Problem(400, f"{param} with tools; set tool_choice to none, or leave the tools out", param=param)
    # Where calls are a matter of choice, an answer of the form is the other choice.
    otherwise = json.loads(form[1]) if form is not None and choice in (None, "auto") else None
    one = isinstance(choice, NamedTool) or body.parallel_tool_calls is False
    grammar = call_grammar(tools, tokenizer, names, one=one, otherwise=otherwise)
    return ("grammar", json.dumps(grammar)), "tools"


def forms_asked(body: Generation) -> dict[str, Form | None]:
    """Every field that names a form, and the form."""
    wanted: Any = body.response_format
    asked: dict[str, Form | None] = {"response_format": None}
    if isinstance(wanted, ObjectFormat):
        asked["response_format"] = schema_form(ANY_OBJECT)
    elif isinstance(wanted, SchemaFormat):
        asked["response_format"] = schema_form(wanted.json_schema.schema_ or ANY_OBJECT)
    outputs = body.structured_outputs
    if outputs is not None:
        given = {
            "json": outputs.json_,
            "regex": outputs.regex,
            "choice": outputs.choice,
            "grammar": outputs.grammar,
            "json_object": outputs.json_object or None,
        }
        asked |= {f"structured_outputs.{name}": form(name, value) for name, value in given.items()}
    asked["guided_json"] = form("json", body.guided_json)
    asked["guided_regex"] = form("regex", body.guided_regex)
    asked["guided_choice"] = form("choice", body.guided_choice)
    asked["guided_grammar"] = form("grammar", body.guided_grammar)
    return asked


def form(name: str, value: Any) -> Form | None:
    """vLLM's name of a form and its value as a method of `Constraints` and its argument."""
    if value is None:
        return None
    if name == "json_object":
        return schema_form(ANY_OBJECT)
    return schema_form(value) if name == "json" else (name, json.dumps(value))


def schema_form(schema: Any) -> Form:
    """A JSON schema, as a table or as its source."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as problem:
            raise Problem(400, f"a schema that is no JSON: {problem}", param="guided_json") from None
    return "schema", json.dumps(schema)
