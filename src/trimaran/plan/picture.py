"""A plan as a picture: for the best layouts, bars of a step's time and of a device's memory by part."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimaran.disk import whole
from trimaran.plan.show import MEMORY, TIME

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (
    *("#2a6f97", "#89c2d9", "#d1603d", "#e9a178", "#5b8e55", "#a7c4a0"),
    *("#7d5ba6", "#c3b1d9", "#444444", "#777777", "#bbbbbb"),
)

SEEN = 0.004  # a part below this share is not drawn


def picture(path: Path, content: dict[str, Any]) -> None:
    """Writes the PNG whole or not at all. Raises Refusal when the disk is full or the folder may not be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needed at the very end only
    from matplotlib.figure import Figure

    rows = [content, *content["alternatives"]]
    figure = Figure(figsize=(10.5, 2.2 + 0.42 * len(rows)), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = canvas.figure.subplots(1, 2, sharey=True)
    labels = [row["layout"]["words"].replace(" · ", ", ") for row in rows]
    bars(left, labels, [time_of(row) for row in rows], TIME, "seconds a step")
    sizes = [{key: value / 1e9 for key, value in row["memory"].items()} for row in rows]
    bars(right, labels, sizes, MEMORY, "GB a device")
    right.axvline(content["usable_bytes"] / 1e9, color="black", linewidth=1, linestyle=":")
    left.invert_yaxis()
    small: dict[str, Any] = {"ncols": 2, "fontsize": 7, "frameon": False}
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", **small)
    handles, names = right.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower right", **small)
    figure.suptitle(f"{content['model']} on {content['gpus']} x {content['hardware']}", x=0.02, ha="left", fontsize=11)
    with whole(path) as temporary:
        figure.savefig(temporary, format="png")


def time_of(row: dict[str, Any]) -> dict[str, float]:
    """The parts as they lie end to end: what is hidden is taken off the messages, the largest first."""
    parts, hidden = dict(row["time"]), -row["time"]["overlap"]
    for key in sorted(("data", "tensor", "expert", "pipeline"), key=lambda key: -parts[key]):
        taken = min(hidden, parts[key])
        parts[key], hidden = parts[key] - taken, hidden - taken
    return parts | {"overlap": 0.0}


def bars(axes: "Axes", labels: list[str], rows: list[dict[str, float]], names: dict[str, str], unit: str) -> None:
    """Stacked horizontal bars, one per layout; what no layout shows is left out."""
    starts = [0.0] * len(rows)
    for (key, name), colour in zip(names.items(), COLOURS):
        lengths = [row[key] for row in rows]
        if any(length > SEEN * sum(row.values()) for length, row in zip(lengths, rows)):
            axes.barh(labels, lengths, left=starts, color=colour, label=name, height=0.7)
            starts = [start + length for start, length in zip(starts, lengths)]
    axes.set_xlabel(unit)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
