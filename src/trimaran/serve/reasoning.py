"""One wish in many spellings: whether to think, how hard, and for how many tokens."""

import re
from dataclasses import dataclass, field
from typing import Any

from trimaran.errors import nearest_first
from trimaran.serve.problem import Problem
from trimaran.serve.requests import ChatRequest
from trimaran.serve.settings import ServeSettings

# reasoning_effort: (whether to think, what the template is told). High and beyond are how the model thinks untold.
EFFORTS: dict[str, tuple[bool, str | None]] = {
    "none": (False, None),
    "minimal": (True, "low"),
    "low": (True, "low"),
    "medium": (True, "medium"),
    "high": (True, None),
    "xhigh": (True, None),
    "max": (True, None),
}
NIM_GRACE = 10  # NIM waits for the end of a line for a tenth of the budget

# Names of chat_template_kwargs with a meaning of their own here; a template's other variables are passed on.
SWITCHES = ("enable_thinking", "thinking", "low_effort", "medium_effort", "force_nonempty_content")
HISTORY = ("truncate_history_thinking", "keep_thoughts")
OURS = (*SWITCHES, *HISTORY, "reasoning_budget")
TAKEN = ("messages", "tools", "add_generation_prompt", "generation_prompt", "bos_token", "eos_token", "pad_token")


@dataclass(frozen=True)
class Reasoning:
    """thinking: whether the prompt opens a thought. budget: most tokens in it, None: no end to them; grace: tokens past
    the budget to wait for the end of a line. effort, told, keep_thoughts, variables: what the template is told (`told`
    is a budget it is to mention). swap: whether an answer that is all thought is handed out as content.
    """

    thinking: bool
    budget: int | None
    grace: int
    effort: str | None = None
    told: int | None = None
    keep_thoughts: bool = False
    swap: bool = False
    variables: dict[str, Any] = field(default_factory=dict)

    def template_options(self) -> dict[str, Any]:
        """Options of `encode_chat`."""
        own = {"thinking": self.thinking, "effort": self.effort, "budget": self.told}
        return {**self.variables, **own, "keep_thoughts": self.keep_thoughts}


def reasoning_of(body: ChatRequest, settings: ServeSettings, template: str) -> Reasoning:
    """What a request wants, read from all the fields that may say it; those that disagree are refused."""
    said = body.chat_template_kwargs or {}
    check_variables(said, template)
    effort_thinks, effort = EFFORTS[body.reasoning_effort] if body.reasoning_effort else (None, None)
    thinking = agreed(
        {
            "reasoning_effort": effort_thinks,
            "chat_template_kwargs.enable_thinking": said.get("enable_thinking"),
            "chat_template_kwargs.thinking": said.get("thinking"),
        }
    )
    if body.reasoning_effort is None:
        effort = "low" if said.get("low_effort") else "medium" if said.get("medium_effort") else None
    budget, nim = budget_of(body)
    if budget is None:
        budget = settings.reasoning_budget
    grace = body.reasoning_grace
    if grace is None:
        grace = (budget or 0) // NIM_GRACE if nim else settings.reasoning_grace
    return Reasoning(
        thinking=settings.thinking if thinking is None else thinking,
        budget=budget,
        grace=grace,
        effort=effort,
        told=said.get("reasoning_budget"),
        keep_thoughts=bool(said.get("keep_thoughts", not said.get("truncate_history_thinking", True))),
        swap=bool(said.get("force_nonempty_content", False)),
        variables={name: value for name, value in said.items() if name not in OURS},
    )


def budget_of(body: ChatRequest) -> tuple[int | None, bool]:
    """The budget, and whether NIM's spelling alone named it."""
    nim = body.nvext.max_thinking_tokens if body.nvext else None
    spellings = {
        "thinking_token_budget": body.thinking_token_budget,
        "reasoning_budget": body.reasoning_budget,
        "thinking_budget": body.thinking_budget,
        "chat_template_kwargs.reasoning_budget": (body.chat_template_kwargs or {}).get("reasoning_budget"),
        "nvext.max_thinking_tokens": nim,
    }
    named = [name for name, value in spellings.items() if value is not None]
    return agreed(spellings), named == ["nvext.max_thinking_tokens"]


def agreed(spellings: dict[str, Any]) -> Any:
    """The one value that all spellings in use give; None when there are none."""
    given = [(name, value) for name, value in spellings.items() if value is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            message = f"{given[0][0]} = {given[0][1]} and {name} = {value} disagree; leave one out"
            raise Problem(400, message, param=name)
    return given[0][1] if given else None


def check_variables(said: dict[str, Any], template: str) -> None:
    """Refuses template variables of another kind, and those that the template would never read."""
    for name, value in said.items():
        place = f"chat_template_kwargs.{name}"
        if name in (*SWITCHES, *HISTORY):
            if not isinstance(value, bool):
                raise Problem(400, f"{place} = {value!r}; allowed: true or false", param=place)
        elif name == "reasoning_budget":
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise Problem(400, f"{place} = {value!r}; allowed: an integer of 0 or more", param=place)
        elif name in TAKEN or name not in set(re.findall(r"\w+", template)):
            known = ", ".join(nearest_first(name, OURS)[:3])
            raise Problem(400, f"the chat template has no {name!r}; the nearest known: {known}", param=place)
