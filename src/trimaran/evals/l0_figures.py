"""From records of L0-Bench to its figures (arXiv 2503.22832).

accuracy         share of whole traces that are right; greedy answers and sampled ones apart
steps to error   right steps before the first wrong one, mean
alive            share of answers that are still right after so many steps: where models fail
pass@k           chance that one of k samples is right, without bias
majority@k       the trace that most of the first k samples wrote is right; of equally many, the first
by thought       accuracy of the answers with the fewest to the most thought, in quarters
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimaran.evals.interval import mean_interval, pass_at
from trimaran.evals.table import aligned
from trimaran.evals.tally import Record, mean
from trimaran.tasks.l0_grade import cleaned
from trimaran.tasks.task import REWARD

POINTS = 24  # of a curve over steps
QUARTERS = 4
COLUMNS = ("axis", "value", "steps", "n", "right", "95 %", "steps to error", "pass@k", "majority@k", "cut", "failed")


def figures(records: Sequence[Record], votes: Sequence[int]) -> dict[str, Any]:
    """The figures of a row's records, JSON values; those of episodes that failed have no score and are not counted.
    votes: how many samples vote, where there are as many."""
    sound = [one for one in records if one["error"] is None]
    found: dict[str, Any] = {"n": len({one["number"] for one in sound})}
    found["steps"] = mean([one["scores"]["steps"] for one in sound])
    for mode in ("greedy", "sampled"):
        some = [one for one in sound if one["mode"] == mode]
        found[mode] = of_mode(some, votes) if some else None
    return found


def of_mode(records: Sequence[Record], votes: Sequence[int]) -> dict[str, Any]:
    problems: dict[int, list[Record]] = {}
    for one in sorted(records, key=lambda one: one["sample"]):
        problems.setdefault(one["number"], []).append(one)
    rewards = [mean([one["scores"][REWARD] for one in samples]) for samples in problems.values()]
    fewest = min(map(len, problems.values()))
    counted = [k for k in votes if k <= fewest]
    return {
        "accuracy": mean(rewards),
        "interval": list(mean_interval(rewards)),
        "samples": fewest,
        "steps_to_error": mean([one["scores"]["steps_to_error"] for one in records]),
        "cut": mean([float(one["finish"] == "length") for one in records]),
        "alive": alive(records),
        "pass_at": {k: mean([passed(samples, k) for samples in problems.values()]) for k in counted},
        "majority": {k: mean([majority(samples[:k]) for samples in problems.values()]) for k in counted},
        "by_thought": by_thought(records),
    }


def passed(samples: Sequence[Record], k: int) -> float:
    return pass_at(k, len(samples), sum(one["scores"][REWARD] == 1 for one in samples))


def majority(samples: Sequence[Record]) -> float:
    """The reward of the answer that most samples gave. Answers without any step vote for each other, and are wrong."""
    said = [cleaned(answer_of(one)) for one in samples]
    (most, _), *_ = Counter(said).most_common(1)  # of equally many, the first that was seen
    return float(samples[said.index(most)]["scores"][REWARD])


def answer_of(record: Record) -> str:
    """What the model said last, its thought left out."""
    said = [message for message in record["messages"] if message["role"] == "assistant"]
    return str(said[-1].get("content") or "") if said else ""


def alive(records: Sequence[Record]) -> list[tuple[int, float]]:
    """(step, share of the answers that are right up to it), of those whose trace is that long."""
    longest = int(max(one["scores"]["steps"] for one in records))
    places = sorted({round(place) for place in np.linspace(1, longest, min(POINTS, longest))})
    found = []
    for place in places:
        asked = [one["scores"] for one in records if one["scores"]["steps"] >= place]
        found.append((place, mean([float(one["steps_to_error"] >= place) for one in asked])))
    return found


def by_thought(records: Sequence[Record]) -> list[tuple[float, float]]:
    """(mean tokens of the thought, accuracy) of four equal parts, by length of the thought; none without thoughts."""
    told = sorted(((one["thought_tokens"], one["scores"][REWARD]) for one in records), key=lambda one: one[0])
    if len(told) < QUARTERS or told[-1][0] == 0:
        return []
    parts = np.array_split(np.asarray(told, dtype=np.float64), QUARTERS)
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]


def table(axes: Mapping[str, Sequence[Mapping[str, str]]], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each point of each axis that has figures. Greedy answers where there are any, else sampled ones; pass
    and majority are of the samples."""
    lines: list[Sequence[str]] = [COLUMNS]
    for axis, points in axes.items():
        for point in points:
            if point["row"] in rows:
                lines.append((axis, point["value"], *cells(rows[point["row"]])))
    return aligned(lines)


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    first, sampled = row["greedy"] or row["sampled"], row["sampled"]
    k = max(sampled["pass_at"], default=1) if sampled else 1
    most = [f"{sampled[name][k]:.1%} ({k})" if k > 1 else "-" for name in ("pass_at", "majority")]
    low, high = first["interval"]
    accuracy = (f"{first['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", f"{first['steps_to_error']:.1f}")
    return (f"{row['steps']:.0f}", str(row["n"]), *accuracy, *most, f"{first['cut']:.1%}", str(row["failed"]))
