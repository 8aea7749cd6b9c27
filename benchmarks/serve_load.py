"""The server under load: many small requests over many streams, some of which leave in the middle.

    python benchmarks/serve_load.py --save serve_load            # runs/demo; 5 minutes and 10,000 requests at least
    python benchmarks/serve_load.py --minutes 0.2 --requests 200 # a try

Starts `trimaran serve RUN` as a process of its own, and asks it over HTTP: chats and completions, streamed and whole,
greedy and sampled, some with a common beginning. One request in ten is aborted at a random point: before its answer
begins, between two events, or while a whole answer is awaited. Some requests are probes, whose right answer was asked
for beforehand, when the server had nothing else to do, and found clear of ties; it must be the same under load.

What must hold: no error (any status but 200, an event that tells an error, a stream without its end, a wrong answer,
a traceback in the server's log); at the end nothing runs or waits, and slots, pages and snapshots are free or in the
prefix cache, all of them; after SIGTERM the server exits with 0; its resident memory is flat: the line fitted to it
after the first quarter rises by less than 2 % over the rest. A run of less than a minute is not held to the last.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from trimaran.report import environment

RESULTS = Path(__file__).parent / "results"
KEY = "load"
ABORTED, PROBES = 0.1, 0.03  # shares of requests
CLEAR = 1e-3  # a probe's answer has no two tokens nearer than this
WARM = 0.25  # of the time, before memory is held to be flat
FLAT = 0.02  # of the memory, over the rest
TEXT = "the hull of a boat def class return import self for in if not None print open read list text name"
SYSTEM = "You write short answers about boats, sails and the sea, and nothing else. " * 4


# the server


@dataclass
class Served:
    """A server that runs: where, as which process, and its log."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def memory(self) -> float:
        """Resident MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def serving(run: Path, settings: Sequence[str]) -> Iterator[Served]:
    """`trimaran serve` until the end of the block, killed if it is still there."""
    command = [sys.executable, "-m", "trimaran", "serve", str(run), "serve.port=0", *settings]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, "TRIMARAN_API_KEY": KEY}
            )
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if " at http" not in said:
                raise SystemExit(f"the server did not start:\n{log.read_text()}")
            yield Served(said.rsplit(" at ", 1)[1].strip(), process, log)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            process.stdout.close()


def gauges(text: str) -> dict[str, float]:
    """The samples without labels of a page in Prometheus' format."""
    lines = (line.split() for line in text.splitlines() if line and not line.startswith("#") and "{" not in line)
    return {name.removeprefix("trimaran_"): float(value) for name, value in lines}


def leaks(start: dict[str, float], end: dict[str, float]) -> list[str]:
    """What a server that has nothing to do still holds, beside what its cache accounts for."""
    found = [f"{name} = {end[name]:g}" for name in ("running", "waiting") if end[name]]
    for name in ("pages", "slots", "snapshots"):
        for when, now in (("start", start), ("end", end)):
            accounted = now[f"free_{name}"] + (now[f"cached_{name}"] if name != "slots" else 0)
            if accounted != now[f"total_{name}"]:
                found.append(f"{name}: {accounted:g} of {now[f'total_{name}']:g} at the {when}")
    return found


# requests


