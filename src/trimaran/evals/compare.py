"""`trimaran score --compare RUN_A RUN_B`: two folders' scores side by side, problem by problem.

What both were scored on in the same way is compared: task, settings, sampling. Both answered the same problems, so the
interval of the difference is that of the mean of per-problem differences (paired), which is narrower than two intervals
that overlap suggest.
"""

import json as as_json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trimaran.errors import Refusal
from trimaran.evals.interval import mean_interval
from trimaran.evals.records import Records
from trimaran.evals.table import aligned
from trimaran.report import say
from trimaran.tasks.task import REWARD

COLUMNS = ("task", "answers", "n", "A", "95 %", "B", "95 %", "B - A", "95 %", "")
LEVEL = 0.95


@dataclass(frozen=True)
class Pair:
    """One task and way of answering over the `n` problems that both sides have: means of rewards, the mean of the
    per-problem differences b - a, and the bootstrap's interval of each."""

    task: str
    mode: str
    n: int
    a: float
    a_interval: tuple[float, float]
    b: float
    b_interval: tuple[float, float]
    difference: float
    interval: tuple[float, float]

    @property
    def sure(self) -> bool:
        """Whether the interval of the difference leaves 0 out."""
        return self.interval[0] > 0 or self.interval[1] < 0


def main(one: str, other: str, json: bool = False) -> int:
    """Prints the comparison of two folders as a table, or as one JSON document."""
    pairs = compared(Path(one), Path(other))
    if json:
        say(as_json.dumps({"a": one, "b": other, "pairs": [asdict(pair) for pair in pairs]}, indent=1))
    else:
        say(f"A {one}\nB {other}\n{table(pairs)}\n* the interval of the difference leaves 0 out")
    return 0


def compared(one: Path, other: Path, seed: int = 0) -> list[Pair]:
    """What both folders were scored on alike. Raises Refusal for a folder without scores, and if nothing is alike."""
    ours, theirs = scored(one), scored(other)
    found = []
    for key in ours:
        if key not in theirs:
            continue
        a, b = rewards(ours[key]), rewards(theirs[key])
        for mode in a:
            numbers = sorted(a[mode].keys() & b.get(mode, {}).keys())
            if numbers:
                found.append(
                    pair(key[0], mode, [a[mode][number] for number in numbers], [b[mode][n] for n in numbers], seed)
                )
    if not found:
        mine, its = (", ".join(sorted({name for name, _ in side})) for side in (ours, theirs))
        raise Refusal(
            f"nothing that {one} ({mine}) and {other} ({its}) were scored on in the same way",
            "the same tasks with the same settings",
            "score both with one command line",
        )
    return found


def scored(folder: Path) -> dict[tuple[str, str], Path]:
    """The folders of records by (task, digest of how it was asked)."""
    found = {}
    for path in sorted(folder.glob("scores/*/results.json")):
        document = as_json.loads(path.read_text(encoding="utf-8"))
        for name, one in document.get("tasks", {}).items():
            if "asked" in one:
                found[name, str(one["asked"])] = path.parent
    if not found:
        raise Refusal(f"no scores in {folder}", "a folder that was scored", f"trimaran score {folder} TASKS")
    return found


def rewards(folder: Path) -> dict[str, dict[int, float]]:
    """Mode -> number of the problem -> mean reward of its samples."""
    each: dict[str, dict[int, list[float]]] = {}
    for (mode, number, _), record in Records(folder / "records.jsonl").known.items():
        each.setdefault(mode, {}).setdefault(number, []).append(record["scores"][REWARD])
    return {mode: {n: sum(all_) / len(all_) for n, all_ in items.items()} for mode, items in each.items()}


def pair(task: str, mode: str, a: Sequence[float], b: Sequence[float], seed: int) -> Pair:
    """The figures of rewards of the same problems, in the same order."""
    differences = [y - x for x, y in zip(a, b, strict=True)]
    return Pair(
        task,
        mode,
        len(a),
        sum(a) / len(a),
        mean_interval(a, seed, LEVEL),
        sum(b) / len(b),
        mean_interval(b, seed, LEVEL),
        sum(differences) / len(differences),
        difference_interval(differences, seed),
    )


def difference_interval(differences: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The interval of a mean of numbers in -1 to 1, as `mean_interval` has it for 0 to 1."""
    low, high = mean_interval([(one + 1) / 2 for one in differences], seed, LEVEL)
    return 2 * low - 1, 2 * high - 1


def table(pairs: Sequence[Pair]) -> str:
    rows: list[Sequence[str]] = [COLUMNS]
    for one in pairs:
        figures = (f"{one.a:.1%}", span(one.a_interval), f"{one.b:.1%}", span(one.b_interval))
        apart = (f"{one.difference:+.1%}", f"{one.interval[0]:+.1%} to {one.interval[1]:+.1%}")
        rows.append((one.task, one.mode, str(one.n), *figures, *apart, "*" if one.sure else ""))
    return aligned(rows)


def span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.1%} to {interval[1]:.1%}"
