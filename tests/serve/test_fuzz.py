"""Bodies made up from the server's own description of itself, and bodies that break it: no 5xx, no hang."""

import time

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.conftest import SUM, call, chat
from trimaran.serve.main import running

# Not held: that every body of the right form is accepted. Two fields may disagree, and a limit of the server is a
# setting, so a description of forms can not say which bodies are.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/tokenize"),
    ("POST", "/v1/detokenize"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/metrics"),
]
SMALL = ["max_tokens=6", "n=2", "prompts=3", "prompt_tokens=2000"]
SLOWEST = 10.0  # seconds of one answer on a busy machine; a hang is longer


@pytest.fixture(scope="module")
def fuzzed(folder):
    limits = [f"serve.limits.{one}" for one in SMALL]
    rest = ["serve.chat_tokens=3", "serve.completion_tokens=3", "engine.rows=4", "engine.page=16"]
    with running(folder, ["serve.port=0", *limits, *rest]) as server:
        yield server


def fuzz(server, method: str, path: str, mode: GenerationMode, examples: int) -> int:
    """Asks `examples` times; how many answers came."""
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    answers = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(schema[path][method].as_strategy(generation_mode=mode))
    def ask(case) -> None:
        nonlocal answers
        began = time.monotonic()
        case.call_and_validate(checks=CHECKS, timeout=SLOWEST * 3)
        assert time.monotonic() - began < SLOWEST
        answers += 1

    ask()
    return answers


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_few_made_up_requests(fuzzed, method, path):
    count = 5 if path.startswith("/v1/c") else 4
    assert fuzz(fuzzed, method, path, GenerationMode.POSITIVE, count) > 0
    if method == "POST":
        assert fuzz(fuzzed, method, path, GenerationMode.NEGATIVE, count) > 0
    assert chat(fuzzed, max_tokens=3)[0] == 200


@pytest.mark.slow
def test_thousands_of_made_up_requests(fuzzed):
    answers = 0
    for method, path in ROUTES:
        count = 600 if path.startswith("/v1/c") else 100
        answers += fuzz(fuzzed, method, path, GenerationMode.POSITIVE, count)
        if method == "POST":
            answers += fuzz(fuzzed, method, path, GenerationMode.NEGATIVE, count)
    print(f"{answers} answers: {fuzzed.service.metrics.answers}")
    assert answers >= 2000
    stats = fuzzed.service.runner.engine.stats()
    assert (stats.running, stats.waiting, stats.free_slots) == (0, 0, stats.total_slots)
    assert call(fuzzed, "POST", "/v1/chat/completions", {"messages": [SUM], "max_tokens": 6})[0] == 200
