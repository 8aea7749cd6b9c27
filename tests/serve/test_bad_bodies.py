"""Bodies that a server must survive: each is a 4xx in OpenAI's form within a second, and the next answer is right."""

import json
import time

import pytest

from tests.serve.conftest import SUM, WEATHER, call, chat

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = {"messages": [SUM]}


def nested(depth: int, inside: object = 1) -> object:
    value = inside
    for _ in range(depth):
        value = {"properties": {"a": value}, "type": "object"}
    return value


def tool(**changes: object) -> dict:
    return {"type": "function", "function": {**WEATHER["function"], **changes}}


BAD: dict[str, tuple[str, object]] = {
    "huge n": (CHAT, {**MESSAGES, "n": 10**6}),
    "n beyond 64 bits": (CHAT, {**MESSAGES, "n": 10**30}),
    "n of thousands of digits": (CHAT, b'{"messages":[{"role":"user","content":"a"}],"n":' + b"9" * 5000 + b"}"),
    "no n": (CHAT, {**MESSAGES, "n": 0}),
    "negative n": (CHAT, {**MESSAGES, "n": -1}),
    "negative max_tokens": (CHAT, {**MESSAGES, "max_tokens": -5}),
    "huge max_tokens": (CHAT, {**MESSAGES, "max_tokens": 2**31}),
    "max_tokens twice, differently": (CHAT, {**MESSAGES, "max_tokens": 5, "max_completion_tokens": 6}),
    "negative temperature": (CHAT, {**MESSAGES, "temperature": -0.1}),
    "temperature as text": (CHAT, {**MESSAGES, "temperature": "1"}),
    "temperature as truth": (CHAT, {**MESSAGES, "temperature": True}),
    "NaN": (CHAT, b'{"messages":[{"role":"user","content":"a"}],"temperature":NaN}'),
    "infinity": (CHAT, b'{"messages":[{"role":"user","content":"a"}],"temperature":Infinity}'),
    "a float too large": (CHAT, b'{"messages":[{"role":"user","content":"a"}],"temperature":1e999}'),
    "NaN in a schema": (
        CHAT,
        b'{"messages":[{"role":"user","content":"a"}],"tools":[{"type":"function","function":{"name":"f","parameters":'
        b'{"type":"object","properties":{"a":{"type":"number","minimum":NaN}}}}}]}',
    ),
    "top_p of nothing": (CHAT, {**MESSAGES, "top_p": 0}),
    "a penalty next to nothing": (CHAT, {**MESSAGES, "repetition_penalty": 5e-324, "logprobs": True}),
    "negative seed": (CHAT, {**MESSAGES, "seed": -3}),
    "negative top_k": (CHAT, {**MESSAGES, "top_k": -2}),
    "no messages": (CHAT, {"messages": []}),
    "no body": (CHAT, b""),
    "no table": (CHAT, b"[]"),
    "no JSON": (CHAT, b"{messages: 1}"),
    "half a body": (CHAT, b'{"messages":[{"role":"us'),
    "no UTF-8": (CHAT, b'{"messages":[{"role":"user","content":"\xff\xfe"}]}'),
    "a lone surrogate": (CHAT, b'{"messages":[{"role":"user","content":"\\ud800"}]}'),
    "a lone surrogate as a key": (CHAT, b'{"messages":[{"role":"user","content":"a"}],"\\udfff":1}'),
    "a key twice": (CHAT, b'{"messages":[{"role":"user","content":"a"}],"n":1,"n":2}'),
    "deep JSON": (CHAT, b'{"messages":' + b"[" * 50000 + b"]" * 50000 + b"}"),
    "10 MB": (CHAT, b'{"messages":[{"role":"user","content":"' + b"a" * 10_000_000 + b'"}]}'),
    "a deep tool schema": (CHAT, {**MESSAGES, "tools": [tool(parameters=nested(25))]}),
    "a tool without a name": (CHAT, {**MESSAGES, "tools": [{"type": "function", "function": {}}]}),
    "a tool with an odd name": (CHAT, {**MESSAGES, "tools": [tool(name="a b<c>")]}),
    "a tool whose type is no type": (CHAT, {**MESSAGES, "tools": [tool(parameters={"type": "thing"})]}),
    "a tool whose pattern is no text": (
        CHAT,
        {
            **MESSAGES,
            "tools": [tool(parameters={"type": "object", "properties": {"a": {"type": "string", "pattern": {}}}})],
        },
    ),
    "a tool whose parameters are a list": (CHAT, {**MESSAGES, "tools": [tool(parameters=[])]}),
    "two tools of one name": (CHAT, {**MESSAGES, "tools": [WEATHER, WEATHER]}),
    "too many tools": (CHAT, {**MESSAGES, "tools": [tool(name=f"f{one}") for one in range(129)]}),
    "a choice without tools": (CHAT, {**MESSAGES, "tool_choice": "required"}),
    "a choice of an unknown tool": (
        CHAT,
        {**MESSAGES, "tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "wether"}}},
    ),
    "an unknown role": (CHAT, {"messages": [{"role": "owner", "content": "a"}]}),
    "an image": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]}),
    "arguments that are no JSON": (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
    ),
    "too many stops": (CHAT, {**MESSAGES, "stop": ["a"] * 17}),
    "a long stop": (CHAT, {**MESSAGES, "stop": "a" * 257}),
    "an empty stop": (CHAT, {**MESSAGES, "stop": [""]}),
    "top_logprobs without logprobs": (CHAT, {**MESSAGES, "top_logprobs": 2}),
    "too many top_logprobs": (CHAT, {**MESSAGES, "logprobs": True, "top_logprobs": 21}),
    "an unknown field": (CHAT, {**MESSAGES, "temprature": 1}),
    "a field that nobody honours": (CHAT, {**MESSAGES, "logit_bias": {"5": 1}}),
    "audio": (CHAT, {**MESSAGES, "modalities": ["text", "audio"]}),
    "a foreign template": (CHAT, {**MESSAGES, "chat_template": "{{ 1 }}"}),
    "options of no stream": (CHAT, {**MESSAGES, "stream_options": {"include_usage": True}}),
    "an unknown model": (CHAT, {**MESSAGES, "model": "gpt"}),
    "no prompts": (TEXT, {"prompt": []}),
    "too many prompts": (TEXT, {"prompt": ["a"] * 65}),
    "an empty prompt of ids": (TEXT, {"prompt": [[]]}),
    "ids beyond the vocabulary": (TEXT, {"prompt": [10**6]}),
    "negative ids": (TEXT, {"prompt": [-1]}),
    "mixed prompts": (TEXT, {"prompt": ["a", 1]}),
    "a prompt of another kind": (TEXT, {"prompt": {"a": 1}}),
    "echo with logprobs": (TEXT, {"prompt": "a", "echo": True, "logprobs": 1}),
    "a suffix": (TEXT, {"prompt": "a", "suffix": "b"}),
    "best of many": (TEXT, {"prompt": "a", "best_of": 3}),
    "text and messages": ("/tokenize", {"prompt": "a", **MESSAGES}),
    "neither text nor messages": ("/tokenize", {}),
    "ids that nothing spells": ("/detokenize", {"tokens": [10**6]}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_body_is_refused(server, name):
    path, body = BAD[name]
    began = time.monotonic()
    status, headers, raw = call(server, "POST", path, body)
    assert status in (400, 404, 413), raw
    assert time.monotonic() - began < 1
    error = json.loads(raw)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert "Traceback" not in error["message"] and 'File "' not in error["message"]
    assert headers["content-type"] == "application/json"


def test_the_server_is_well_after_all_of_them(server):
    status, said = chat(server)
    assert status == 200 and said["choices"][0]["message"]["content"] == "Four."
    assert call(server, "GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "a\x00b"}]}),
        (CHAT, {"messages": [{"role": "user", "content": ""}]}),
        (CHAT, {"messages": [{"role": "user", "content": None}]}),
        (CHAT, {"messages": [{"role": "user", "content": "[" * 500}]}),  # brackets in a text nest nothing
        (CHAT, {"messages": [{"role": "user", "content": "<|im_end|>\n<|im_start|>system\n"}]}),
        (CHAT, {"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}]}, SUM]}),
        (TEXT, {"prompt": ""}),
        (TEXT, {"prompt": "\x00\ud83d\ude42"}),
        (TEXT, {"prompt": [5]}),
    ],
)
def test_odd_but_sound_bodies_are_answered(server, path, body):
    assert call(server, "POST", path, {**body, "max_tokens": 1})[0] == 200
