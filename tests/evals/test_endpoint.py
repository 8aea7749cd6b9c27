"""Episodes over HTTP: against our own server, and against one that fails now and then."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from tests.evals.boats import Word
from tests.evals.test_suites import saved
from trimaran.errors import Refusal
from trimaran.evals.endpoint import message_of, sent
from trimaran.evals.run import main
from trimaran.serve.main import running

WORDS = ["n=4", "samples=2", "max_tokens=8", "tasks.talk.task=tests.evals.test_endpoint:Hails"]


class Hails(Word):
    """Asks twice."""

    name = "hails"

    def gold(self, prompt):
        (said,) = super().gold(prompt)
        return said, *self.turn(prompt, [said]), said

    def turn(self, prompt, messages):
        return () if len(messages) > 1 else ({"role": "user", "content": "and again?"},)


def records(folder) -> dict:
    (path,) = folder.glob("scores/talk-*/records.jsonl")
    return {(r["mode"], r["number"], r["sample"]): r for r in map(json.loads, path.read_text().splitlines())}


def test_a_server_is_scored_as_its_folder_is(model, tokenizer, tmp_path, capsys):
    folder = saved(model, tokenizer, tmp_path / "run")
    settings = ["engine.memory_bytes=16777216", "dtype=float64"]
    assert main(str(folder), [*WORDS, *settings]) == 0
    with running(folder, ["serve.port=0", "engine.memory_bytes=16777216", "dtype=float64"]) as server:
        url = f"{server.url}/v1"
        assert main(str(tmp_path / "remote"), [*WORDS, "endpoint.concurrency=3"], endpoint=url) == 0
        ours, theirs = records(folder), records(tmp_path / "remote")
        assert ours.keys() == theirs.keys() and len(theirs) == 4 * 3
        for key, one in theirs.items():
            assert len(one["messages"]) == len(ours[key]["messages"]) and one["tokens"] > 0
            if key[0] == "greedy":
                assert one["messages"] == ours[key]["messages"] and one["scores"] == ours[key]["scores"]
        before = (tmp_path / "remote").glob("scores/talk-*/records.jsonl")
        kept = {path: path.read_bytes() for path in before}
        assert main(str(tmp_path / "remote"), WORDS, endpoint=url) == 0  # nothing is asked twice
        assert all(path.read_bytes() == text for path, text in kept.items())
    with pytest.raises(Refusal, match="start the server"):
        main(str(tmp_path / "other"), [*WORDS, "endpoint.retries=0"], endpoint=url)


class Moody(BaseHTTPRequestHandler):
    """Says hull. Every first request is answered 503; problem 1 always 500, until it is mended."""

    seen: ClassVar[set[str]] = set()
    mended: ClassVar[bool] = False
    keys: ClassVar[set[str | None]] = set()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        self.keys.add(self.headers["authorization"])
        message = {"role": "assistant", "content": "hull", "reasoning": "a boat"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        code = 200 if body in self.seen else 503
        self.seen.add(body)
        if "held_out 1" in body and not self.mended:
            code = 500
        self.say(code, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})

    def do_GET(self):
        self.say(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in ("m", "n")]})

    def say(self, code, content):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("content-length", str(len(data)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *said):
        pass


def test_what_fails_for_a_time_is_tried_again_and_what_fails_for_good_is_no_score(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Moody)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    words = [*WORDS, "n=3", "samples=0", "endpoint.retries=2"]
    try:
        with pytest.raises(Refusal, match="2 models"):
            main(str(tmp_path), words, endpoint=url)
        words.append("endpoint.model=m")
        assert main(str(tmp_path), words, endpoint=url) == 1  # an episode failed
        (path,) = tmp_path.glob("scores/talk-*/records.jsonl")
        found = {r["number"]: r for r in map(json.loads, path.read_text().splitlines())}
        assert found[1]["error"] and not found[1]["scores"] and "InternalServerError" in found[1]["error"]
        assert found[0]["error"] is None and found[0]["messages"][0]["reasoning_content"] == "a boat"
        assert "secret" not in "".join(p.read_text() for p in tmp_path.rglob("*.json*"))
        assert Moody.keys == {"Bearer secret"}
        monkeypatch.setattr(Moody, "mended", True)
        assert main(str(tmp_path), words, endpoint=url) == 0  # it alone is played again
        assert all(r["error"] is None for r in map(json.loads, path.read_text().splitlines()))
    finally:
        server.shutdown()
        server.server_close()


def test_messages_of_calls_name_them():
    calls = [{"id": f"c{n}", "type": "function", "function": {"name": "f", "arguments": "{}"}} for n in (1, 2)]
    said = message_of({"role": "assistant", "content": None, "tool_calls": calls, "refusal": None})
    assert said == {"role": "assistant", "content": "", "tool_calls": calls}
    history = [{"role": "user", "content": "go"}, said, *({"role": "tool", "content": str(n)} for n in (1, 2))]
    assert [message.get("tool_call_id") for message in sent(history)] == [None, None, "c1", "c2"]
    assert "tool_call_id" not in history[2]


def test_an_analysis_has_no_endpoint(tmp_path):
    with pytest.raises(Refusal, match="--endpoint for representation"):
        main(str(tmp_path), [], "representation", endpoint="http://127.0.0.1:1/v1")
