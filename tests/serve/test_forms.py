"""Answers of a form that the request names, and calls that have to be made."""

import json
import re

import pytest

from tests.serve.conftest import CALL, SKY, SUM, WEATHER, chat, post
from trimaran.serve.requests import ChatRequest
from trimaran.serve.rules import forms_asked
from trimaran.serve.settings import Limits

pytest.importorskip("llguidance", reason="the extra constrain is not installed")

AGE = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"], "additionalProperties": False}
ODD = {
    "type": "function",
    "function": {
        "name": "a.b:c-d",
        "parameters": {
            "type": "object",
            "properties": {
                'quoted "key" \\': {"enum": ["one\n", 'two "2"']},
                "truth": {"type": "boolean"},
                "list": {"type": "array", "items": {"$ref": "#/$defs/small"}, "minItems": 1, "maxItems": 2},
                "left out": {"type": "string"},
            },
            "required": ['quoted "key" \\', "truth", "list"],
            "$defs": {"small": {"type": "integer", "minimum": 0, "maximum": 9}},
        },
    },
}
FORMS = {
    "response_format": {"response_format": {"type": "json_schema", "json_schema": {"name": "age", "schema": AGE}}},
    "guided_json": {"guided_json": AGE},
    "guided_json as text": {"guided_json": json.dumps(AGE)},
    "structured_outputs": {"structured_outputs": {"json": AGE}},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("thinking", [True, False])
def test_a_schema_is_kept_to_after_the_thought(server, form, thinking):
    fields = {**FORMS[form], "chat_template_kwargs": {"enable_thinking": thinking}, "temperature": 1.2, "seed": 4}
    status, said = chat(server, **fields, thinking_token_budget=6, max_tokens=90)
    (choice,) = said["choices"]
    assert status == 200 and choice["finish_reason"] in ("stop", "length")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"])["age"], int)
    assert choice["message"]["content"].startswith("{")
    assert said["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 6 * thinking


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_choice": ["red", "green"]}, "red|green"),
        ({"structured_outputs": {"choice": ["red", "green"]}}, "red|green"),
        ({"guided_regex": "[ab]{3}-[0-9]"}, "[ab]{3}-[0-9]"),
        ({"guided_grammar": 'start: "yes" | "no" " "? "way"'}, "yes|no ?way"),
    ],
)
def test_a_text_has_the_form(server, fields, pattern):
    for seed in range(3):
        asked = {"prompt": "It", "max_tokens": 30, "seed": seed, "temperature": 1.5}
        status, said = post(server, "/v1/completions", {**asked, **fields})
        assert status == 200 and re.fullmatch(pattern, said["choices"][0]["text"])


def test_a_json_object(server):
    for fields in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        status, said = chat(server, **fields, max_tokens=30, chat_template_kwargs={"enable_thinking": False})
        assert status == 200 and said["choices"][0]["message"]["content"].startswith("{")
    free = {"response_format": {"type": "text"}}
    assert chat(server, **free)[1]["choices"] == chat(server)[1]["choices"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("message", [SKY, SUM])
def test_a_call_that_has_to_be_made_is_made(server, choice, message):
    fields = {"tools": [WEATHER], "tool_choice": choice, "thinking_token_budget": 10, "max_tokens": 200}
    status, said = chat(server, message, **fields, parallel_tool_calls=False)
    (answer,) = said["choices"]
    assert status == 200
    made = answer["message"]["tool_calls"]
    assert len(made) == 1 and made[0]["function"]["name"] == "weather"
    if message == SKY:
        assert answer["finish_reason"] == "tool_calls"
        assert json.loads(made[0]["function"]["arguments"]) == CALL["function"]["arguments"]


def test_values_have_the_types_of_an_odd_schema(server):
    for seed in range(4):
        fields = {"tools": [WEATHER, ODD], "tool_choice": {"type": "function", "function": {"name": "a.b:c-d"}}}
        fields |= {"temperature": 1.5, "seed": seed, "chat_template_kwargs": {"enable_thinking": False}}
        status, said = chat(server, **fields, max_tokens=300, stop=["<parameter=left"])
        assert status == 200, said
        (made,) = said["choices"][0]["message"]["tool_calls"]
        if said["choices"][0]["stop_reason"] is None:
            given = json.loads(made["function"]["arguments"])
            assert given['quoted "key" \\'] in ("one\n", 'two "2"') and isinstance(given["truth"], bool)
            assert 1 <= len(given["list"]) <= 2 and all(0 <= one <= 9 for one in given["list"])


def test_a_form_beside_tools_is_the_other_choice(server):
    fields = {"tools": [WEATHER], **FORMS["response_format"], "max_tokens": 80}
    called = chat(server, SKY, **fields)[1]["choices"][0]
    assert called["finish_reason"] == "tool_calls" and called["message"]["content"] is None
    answered = chat(server, SUM, **fields, tool_choice="none", thinking_token_budget=2)[1]["choices"][0]
    assert answered["message"]["content"].startswith("{") and "tool_calls" not in answered["message"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"guided_regex": "(("}, "regular expression"),
        ({"guided_regex": "(a{1,1000}){1,1000}" * 40}, "regular expression"),
        ({"guided_regex": "a" * 70000}, "at most 65536"),
        ({"guided_json": "{"}, "no JSON"),
        ({"guided_json": {"type": "thing"}}, "schema"),
        ({"guided_json": {"$ref": "https://example.org/schema"}}, "schema"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "choices"),
        ({"guided_grammar": "start: ("}, "grammar"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "one form"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "one form"),
        ({"structured_outputs": {"regx": "a"}}, "the nearest known: regex"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"tools": [WEATHER], "guided_regex": "a"}, "with tools"),
    ],
)
def test_a_form_that_can_not_be_kept_to_is_refused(server, fields, said):
    status, answer = chat(server, **fields)
    assert status == 400 and said in answer["error"]["message"], answer


def test_every_form_has_one_name():
    body = ChatRequest.model_validate(
        {
            "messages": [SUM],
            "response_format": {"type": "json_object"},
            "structured_outputs": {"json": {}, "regex": "a", "choice": ["a"], "grammar": "g", "json_object": True},
            "guided_json": "{}",
            "guided_regex": "a",
            "guided_choice": ["a"],
            "guided_grammar": "g",
        }
    )
    asked = forms_asked(body)
    assert len(asked) == 10 and None not in asked.values()
    assert {kind for kind, _ in asked.values()} == {"schema", "regex", "choice", "grammar"}
    assert all(json.loads(source) is not None for _, source in asked.values())
    assert Limits().forms.depth < Limits().json_depth
