"""What narrows the engine's choices on behalf of a request: the budget of its thought, the form of its answer."""

from collections.abc import Callable

from trimaran.engine.budget import Thinking
from trimaran.engine.guide import Guide
from trimaran.serve.reasoning import Reasoning
from trimaran.serve.requests import Generation
from trimaran.serve.service import Service
from trimaran.text.tools import Tools


def guide_of(
    body: Generation,
    service: Service,
    tools: Tools | None = None,
    reasoning: Reasoning | None = None,
    opened: bool = False,
) -> Callable[[], Guide] | None:
    """What makes the guide of each sample; None where nothing is narrowed."""
    if reasoning is None or reasoning.budget is None or service.folder.base:
        return None
    budget, grace, tokenizer = reasoning.budget, reasoning.grace, service.tokenizer
    return lambda: Thinking(tokenizer, budget, grace, opened=opened)
