"""A server that drafts says what one that does not would say, budgets and forms included."""

import pytest

from tests.serve.conftest import SKY, SUM, WEATHER, chat, events
from trimaran.serve.main import running

ASKED = [
    {},
    {"temperature": 1.3, "seed": 5, "n": 2, "max_tokens": 40},
    {"thinking_token_budget": 5, "max_tokens": 40},
    {"thinking_token_budget": 0, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 90},
    {"stop": ["four"], "max_tokens": 40},
    {"guided_regex": "[ab]{3,9}c", "temperature": 1.5, "seed": 2, "thinking_token_budget": 3},
]


def without_names(said):
    """The choices, less the ids that calls are given."""
    for choice in said["choices"]:
        for call in choice["message"].get("tool_calls", []):
            call.pop("id")
    return said["choices"]


@pytest.fixture(scope="module", params=["mtp", "lookup"])
def drafting(folder, request):
    with running(folder, ["serve.port=0", f"engine.drafter={request.param}", "engine.draft=3"]) as server:
        yield server


@pytest.mark.parametrize("place", range(len(ASKED)))
def test_drafting_changes_no_answer(server, drafting, place):
    fields = ASKED[place]
    message = SKY if "tools" in fields else SUM
    plain, drafted = chat(server, message, **fields), chat(drafting, message, **fields)
    assert plain[0] == drafted[0] == 200
    assert without_names(plain[1]) == without_names(drafted[1])
    assert plain[1]["usage"]["completion_tokens_details"] == drafted[1]["usage"]["completion_tokens_details"]


def test_the_usage_tells_of_drafts(drafting):
    asked = {"messages": [SUM], "temperature": 0, "max_tokens": 40, "stream_options": {"include_usage": True}}
    work = events(drafting, "/v1/chat/completions", asked)[-1]["usage"]["x_trimaran"]
    assert 0 <= work["accepted"] <= work["drafted"] and work["passes"] > 0
    assert work["drafted"] > 0 or drafting.service.runner.engine.settings.drafter == "lookup"