@dataclass(frozen=True)
class Plan:
    """One request. chat: which route; leave: events or, for whole answers, the share of the usual time after which the
    client leaves, None for those that stay. expected: the answer that a probe must get."""

    body: dict[str, Any]
    chat: bool
    leave: float | None = None
    expected: str | None = None

    @property
    def streamed(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def route(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"


def plan(chance: random.Random, probes: Sequence[tuple[str, str]]) -> Plan:
    """A request of chance."""
    streamed, most = chance.random() < 0.8, chance.randint(2, 24)
    if probes and chance.random() < PROBES:
        text, expected = chance.choice(probes)
        return Plan(probe_body(text) | streaming(streamed), True, expected=expected)
    text = " ".join(chance.choices(TEXT.split(), k=chance.randint(1, 40)))
    body: dict[str, Any] = {"max_tokens": most, "temperature": chance.choice([0, 0.7, 1]), **streaming(streamed)}
    body["seed"] = chance.randrange(2**31)
    chat = chance.random() < 0.6
    if chat:
        system = [{"role": "system", "content": SYSTEM}] if chance.random() < 0.5 else []
        body["messages"] = [*system, {"role": "user", "content": text}]
    else:
        body["prompt"] = text
    leave = None
    if chance.random() < ABORTED:
        leave = chance.randint(-1, most - 1) if streamed else 1.5 * chance.random()
    return Plan(body, chat, leave)


def probe_body(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0}


def streaming(streamed: bool) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_usage": True}} if streamed else {}


async def clear_probes(client: httpx2.AsyncClient, count: int = 4) -> list[tuple[str, str]]:
    """Questions and their greedy answers, of those where no token was nearly another."""
    found: list[tuple[str, str]] = []
    for number in range(8 * count):
        text = f"{TEXT.split()[number % 20]} {number}"
        body = probe_body(text) | {"logprobs": True, "top_logprobs": 2}
        response = await client.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        choice = response.json()["choices"][0]
        best = [[one["logprob"] for one in place["top_logprobs"]] for place in choice["logprobs"]["content"]]
        if all(first - second > CLEAR for first, second in best):
            found.append((text, said(choice["message"])))
        if len(found) == count:
            return found
    raise SystemExit(f"only {len(found)} of {count} questions have a clear answer: this model is too unsure")


def said(message: dict[str, Any]) -> str:
    """All text of a message or of a part of one."""
    return (message.get("reasoning_content") or "") + (message.get("content") or "")


# asking


@dataclass
class Tally:
    """What became of the requests. first, whole, between: seconds to the first token, to the end, and between tokens
    on average, of streamed requests that stayed."""

    sent: int = 0
    finished: int = 0
    aborted: int = 0
    probes: int = 0
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

    def usual(self) -> float:
        """About how long a request takes."""
        recent = self.whole[-50:]
        return statistics.median(recent) if recent else 0.5


class Broken(Exception):
    """An answer that is not as it should be."""


async def ask(client: httpx2.AsyncClient, one: Plan, tally: Tally) -> None:
    """Sends one request and notes what became of it."""
    tally.sent += 1
    tally.probes += one.expected is not None
    try:
        stayed = await (stream(client, one, tally) if one.streamed else whole(client, one, tally))
        tally.finished += stayed
        tally.aborted += not stayed
    except (Broken, httpx2.HTTPError) as problem:
        tally.errors[f"{type(problem).__name__}: {problem}"[:300]] += 1


async def whole(client: httpx2.AsyncClient, one: Plan, tally: Tally) -> bool:
    """An answer in one piece; False when the client left first."""
    began = time.perf_counter()
    try:
        async with asyncio.timeout(None if one.leave is None else one.leave * tally.usual()):
            response = await client.post(one.route, json=one.body)
    except TimeoutError:
        return False
    if response.status_code != 200:
        raise Broken(f"status {response.status_code}: {response.text[:200]}")
    document = response.json()
    choice, usage = document["choices"][0], document["usage"]
    check(one, said(choice["message"]) if one.chat else choice["text"], choice["finish_reason"], usage)
    tally.whole.append(time.perf_counter() - began)
    tally.tokens += usage["completion_tokens"]
    return True


async def stream(client: httpx2.AsyncClient, one: Plan, tally: Tally) -> bool:
    """An answer in events; False when the client left first: -1 of `leave` is before the answer begins."""
    began = time.perf_counter()
    try:
        early = one.leave == -1
        async with asyncio.timeout(random.random() * 0.3 * tally.usual() if early else None):
            async with client.stream("POST", one.route, json=one.body) as response:
                if response.status_code != 200:
                    raise Broken(f"status {response.status_code}: {(await response.aread())[:200]!r}")
                return await read(response, one, tally, began)
    except TimeoutError:
        return False


async def read(response: httpx2.Response, one: Plan, tally: Tally, began: float) -> bool:
    """The events of a stream."""
    text, reason, usage, first, events = "", None, None, 0.0, 0
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        if one.leave is not None and 0 <= one.leave <= events:
            return False
        if line == "data: [DONE]":
            break
        events += 1
        part = json.loads(line.removeprefix("data: "))
        if "error" in part:
            raise Broken(f"an event tells an error: {part['error']}")
        usage = part.get("usage") or usage
        for choice in part["choices"]:
            piece = said(choice["delta"]) if one.chat else choice["text"]
            first = first or (time.perf_counter() if piece else 0.0)
            text += piece
            reason = choice["finish_reason"] or reason
    else:
        raise Broken("a stream without its end")
    ended = time.perf_counter()
    check(one, text, reason, usage)
    assert usage is not None
    tally.tokens += usage["completion_tokens"]
    tally.whole.append(ended - began)
    if first:
        tally.first.append(first - began)
        if usage["completion_tokens"] > 1:
            tally.between.append((ended - first) / (usage["completion_tokens"] - 1))
    return True


def check(one: Plan, text: str, reason: str | None, usage: dict[str, Any] | None) -> None:
    """Raises `Broken` where an answer that was read to its end is not what it should be."""
    if reason not in ("stop", "length", "tool_calls"):
        raise Broken(f"finish_reason {reason!r}")
    if usage is None or not 0 < usage["completion_tokens"] <= one.body["max_tokens"]:
        raise Broken(f"usage {usage}")
    if one.expected is not None and text != one.expected:
        raise Broken(f"a wrong answer: {text!r} for {one.expected!r}")


async def load(server: Served, minutes: float, requests: int, streams: int, seed: int) -> dict[str, Any]:
    """Keeps `streams` requests open until both limits are reached; what was seen."""
    limits = httpx2.Limits(max_connections=streams + 1, max_keepalive_connections=streams)
    client = httpx2.AsyncClient(
        base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=120, limits=limits
    )
    async with client:

        async def look() -> dict[str, float]:
            return gauges((await client.get("/metrics")).raise_for_status().text)

        probes = await clear_probes(client)
        start, tally, chance = await look(), Tally(), random.Random(seed)
        began, memory = time.monotonic(), list[tuple[float, float]]()
        done = False

        async def one_stream() -> None:
            while not done and (tally.sent < requests or time.monotonic() - began < 60 * minutes):
                await ask(client, plan(chance, probes), tally)

        async def watch() -> None:
            told = 0.0
            while True:
                passed = time.monotonic() - began
                memory.append((passed, server.memory()))
                if passed - told >= 10:
                    told = passed
                    words = f"{tally.sent} sent, {tally.aborted} aborted, {sum(tally.errors.values())} errors"
                    print(f"{passed:5.0f} s  {words}, {memory[-1][1]:.1f} MiB", file=sys.stderr, flush=True)
                await asyncio.sleep(1)

        watching = asyncio.create_task(watch())
        try:
            await asyncio.gather(*(one_stream() for _ in range(streams)))
        finally:
            done = True
            watching.cancel()
        seconds = time.monotonic() - began
        for _ in range(300):  # aborts that came last are still on their way
            end = await look()
            if not end["running"] and not end["waiting"]:
                break
            await asyncio.sleep(0.1)
        after = Tally()
        for text, expected in probes:
            await ask(client, Plan(probe_body(text), True, expected=expected), after)
        tally.errors += after.errors
        return account(tally, seconds, memory) | {"start": start, "end": await look()}


# telling


def account(tally: Tally, seconds: float, memory: list[tuple[float, float]]) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 1),
        "requests": tally.sent,
        "finished": tally.finished,
        "aborted": tally.aborted,
        "probes": tally.probes,
        "errors": dict(tally.errors),
        "tokens": tally.tokens,
        "requests_per_s": round(tally.sent / seconds, 1),
        "tokens_per_s": round(tally.tokens / seconds, 1),
        "first_token_ms": quantiles(tally.first),
        "between_tokens_ms": quantiles(tally.between),
        "whole_ms": quantiles(tally.whole),
        "memory": fitted(memory),
        "memory_mib": [[round(at, 1), round(size, 2)] for at, size in memory],
    }


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{place}": round(1e3 * cuts[place - 1], 1) for place in (50, 90, 99)} | {
        "max": round(1e3 * max(seconds), 1)
    }


