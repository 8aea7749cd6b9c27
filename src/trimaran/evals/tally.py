"""From records to figures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trimaran.errors import Refusal
from trimaran.evals.interval import mean_interval, pass_at
from trimaran.tasks.task import REWARD

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Tally:
    """Figures of one way of answering (greedy or sampled) over `n` problems with `samples` episodes each.

    reward: mean over problems of the mean over their samples, in `low` to `high` by the bootstrap at 95 %. pass_at: the
    chance that one of k samples is solved (reward 1). scores: means of the task's other scores. tokens,
    thought_tokens: means per episode. finish: shares of how episodes ended. failed: episodes whose task broke; they are
    in no other figure.
    """

    n: int
    samples: int
    reward: float
    low: float
    high: float
    pass_at: Mapping[int, float]
    scores: Mapping[str, float]
    tokens: float
    thought_tokens: float
    finish: Mapping[str, float]
    failed: int


@dataclass(frozen=True)
class Score:
    """A task's figures; distinct: how many different problems there were (small tasks draw some twice)."""

    greedy: Tally | None
    sampled: Tally | None
    distinct: int

    @property
    def failed(self) -> int:
        return sum(tally.failed for tally in (self.greedy, self.sampled) if tally is not None)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def score_of(name: str, records: Sequence[Record], seed: int) -> Score:
    """The figures of a task's records."""
    by_mode = {mode: [one for one in records if one["mode"] == mode] for mode in ("greedy", "sampled")}
    greedy, sampled = (tally(f"{name}, {mode}", some, seed) if some else None for mode, some in by_mode.items())
    return Score(greedy, sampled, len({repr((one["prompt"], one["tools"])) for one in records}))


def tally(what: str, records: Sequence[Record], seed: int) -> Tally:
    """Figures of records of one mode. Raises Refusal where every episode failed: there is no score to tell."""
    sound = [one for one in records if one["error"] is None]
    if not sound:
        last = records[0]["error"].strip().splitlines()[-1]
        raise Refusal(
            f"{what}: all {len(records)} episodes failed, the first with {last!r:.200}",
            "a task that runs",
            "read the tracebacks in the records, correct the task, and score again",
        )
    items: dict[int, list[Record]] = {}
    for one in sound:
        items.setdefault(one["number"], []).append(one)
    rewards = [mean([one["scores"][REWARD] for one in item]) for item in items.values()]
    low, high = mean_interval(rewards, seed)
    solved = [(len(item), sum(one["scores"][REWARD] == 1 for one in item)) for item in items.values()]
    fewest = min(size for size, _ in solved)
    names = sorted({name for one in sound for name in one["scores"]} - {REWARD})
    ends = Counter(one["finish"] for one in sound)
    return Tally(
        n=len(items),
        samples=max(size for size, _ in solved),
        reward=mean(rewards),
        low=low,
        high=high,
        pass_at={k: mean([pass_at(k, size, right) for size, right in solved]) for k in sorted({1, fewest})},
        scores={name: mean([one["scores"][name] for one in sound if name in one["scores"]]) for name in names},
        tokens=mean([one["tokens"] for one in sound]),
        thought_tokens=mean([one["thought_tokens"] for one in sound]),
        finish={end: ends[end] / len(sound) for end in ("stop", "length", "turns") if ends[end]},
        failed=len(records) - len(sound),
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
