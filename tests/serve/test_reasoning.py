"""Thinking on and off, and its budget, in everybody's spelling."""

import pytest

from tests.serve.conftest import SUM, THOUGHT, call, chat, events
from trimaran.serve.main import running
from trimaran.serve.reasoning import NIM_GRACE

OFF = [
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template_kwargs": {"thinking": False}},
    {"reasoning_effort": "none"},
    {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": False}},
]
BUDGETS = [
    lambda budget: {"thinking_token_budget": budget},
    lambda budget: {"reasoning_budget": budget},
    lambda budget: {"thinking_budget": budget},
    lambda budget: {"nvext": {"max_thinking_tokens": budget}, "reasoning_grace": 0},
    lambda budget: {"thinking_token_budget": budget, "nvext": {"max_thinking_tokens": budget}},
]


def tokens_of(tokenizer, text):
    return len(tokenizer.encode(text))


def reasoning_tokens(said):
    return said["usage"]["completion_tokens_details"]["reasoning_tokens"]


@pytest.mark.parametrize("fields", OFF)
def test_thinking_is_switched_off(server, fields):
    status, said = chat(server, **fields)
    message = said["choices"][0]["message"]
    assert (status, message["content"], reasoning_tokens(said)) == (200, "It is four.", 0)
    assert "reasoning" not in message and "reasoning_content" not in message


@pytest.mark.parametrize("spelled", BUDGETS)
@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_budget_is_met_exactly(server, spelled, budget):
    status, said = chat(server, **spelled(budget), max_tokens=40)
    assert status == 200 and reasoning_tokens(said) == budget
    assert THOUGHT.startswith(said["choices"][0]["message"].get("reasoning", ""))


def test_a_budget_is_met_in_a_stream(server):
    asked = {"messages": [SUM], "temperature": 0, "max_tokens": 40, "thinking_token_budget": 5}
    told = events(server, "/v1/chat/completions", {**asked, "stream_options": {"continuous_usage_stats": True}})
    counts = [event["usage"]["completion_tokens_details"]["reasoning_tokens"] for event in told]
    assert counts == sorted(counts) and counts[-1] == 5


def test_a_budget_that_is_enough_changes_nothing(server):
    free, bound = chat(server)[1], chat(server, thinking_token_budget=500)[1]
    assert free["choices"] == bound["choices"]


def test_grace_waits_for_the_end_of_the_line(server, tokenizer):
    line = tokens_of(tokenizer, THOUGHT.split("\n")[0] + "\n")
    short = line - 2
    for fields, spent in (
        ({"thinking_token_budget": short}, short),
        ({"thinking_token_budget": short, "reasoning_grace": 1}, short + 1),
        ({"thinking_token_budget": short, "reasoning_grace": 100}, line),
        ({"nvext": {"max_thinking_tokens": short}}, short + short // NIM_GRACE),
    ):
        assert reasoning_tokens(chat(server, **fields, max_tokens=40)[1]) == spent, fields


def test_the_server_s_own_budget_gives_way_to_the_request_s(folder):
    with running(folder, ["serve.port=0", "serve.reasoning_budget=3", "serve.thinking=false"]) as server:
        assert chat(server)[1]["choices"][0]["message"]["content"] == "It is four."
        on = {"chat_template_kwargs": {"enable_thinking": True}, "max_tokens": 40}
        assert reasoning_tokens(chat(server, **on)[1]) == 3
        assert reasoning_tokens(chat(server, **on, thinking_token_budget=6)[1]) == 6


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking_token_budget": 3, "thinking_budget": 4},
        {"reasoning_budget": 3, "nvext": {"max_thinking_tokens": 2}},
        {"reasoning_budget": 0, "chat_template_kwargs": {"reasoning_budget": 1}},
        {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
    ],
)
def test_spellings_that_disagree_are_refused(server, fields):
    status, said = chat(server, **fields)
    assert status == 400 and "disagree" in said["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"chat_template_kwargs": {"enable_thinkin": False}}, "the nearest known: enable_thinking"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "true or false"),
        ({"chat_template_kwargs": {"messages": []}}, "has no 'messages'"),
        ({"chat_template_kwargs": {"reasoning_budget": True}}, "an integer"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
        ({"nvext": {"max_thinking_token": 3}}, "max_thinking_tokens"),
        ({"reasoning_effort": "hard"}, "reasoning_effort"),
    ],
)
def test_what_would_be_ignored_is_refused(server, fields, said):
    status, answer = chat(server, **fields)
    assert status == 400 and said in answer["error"]["message"]


def test_a_budget_told_to_the_model_stands_in_its_prompt(server, tokenizer):
    plain, told = (
        chat(server, **fields, max_tokens=1)[1]["usage"]["prompt_tokens"]
        for fields in ({}, {"chat_template_kwargs": {"reasoning_budget": 7}})
    )
    assert told == plain + tokens_of(tokenizer, "\n\n{thinking token budget: 7}")
    effort = chat(server, reasoning_effort="low", max_tokens=1)[1]["usage"]["prompt_tokens"]
    assert effort == plain + tokens_of(tokenizer, "\n\n{reasoning effort: low}")


def test_thoughts_can_be_kept_back_or_repeated_as_content(server):
    hidden = chat(server, include_reasoning=False)[1]
    assert hidden["choices"][0]["message"] == {"role": "assistant", "content": "Four."}
    assert reasoning_tokens(hidden) > 0
    cut = chat(server, max_tokens=4)[1]["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == ("", "length")
    filled = chat(server, max_tokens=4, chat_template_kwargs={"force_nonempty_content": True})[1]["choices"][0]
    assert filled["message"]["content"] == filled["message"]["reasoning"] == cut["message"]["reasoning"]


def test_a_base_model_goes_on_with_the_text(folder, tmp_path, model, tokenizer):
    (tmp_path / "base").mkdir()
    for file in folder.iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "base" / "recipe.toml").write_text('stage = "pretrain"\n')
    with running(tmp_path / "base") as server:
        text = [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": " two"},
            {"role": "user", "content": "3"},
        ]
        status, said = chat(server, messages=text, max_tokens=5)
        assert status == 200
        assert said["usage"]["prompt_tokens"] == 1 + tokens_of(tokenizer, "one two\n3")
        assert said["choices"][0]["message"]["content"] is not None and reasoning_tokens(said) == 0
        _, _, raw = call(server, "GET", "/v1/models")
        assert b"pretrained" in raw
