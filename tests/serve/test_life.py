"""Clients that leave, queues that fill, engines that stall, signals: what is given back and what is answered."""

import asyncio
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from tests.serve.conftest import SUM, call, chat, events, post
from trimaran.errors import Refusal
from trimaran.serve import stream
from trimaran.serve.main import main, running
from trimaran.serve.stream import Gone, merged, unless_gone

LONG = {"messages": [SUM], "max_tokens": 3000, "ignore_eos": True, "temperature": 1.5}


@pytest.fixture(scope="module")
def bare(folder):
    """A server that remembers nothing, so that what is free at the end is all that there is."""
    with running(folder, ["serve.port=0", "engine.rows=4", "engine.page=16", "engine.prefix_cache=false"]) as server:
        yield server


def settled(server, seconds: float = 5.0):
    """The engine's counts once nothing runs any more."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stats = server.service.runner.engine.stats()
        if stats.running == stats.waiting == 0 and not server.service.runner.open:
            return stats
        time.sleep(0.01)
    raise AssertionError(f"still at work: {stats}")


def begun(server, body) -> socket.socket:
    """A line on which a request has been sent and nothing read."""
    place, raw = urlsplit(server.url), json.dumps(body).encode()
    line = socket.create_connection((place.hostname, place.port), timeout=30)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(raw)}"
    line.sendall(head.encode() + b"\r\n\r\n" + raw)
    return line


def heard(line: socket.socket, size: int) -> bytes:
    """At least `size` bytes of what comes back."""
    answer = b""
    while len(answer) < size:
        answer += line.recv(65536)
    return answer


def leave(line: socket.socket) -> None:
    """Breaks off, as a client that crashes does."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    line.close()


def soon(truth, seconds: float = 5.0) -> None:
    """Waits for what must become true."""
    deadline = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("moment", ["at once", "first tokens", "in the middle"])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_client_that_leaves_gives_everything_back(bare, streamed, moment, samples):
    before, ended = settled(bare), bare.service.metrics.ended
    aborted = ended.get("abort", 0)
    line = begun(bare, {**LONG, "max_tokens": 3000, "stream": streamed, "n": samples})
    if moment != "at once":
        tokens = before.tokens + (1 if moment == "first tokens" else 60 * samples)
        soon(lambda: bare.service.runner.engine.stats().tokens >= tokens)
        if streamed:
            heard(line, 500)
    leave(line)
    after = settled(bare)
    assert (after.free_slots, after.free_pages) == (before.free_slots, before.free_pages)
    if moment != "at once":
        soon(lambda: ended.get("abort", 0) == aborted + samples)
    assert chat(bare)[1]["choices"][0]["message"]["content"] == "Four."


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["none", "mtp"])
def test_hundreds_that_leave_change_nothing_for_those_that_stay(folder, drafter):
    """Sixteen clients at once, most of which leave at a random moment."""
    options = ["engine.rows=4", "engine.page=16", "engine.prefix_cache=false", f"engine.drafter={drafter}"]
    with running(folder, ["serve.port=0", *options]) as server:
        stays = {"temperature": 1.3, "max_tokens": 30}
        alone = [chat(server, seed=seed, **stays)[1]["choices"] for seed in range(8)]
        before = settled(server)

        def client(number: int) -> None:
            moments = random.Random(number)
            for turn in range(14):
                if turn % 7 == 6:
                    seed = moments.randrange(8)
                    assert chat(server, seed=seed, **stays)[1]["choices"] == alone[seed]
                    continue
                line = begun(server, {**LONG, "stream": moments.random() < 0.5, "n": moments.choice([1, 1, 3])})
                time.sleep(moments.choice([0, 0.01, 0.1, 0.4]))
                leave(line)

        with ThreadPoolExecutor(16) as clients:
            list(clients.map(client, range(16)))
        after = settled(server, 20)
        assert (after.free_slots, after.free_pages) == (before.free_slots, before.free_pages)
        assert chat(server)[1]["choices"][0]["message"]["content"] == "Four."


def test_a_client_that_leaves_while_it_speaks_is_forgotten(server):
    place = urlsplit(server.url)
    for _ in range(5):
        with socket.create_connection((place.hostname, place.port)) as line:
            line.sendall(
                b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
            )
    assert chat(server)[0] == 200


