"""A representation analysis as a picture: ACCS by layer, by length of the prefix, and by its compressibility."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimaran.disk import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = {"text": "#2a6f97", "periodic": "#d1603d", "noise": "#5b8e55"}
STYLE = {"trained": "-", "untrained": ":"}


def picture(path: Path, document: dict[str, Any]) -> None:
    """Writes the PNG whole or not at all. Raises Refusal when the disk is full or the folder may not be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needed at the very end only
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    layers, lengths, places = canvas.figure.subplots(1, 3)
    by_layer(layers, document)
    by_length(lengths, document)
    by_share(places, document)
    for axes in (layers, lengths, places):
        axes.set_ylabel("ACCS (higher: order of the prefix forgotten)")
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    layers.legend(frameon=False, fontsize=8)
    figure.suptitle(document["model"], x=0.02, ha="left", fontsize=11)
    with whole(path) as temporary:
        figure.savefig(temporary, format="png")


def by_layer(axes: "Axes", document: dict[str, Any]) -> None:
    """Every layer after the longest prefix; the band is the interval of the trained model."""
    places = list(range(len(document["layers"])))
    for name, parts in document["measured"].items():
        for source, part in parts.items():
            axes.plot(places, part["accs"][-1], STYLE[name], color=INK[source], label=f"{source}, {name}")
            if name == "trained":
                low, high = zip(*part["interval"][-1])
                axes.fill_between(places, low, high, color=INK[source], alpha=0.15, linewidth=0)
    step = -(-len(places) // 16)
    axes.set_xticks(places[::step], [document["layers"][place] for place in places[::step]], rotation=60, fontsize=7)
    axes.set_title(f"by layer, prefix of {document['lengths'][-1]} tokens", loc="left", fontsize=10)


def by_length(axes: "Axes", document: dict[str, Any]) -> None:
    """The last layer after every prefix."""
    for name, parts in document["measured"].items():
        for source, part in parts.items():
            values = [of_layers[-1] for of_layers in part["accs"]]
            axes.plot(document["lengths"], values, STYLE[name], color=INK[source], marker="o", markersize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(document["lengths"], [str(length) for length in document["lengths"]])
    axes.set_xlabel("tokens of the prefix")
    axes.set_title("by length, last layer", loc="left", fontsize=10)


def by_share(axes: "Axes", document: dict[str, Any]) -> None:
    """Every sequence after its longest prefix, last layer of the trained model."""
    for source, part in document["measured"]["trained"].items():
        of_each = part["sequences"]
        axes.plot(of_each["compressed"], of_each["accs"], "o", color=INK[source], markersize=4, alpha=0.6)
    axes.set_xlabel("compressed / plain bytes of the prefix (LZMA)")
    axes.set_title("by compressibility, last layer", loc="left", fontsize=10)