def fitted(memory: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The line through the memory after the first part; growth: how much it rises until the end, as a share."""
    late = [one for one in memory if one[0] >= WARM * memory[-1][0]]
    if len(late) < 3:
        return {}
    slope = statistics.linear_regression(*zip(*late)).slope
    middle = statistics.median(size for _, size in late)
    growth = slope * (late[-1][0] - late[0][0]) / middle
    return {
        "from_s": round(late[0][0], 1),
        "median_mib": round(middle, 1),
        "slope_mib_per_min": round(60 * slope, 4),
        "growth": round(growth, 5),
        "flat": growth < FLAT,
    }


def failures(result: dict[str, Any]) -> list[str]:
    """Why the run is red."""
    found = [f"{count} x {problem}" for problem, count in result["errors"].items()]
    found += leaks(result["start"], result["end"])
    if result["exit_code"] != 0:
        found.append(f"exit code {result['exit_code']} after SIGTERM")
    if result["tracebacks"]:
        found.append(f"{result['tracebacks']} tracebacks in the server's log")
    if result["seconds"] >= 60 and not result["memory"].get("flat"):
        found.append(f"memory is not flat: {result['memory']}")
    return found


def picture(result: dict[str, Any], path: Path) -> None:
    """Resident memory over time, and the line fitted to it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    at, size = zip(*result["memory_mib"], strict=True)
    figure, axis = plt.subplots(figsize=(6, 3.4))
    axis.plot(at, size, linewidth=1, label="resident memory of the server")
    if line := result["memory"]:
        ends = [line["from_s"], at[-1]]
        rise = [(x - sum(ends) / 2) * line["slope_mib_per_min"] / 60 for x in ends]
        label = f"{line['slope_mib_per_min']:+.2f} MiB per minute"
        axis.plot(ends, [line["median_mib"] + one for one in rise], linestyle="--", label=label)
    axis.set(xlabel="seconds", ylabel="MiB", ylim=(0, 1.2 * max(size)))
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """The whole run, the server's end included."""
    settings = [f"engine.memory_bytes={given.memory_mib << 20}", *given.settings]
    with serving(given.run, settings) as server:
        result = asyncio.run(load(server, given.minutes, given.requests, given.streams, given.seed))
        result["server_cpu_s"] = round(server.cpu_seconds(), 1)
        result["client_cpu_s"] = round(time.process_time(), 1)
        server.process.send_signal(signal.SIGTERM)
        try:
            result["exit_code"] = server.process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            result["exit_code"] = None
        result["tracebacks"] = server.log.read_text(encoding="utf-8").count("Traceback")
        result["log"] = server.log.read_text(encoding="utf-8").splitlines()[:40]
    made_on = environment() | {
        "run": given.run.name,
        "settings": settings,
        "streams": given.streams,
        "seed": given.seed,
    }
    return {"conditions": made_on | {"load_after": round(os.getloadavg()[0], 2)}, **result}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="the folder that is served")
    parser.add_argument("--minutes", type=float, default=5, help="at least so long")
    parser.add_argument("--requests", type=int, default=10_000, help="at least so many")
    parser.add_argument("--streams", type=int, default=64, help="requests open at once")
    parser.add_argument("--memory-mib", type=int, default=96, help="of the engine: little, so that it is soon full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json and NAME.png")
    parser.add_argument("settings", nargs="*", help="more settings of the server, such as engine.drafter=mtp")
    given = parser.parse_args()
    if not (given.run / "config.json").is_file():
        raise SystemExit(f"no run folder {str(given.run)!r}: `trimaran demo` makes one, or give --run")
    result = measured(given)
    result["red"] = failures(result)
    if given.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{given.save}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
        picture(result, RESULTS / f"{given.save}.png")
    told = {name: value for name, value in result.items() if name not in ("memory_mib", "log", "conditions")}
    print(json.dumps(result if given.json else told, indent=1))
    return 1 if result["red"] else 0


if __name__ == "__main__":
    sys.exit(main())
