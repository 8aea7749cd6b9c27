"""Counts and times in Prometheus' text format (version 0.0.4)."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping

from trimaran.engine.request import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

# Fields of the engine's `Stats`: those that go up and down, and those that only grow.
GAUGES = {
    "running": "Texts that grow now",
    "waiting": "Requests that wait for a place",
    "free_pages": "Pages of keys and values that nothing holds",
    "total_pages": "Pages of keys and values",
    "free_slots": "Slots of states that nothing holds",
    "total_slots": "Slots of states",
    "free_snapshots": "Snapshots that can still be taken",
    "total_snapshots": "Snapshots that can be held",
    "cached_pages": "Pages that the prefix cache holds, shared with running texts or not",
    "cached_snapshots": "Snapshots that the prefix cache holds",
    "hit_rate": "Share of prompt tokens that the prefix cache spared",
}
COUNTERS = {
    "prompt_tokens": "Tokens of the prompts admitted",
    "cached_tokens": "Prompt tokens that the prefix cache spared",
    "recomputed_tokens": "Tokens read again, after preemption or beyond the last snapshot",
    "recomputed_bytes": "Bytes of keys, values and states written again",
    "evictions": "Pages and snapshots dropped from the prefix cache",
    "preemptions": "Times that a text gave up its memory to others",
    "drafted": "Tokens drafted",
    "accepted": "Drafted tokens that stood",
    "passes": "Passes of the whole model",
    "tokens": "Tokens chosen",
}


class Histogram:
    """How many values fell at or under each bound."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        below = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self.sum}"
        yield f"{name}_count {below}"


class Metrics:
    """What the server counts itself. Only the event loop's thread touches it."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, int], int] = {}  # (route, status) -> answers
        self.ended: dict[str, int] = {}  # why texts ended: stop, length, tool_calls, abort, timeout, error
        self.reasoning_tokens = 0
        self.first_token = Histogram()
        self.between_tokens = Histogram()
        self.whole = Histogram()

    def answered(self, route: str, status: int) -> None:
        self.answers[route, status] = self.answers.get((route, status), 0) + 1

    def end(self, reason: str) -> None:
        self.ended[reason] = self.ended.get(reason, 0) + 1

    def text(self, stats: Stats) -> str:
        """All of it, the engine's counts included."""
        return "\n".join(self._lines(stats)) + "\n"

    def _lines(self, stats: Stats) -> Iterator[str]:
        for name, words in GAUGES.items():
            yield from family(f"trimaran_{name}", words, "gauge", [f"trimaran_{name} {getattr(stats, name)}"])
        for name, words in COUNTERS.items():
            total = f"trimaran_{name}_total"
            yield from family(total, words, "counter", [f"{total} {getattr(stats, name)}"])
        total = "trimaran_reasoning_tokens_total"
        yield from family(total, "Tokens of thoughts", "counter", [f"{total} {self.reasoning_tokens}"])
        total = "trimaran_http_answers_total"
        answers = [
            f"{total}{labels({'route': route, 'status': str(status)})} {count}"
            for (route, status), count in sorted(self.answers.items())
        ]
        yield from family(total, "Answers by route and status", "counter", answers)
        total = "trimaran_texts_ended_total"
        ended = [f"{total}{labels({'reason': reason})} {count}" for reason, count in sorted(self.ended.items())]
        yield from family(total, "Texts by why they ended", "counter", ended)
        for name, words, histogram in (
            ("time_to_first_token_seconds", "From the request to its first token", self.first_token),
            (
                "time_per_output_token_seconds",
                "Between tokens after the first, a text's mean",
                self.between_tokens,
            ),
            ("request_seconds", "From the request to its end", self.whole),
        ):
            yield from family(f"trimaran_{name}", words, "histogram", histogram.lines(f"trimaran_{name}"))


def family(name: str, words: str, kind: str, samples: Iterable[str]) -> Iterator[str]:
    """One metric with its description."""
    yield f"# HELP {name} {words}."
    yield f"# TYPE {name} {kind}"
    yield from samples


def labels(values: Mapping[str, str]) -> str:
    """{name="value", …} with the characters that would end a value escaped."""
    escaped = {
        name: value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for name, value in values.items()
    }
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"