def test_one_too_many_is_told_when_to_come_again(folder):
    with running(folder, ["serve.port=0", "serve.queue=2", "engine.rows=1"]) as server:
        lines = [begun(server, {**LONG, "stream": True})]
        heard(lines[0], 300)
        lines += [begun(server, {**LONG, "stream": True}) for _ in range(2)]
        soon(lambda: server.service.runner.waiting == 2)
        status, headers, raw = call(server, "POST", "/v1/chat/completions", LONG)
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(raw)["error"] == {
            "message": "2 requests wait already, and 2 may",
            "type": "rate_limit_error",
            "param": None,
            "code": "queue_full",
        }
        for line in lines:
            leave(line)
        settled(server)
        assert chat(server)[0] == 200


def test_a_request_that_takes_too_long_is_given_up(folder):
    with running(folder, ["serve.port=0", "serve.request_seconds=0.3", "serve.chat_tokens=9"]) as server:
        assert chat(server)[0] == 200
        status, headers, raw = call(server, "POST", "/v1/chat/completions", {**LONG, "max_tokens": 30000})
        assert (status, headers["x-should-retry"], json.loads(raw)["error"]["code"]) == (408, "false", "timeout")
        last = events(server, "/v1/chat/completions", {**LONG, "max_tokens": 30000})[-1]
        assert last["error"]["type"] == "timeout_error"
        settled(server)
        assert server.service.metrics.ended["timeout"] == 2


def test_what_could_never_fit_is_refused_with_the_arithmetic(folder):
    with running(folder, ["serve.port=0", "engine.rows=1", "engine.page=16"]) as server:
        longest = server.service.longest
        status, said = chat(server, max_tokens=longest)
        assert status == 400 and f"= {longest} tokens" in said["error"]["message"]
        assert said["error"]["code"] == "context_length_exceeded"
        assert call(server, "GET", "/v1/models")[0] == 200


def test_a_stalled_engine_turns_health_red(folder):
    with running(folder, ["serve.port=0", "serve.stall_seconds=0.6"]) as server:
        assert call(server, "GET", "/health")[::2] == (200, b'{"status":"ok"}')
        with server.service.runner.wake:  # the engine's thread can not take another turn
            time.sleep(1.2)
            status, _, raw = call(server, "GET", "/health")
        assert (status, json.loads(raw)) == (503, {"status": "stalled"})
        soon(lambda: call(server, "GET", "/health")[0] == 200)
        assert chat(server)[0] == 200


def test_what_fails_in_the_engine_is_told_without_its_traceback(folder, monkeypatch):
    with running(folder, ["serve.port=0"]) as server:
        monkeypatch.setattr(server.service.runner.engine, "choose", lambda *_: 1 / 0)
        status, said = chat(server)
        assert (status, said["error"]["type"]) == (500, "server_error") and "division" not in said["error"]["message"]
        last = events(server, "/v1/chat/completions", {"messages": [SUM]})[-1]
        assert last["error"]["type"] == "server_error" and "division" not in last["error"]["message"]
        monkeypatch.undo()
        assert chat(server)[1]["choices"][0]["message"]["content"] == "Four."
        assert server.service.metrics.ended["error"] == 2


