"""A small model that has learnt a few conversations by heart, and a server in a thread."""

import http.client
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from tests.models import tiny
from trimaran.model import hub
from trimaran.model.hybrid import HybridModel
from trimaran.serve.main import Running, running
from trimaran.text.chat import encode_chat
from trimaran.text.template import render
from trimaran.text.tokenizer import Tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = {"function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}
THOUGHT = "Two and two,\nthat is four,\nas everyone knows."
SUM = {"role": "user", "content": "What is two and two?"}
SKY = {"role": "user", "content": "How is the sky?"}
LEARNT: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([SUM, {"role": "assistant", "reasoning_content": THOUGHT, "content": "Four."}], {"thinking": True}),
    ([SUM, {"role": "assistant", "content": "It is four."}], {"thinking": False}),
    (
        [SKY, {"role": "assistant", "reasoning_content": "I ask.", "content": "", "tool_calls": [CALL]}],
        {"thinking": True, "tools": [WEATHER]},
    ),
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = [render(messages, generation_prompt=False, **options) for messages, options in LEARNT]
    return Tokenizer.train(texts * 3, 700)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> HybridModel:
    """Says the learnt answers when it is greedy. It has more ids than the tokenizer, which must never be chosen."""
    sizes = {"vocab_size": tokenizer.vocab_size + 9, "hidden_size": 64, "intermediate_size": 128}
    model = tiny("latent", torch.float32, pattern="M*-", initializer_range=0.05, **sizes)
    chats = [encode_chat(tokenizer, messages, **options) for messages, options in LEARNT]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with torch.enable_grad():
        for _ in range(80):
            worst = max(float(learn(model, optimizer, chat.ids, chat.spans[0])) for chat in chats)
            if worst < 0.05:
                break
    assert worst < 0.05
    return model.eval()


def learn(model: HybridModel, optimizer: torch.optim.Optimizer, ids: list[int], span: tuple[int, int]) -> torch.Tensor:
    """One step on what the assistant says; the loss before it."""
    hidden = model.hidden(torch.tensor([ids]))
    logits = model.head(hidden[:, span[0] - 1 : span[1] - 1])
    loss = torch.nn.functional.cross_entropy(logits[0], torch.tensor(ids[slice(*span)]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, model: HybridModel, tokenizer: Tokenizer) -> Path:
    """A run folder as a stage that teaches conversation leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "learnt"
    hub.save(model, folder)
    tokenizer.save(folder)
    (folder / "recipe.toml").write_text('stage = "sft"\n')
    return folder


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[Running]:
    """A server with small limits and few rows, shared by the tests: none may leave anything behind in it."""
    limits = ["serve.limits.body_bytes=100000", "serve.limits.n=4", "serve.limits.max_tokens=5000"]
    with running(folder, ["serve.port=0", "engine.rows=4", "engine.page=16", *limits]) as server:
        yield server


def call(
    server: Running, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one answer. `body`: bytes as they are, anything else as JSON."""
    place = urlsplit(server.url)
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=30)
    try:
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, raw, {"content-type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def post(server: Running, path: str, body: Any, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
    """Status and document of the answer to a POST."""
    status, _, raw = call(server, "POST", path, body, headers)
    return status, json.loads(raw)


def chat(server: Running, message: Any = SUM, **fields: Any) -> tuple[int, Any]:
    """Status and document of the answer to a conversation of one message, greedy unless told otherwise."""
    return post(server, "/v1/chat/completions", {"messages": [message], "temperature": 0, **fields})


def events(server: Running, path: str, body: Mapping[str, Any]) -> list[Any]:
    """The events of a stream, which must end as streams do."""
    status, headers, raw = call(server, "POST", path, {**body, "stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream"), raw
    lines = raw.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
