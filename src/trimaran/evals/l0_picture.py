"""L0-Bench as a picture: right traces by length, where they go wrong, what more compute at test time gives."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = ("#2a6f97", "#d1603d", "#5b8e55", "#7d5ba6", "#8a8a8a", "#b8860b")
NAMES = {"lines": "lines of the program", "depth": "depth of its blocks", "lists": "lengths of its lists"}


def picture(document: Mapping[str, Any]) -> "Figure":
    """Six panels over a report's document; one without values says so."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needed at the very end only
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.6), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    (length, alive, votes), (shown, thought, shape) = canvas.figure.subplots(2, 3)
    at = f" at {document['at']} steps"
    along(length, document, ["steps"], "right traces by steps")
    still_right(alive, document)
    by_votes(votes, document)
    along(shown, document, ["demonstrations"], "by demonstrations" + at)
    by_thought(thought, document, at)
    along(shape, document, list(NAMES), "by shape of the program" + at)
    for axes in (length, alive, votes, shown, thought, shape):
        axes.set_ylim(-0.03, 1.03)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
        elif not axes.has_data():
            axes.text(0.5, 0.5, "not asked for", ha="center", color="#8a8a8a", transform=axes.transAxes)
    return figure


def along(panel: "Axes", document: Mapping[str, Any], names: list[str], title: str) -> None:
    """Accuracy with its interval along axes, whose values stand in a row."""
    start, places = 0, []
    for axis in (name for name in names if name in document["axes"]):
        points = [one for one in document["axes"][axis] if one["row"] in document["figures"]]
        for mode, ink in zip(("greedy", "sampled"), INK):
            told = [(start + x, document["figures"][one["row"]][mode]) for x, one in enumerate(points)]
            told = [(x, one) for x, one in told if one is not None]
            if told:
                label = mode if axis == names[0] else None
                xs, ys = [x for x, _ in told], [one["accuracy"] for _, one in told]
                ends = [[one["accuracy"] - one["interval"][0] for _, one in told],
                        [one["interval"][1] - one["accuracy"] for _, one in told]]  # fmt: skip
                panel.errorbar(xs, ys, [[max(0, e) for e in end] for end in ends], marker="o", color=ink, label=label)
        places += [(start + x, one["value"]) for x, one in enumerate(points)]
        if axis in NAMES and points:
            panel.text(start, 0.98, NAMES[axis], fontsize=8, color="#606060")
        start += len(points) + 1
    panel.set_xticks([x for x, _ in places], [value for _, value in places], fontsize=8)
    panel.set_title(title, loc="left", fontsize=10)


def still_right(panel: "Axes", document: Mapping[str, Any]) -> None:
    """Share of answers without an error so far, a curve per bin."""
    for ink, point in zip(INK, document["axes"]["steps"]):
        row = document["figures"].get(point["row"])
        if row is not None:
            curve = (row["greedy"] or row["sampled"])["alive"]
            panel.plot(*zip(*curve), color=ink, label=f"{point['value']} steps")
    panel.set_xlabel("steps written", fontsize=8)
    panel.set_title("still right after so many steps", loc="left", fontsize=10)


def by_votes(panel: "Axes", document: Mapping[str, Any]) -> None:
    """Majority (line) and pass (dashes) by the number of samples, a pair per bin."""
    for ink, point in zip(INK, document["axes"]["steps"]):
        sampled = document["figures"].get(point["row"], {}).get("sampled")
        for name, style in (("majority", "o-"), ("pass_at", "o--")):
            if sampled and sampled[name]:
                label = f"{point['value']} steps" if name == "majority" else None
                panel.plot(list(sampled[name]), list(sampled[name].values()), style, color=ink, label=label)
                panel.set_xticks(list(sampled[name]))
    panel.set_title("by samples: majority (line), one of them (dashes)", loc="left", fontsize=10)


def by_thought(panel: "Axes", document: Mapping[str, Any], at: str) -> None:
    """Accuracy by tokens thought: of each bin's answers in quarters, and of budgets."""
    for ink, point in zip(INK, document["axes"]["steps"]):
        row = document["figures"].get(point["row"])
        told = (row["sampled"] or row["greedy"])["by_thought"] if row is not None else []
        if told:
            panel.plot(*zip(*told), "o:", color=ink, label=f"{point['value']} steps, in quarters")
    budgets = [(int(one["value"]), document["figures"].get(one["row"])) for one in document["axes"].get("budget", ())]
    told = [(tokens, (row["greedy"] or row["sampled"])["accuracy"]) for tokens, row in budgets if row is not None]
    if told:
        panel.plot(*zip(*told), "s-", color=INK[5], label="budgets" + at)
    panel.set_xlabel("tokens of the thought", fontsize=8)
    panel.set_title("by length of the thought", loc="left", fontsize=10)