def serve(folder, *overrides: str) -> tuple[subprocess.Popen[str], str]:
    """`trimaran serve` as a process of its own, and its address."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trimaran", "serve", str(folder), "serve.port=0", *overrides]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits deafness
    )
    line = process.stdout.readline()
    found = re.search(r"serving learnt at http://127\.0\.0\.1:(\d+)", line)
    assert found, line + process.stderr.read()
    return process, f"127.0.0.1:{found[1]}"


@pytest.mark.parametrize(
    ("sig", "code"), [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_lets_what_runs_finish(folder, sig, code):
    process, place = serve(folder)
    try:
        running_one = http.client.HTTPConnection(place, timeout=30)
        body = {**LONG, "max_tokens": 500, "stream": True, "stream_options": {"include_usage": True}}
        running_one.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        answer = running_one.getresponse()
        read = answer.read(500)
        process.send_signal(sig)
        refused = []
        deadline = time.monotonic() + 10
        while not refused and time.monotonic() < deadline:
            late = http.client.HTTPConnection(place, timeout=5)
            late.request("GET", "/health")
            told = late.getresponse()
            if told.status == 503:
                assert json.loads(told.read()) == {"status": "draining"}
                late.request("POST", "/v1/completions", '{"prompt":"a"}', {"content-type": "application/json"})
                told = late.getresponse()
                refused.append((told.status, told.headers["retry-after"], json.loads(told.read())["error"]["code"]))
            late.close()
        assert refused == [(503, "10", "shutting_down")]
        read += answer.read()
        *_, usage, done = read.decode().strip().split("\n\n")
        assert done == "data: [DONE]"
        assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == 500
        assert process.wait(20) == code
        told_at_start = process.stderr.read()
        assert "rows" in told_at_start and "pages" in told_at_start and "Traceback" not in told_at_start
    finally:
        process.kill()
        process.wait()


def test_what_does_not_finish_in_time_is_broken_off(folder):
    with running(folder, ["serve.port=0", "serve.drain_seconds=0.2"]) as server:
        line = begun(server, {**LONG, "stream": True, "max_tokens": 30000})
        answer = heard(line, 300)
    with line:
        while piece := line.recv(65536):
            answer += piece
    assert b'"code":"shutting_down"' in answer and answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_taken_port_is_refused_before_the_model_is_read(server, folder):
    with pytest.raises(Refusal, match=r"serve\.port=0 takes any that is free"):
        main(str(folder), [f"serve.port={urlsplit(server.url).port}"])


def test_the_metrics_count_what_happened(server):
    def value(name: str) -> float:
        text = call(server, "GET", "/metrics")[2].decode()
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])

    names = ('trimaran_texts_ended_total{reason="stop"}', "trimaran_request_seconds_count", "trimaran_tokens_total")
    chat(server)
    before = [value(name) for name in names]
    spent = chat(server)[1]["usage"]["completion_tokens"]
    post(server, "/v1/nowhere", {})
    assert [value(name) for name in names] == [before[0] + 1, before[1] + 1, before[2] + spent]
    assert value('trimaran_http_answers_total{route="other",status="404"}') >= 1
    assert value('trimaran_time_to_first_token_seconds_bucket{le="+Inf"}') >= value(names[1])
    text = call(server, "GET", "/metrics")[2].decode()
    described = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    sampled = {re.sub(r"_(bucket|sum|count)$", "", one) for one in re.findall(r"^(trimaran_\w+)", text, re.MULTILINE)}
    assert sampled <= described and not re.search(r"\n\n", text)


def test_a_stream_that_has_to_wait_shows_signs_of_life(server, monkeypatch):
    monkeypatch.setattr(stream, "BREATH", 0.05)
    engine = server.service.runner.engine
    choose = engine.choose
    monkeypatch.setattr(engine, "choose", lambda *given: time.sleep(0.12) or choose(*given))
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    line, answer = begun(server, {"messages": [SUM], "temperature": 0, "stream": True, **off}), b""
    with line:
        while b"[DONE]" not in answer:
            answer += line.recv(65536)
    assert answer.count(b": waiting\n\n") >= 2
    events_ = [json.loads(found) for found in re.findall(rb"data: (\{.*\})\n", answer)]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events_) == "It is four."


def test_work_is_cancelled_when_its_client_leaves():
    ended = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("work")

    async def receive():
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def scene():
        with pytest.raises(Gone):
            await unless_gone(receive, work())

    asyncio.run(scene())
    assert ended == ["work"]


def test_merged_streams_are_closed_together():
    closed = []

    async def counting(number, fails):
        try:
            for _ in range(2):
                yield number
                await asyncio.sleep(0)
            if fails:
                raise ValueError(number)
            await asyncio.sleep(60)
        finally:
            closed.append(number)

    async def scene():
        with pytest.raises(ValueError, match="1"):
            async for _ in merged([counting(0, False), counting(1, True), counting(2, False)]):
                pass

    asyncio.run(scene())
    assert sorted(closed) == [0, 1, 2]
