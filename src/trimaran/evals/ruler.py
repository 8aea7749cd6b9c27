"""`trimaran score RUN ruler --lengths 4k,8k,16k`: RULER's thirteen tasks at every length, and how far a model reaches.

    score at a length    the mean of its tasks, 0 to 100, as published; a task that does not fit is left out and named
    effective length     the greatest length at which all tasks ran, and whose score is strictly above `baseline` (85.6:
                         Llama-2-7B chat at 4k)
    increasing           the mean over lengths, weighted 1, 2, 3, …: for those who use a model at length
    decreasing           the same with the weights the other way round: for those who do not

A length at which no task ran counts 0 in the two weighted means, as published. Answers are greedy, of at most the
published number of tokens, and without a thought. The haystack of essays and the documents of the questions are made up
unless files are given; the results say which.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from trimaran.errors import Refusal
from trimaran.evals.suites import Context, Report, Result, Row, Suite
from trimaran.evals.table import aligned
from trimaran.tasks import ruler

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAY = {"greedy": True, "samples": 0, "thinking": False}
BASELINE = 85.6


class Ruler(Suite):
    """Which of the thirteen, at which lengths, made of what."""

    name: ClassVar[str] = "ruler"
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)  # tokens of prompt and answer
    tasks: tuple[str, ...] = tuple(ruler.PUBLISHED)
    baseline: float = Field(BASELINE, ge=0, le=100)
    essays: Path | None = None  # a text, or a folder of texts
    squad: Path | None = None  # a file of SQuAD 2.0's form
    hotpot: Path | None = None  # a file of HotpotQA's form

    @model_validator(mode="after")
    def _consistent(self) -> "Ruler":
        if not self.lengths or self.lengths[0] < 1 or list(self.lengths) != sorted(set(self.lengths)):
            raise Refusal(f"lengths = {list(self.lengths)}", "rising numbers of tokens", "correct them")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise Refusal(f"tasks = {list(self.tasks)}", ", ".join(ruler.PUBLISHED), "name each once")
        for name in self.tasks:
            ruler.published(name, self.lengths[0])
        return self

    def task(self, name: str, length: int, folder: str) -> ruler.Ruler:
        """One row's task."""
        family, settings = ruler.PUBLISHED[name]
        own: dict[str, Any] = {}
        if settings.get("haystack") == "essay" and self.essays:
            own["path"] = self.essays
        if family == "qa" and (file := self.squad if settings["form"] == "squad" else self.hotpot):
            own["file"] = file
        return ruler.published(name, length, Path(folder), **own)

    def rows(self, context: Context) -> Mapping[str, Row]:
        tasks = {row_of(name, length): self.task(name, length, context.folder) for length, name in self.places()}
        return {name: Row(task, {**PLAY, "max_tokens": task.kept}) for name, task in tasks.items()}

    def places(self) -> list[tuple[int, str]]:
        """(length, task) of every row."""
        return [(length, name) for length in self.lengths for name in self.tasks]

    def report(self, context: Context, results: Mapping[str, Result]) -> Report:
        scores = {length: self.scores_at(length, results) for length in self.lengths}
        averages = {length: average(list(found.values())) for length, found in scores.items()}
        whole = {length: averages[length] for length, found in scores.items() if len(found) == len(self.tasks)}
        document = {
            "scores": {str(length): found for length, found in scores.items()},
            "averages": {str(length): value for length, value in averages.items()},
            "effective_length": effective(whole, self.baseline),
            "baseline": self.baseline,
            "increasing": weighted(list(averages.values())),
            "decreasing": weighted(list(averages.values())[::-1]),
            "made_of": {name: self.task(name, self.lengths[0], context.folder).made_of for name in self.tasks},
            "left_out": {name: str(one.fault) for name, one in results.items() if one.fault is not None},
        }
        return Report(document, text_of(self, document, context.trained), picture(self, document, context.trained))

    def scores_at(self, length: int, results: Mapping[str, Result]) -> dict[str, float]:
        """Score by task, 0 to 100, of the tasks that ran."""
        found = {}
        for name in self.tasks:
            score = results[row_of(name, length)].score
            if score is not None and score.greedy is not None:
                found[name] = round(100 * score.greedy.reward, 2)
        return found


def row_of(name: str, length: int) -> str:
    return f"{name}-{shown(length)}"


def shown(length: int) -> str:
    """4096 as 4k."""
    for factor, sign in ((1 << 20, "M"), (1 << 10, "k")):
        if length % factor == 0:
            return f"{length // factor}{sign}"
    return str(length)


def average(scores: Sequence[float]) -> float | None:
    return round(sum(scores) / len(scores), 2) if scores else None


def effective(averages: Mapping[int, float | None], baseline: float) -> int | None:
    """The greatest length whose score is above the baseline; None: there is none."""
    return max((length for length, value in averages.items() if value is not None and value > baseline), default=None)


def weighted(averages: Sequence[float | None]) -> float:
    """The mean with weights 1, 2, 3, …; where there is no score, it counts 0."""
    weights = range(1, len(averages) + 1)
    return round(sum(weight * (value or 0) for weight, value in zip(weights, averages)) / sum(weights), 2)


def text_of(suite: Ruler, document: Mapping[str, Any], trained: int | None) -> str:
    """A line per task, a column per length."""
    lengths = [str(length) for length in suite.lengths]
    beside = shown(trained) if trained else "?"
    rows: list[Sequence[str]] = [("RULER", "made of", "trained", *map(shown, suite.lengths))]
    for name in suite.tasks:
        cells = [document["scores"][length].get(name) for length in lengths]
        rows.append((name, Path(document["made_of"][name]).name, beside, *map(figure_of, cells)))
    rows.append(("average", "", beside, *(figure_of(document["averages"][length]) for length in lengths)))
    ran = [f"{len(document['scores'][length])}/{len(suite.tasks)}" for length in lengths]
    rows.append(("tasks that ran", "", "", *ran))
    reach = document["effective_length"]
    lines = [
        aligned(rows),
        f"effective length {shown(reach) if reach else f'below {shown(suite.lengths[0])}'} (above {suite.baseline:g}); "
        f"weighted average {document['increasing']} increasing, {document['decreasing']} decreasing",
    ]
    return "\n".join([*lines, *(f"{name}: {fault}" for name, fault in document["left_out"].items())])


def figure_of(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def picture(suite: Ruler, document: Mapping[str, Any], trained: int | None) -> "Figure":
    """Every task over the lengths, their average, the baseline, and where training ended."""
    from matplotlib.figure import Figure  # slow to import, and needed at the very end only

    figure = Figure(figsize=(7.5, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name in suite.tasks:
        found = [(length, document["scores"][str(length)].get(name)) for length in suite.lengths]
        kept = [(length, value) for length, value in found if value is not None]
        axes.plot(*zip(*kept), marker=".", linewidth=0.8, alpha=0.7, label=name) if kept else None
    found = [(length, document["averages"][str(length)]) for length in suite.lengths]
    kept = [(length, value) for length, value in found if value is not None]
    if kept:
        axes.plot(*zip(*kept), marker="o", color="black", linewidth=2, label="average")
    axes.axhline(suite.baseline, color="grey", linestyle=":")
    if trained:
        axes.axvline(trained, color="#d1603d", linestyle="--", linewidth=1, label="trained length")
    axes.set_xscale("log", base=2)
    axes.set_xticks(suite.lengths, list(map(shown, suite.lengths)))
    axes.set(xlabel="tokens of prompt and answer", ylabel="score", ylim=(-2, 102))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    return figure
