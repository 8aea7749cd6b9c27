"""Loss curves: in the terminal (a dotted line of braille, marks for further curves) and as PNG."""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from operator import itemgetter
from typing import TYPE_CHECKING

from trimaran.disk import whole
from trimaran.report.metrics import Points
from trimaran.report.terminal import COLOURS, PLAIN, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKS = "●▲■◆"
BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # the bit of each dot, row by row, left and right
INK = ("#2a6f97", "#d1603d", "#5b8e55", "#7d5ba6")


def curve_terminal(
    series: Mapping[str, Points], *, width: int = 76, height: int = 14, colour: bool = False, title: str = ""
) -> str:
    """Curves as text, `width` columns wide and `height` rows high without axis and legend.

    `series` maps a name to (steps, values). The first curve is a dotted line, averaged within each column of dots;
    further ones are marks at their own points (thinned where they would touch). Points that are not finite are left
    out; with none left, the text says so.
    """
    curves = {name: finite(points) for name, points in series.items()}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return "(no finite points to draw)"
    steps = [x for points in curves.values() for x, _ in points]
    values = [y for points in curves.values() for _, y in points]
    y_ticks = ticks(min(values), max(values), max(2, height // 3))
    labels = tick_texts(y_ticks)
    margin = max(map(len, labels.values())) + 1
    canvas = Canvas(width - margin - 1, height, (min(steps), max(steps)), widened(min(values), max(values)))
    for index, points in enumerate(curves.values()):
        ink = COLOURS[index % len(COLOURS)] if colour else ""
        if index == 0:
            canvas.line(points, ink)
        else:
            canvas.marks(points, MARKS[(index - 1) % len(MARKS)], ink)
    rows = {canvas.row(tick): labels[tick] for tick in y_ticks if canvas.low <= tick <= canvas.high}
    body = [
        f"{rows.get(row, ''):>{margin}}{'┤' if row in rows else '│'}{canvas.text(row)}".rstrip()
        for row in range(height)
    ]
    lines = [title] if title else []
    return "\n".join([*lines, *body, *foot(canvas, margin), legend(list(curves), margin, colour)])


def finite(points: Points) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(*points) if math.isfinite(x) and math.isfinite(y)]


def widened(low: float, high: float) -> tuple[float, float]:
    """A range with some height, also for a curve that is flat."""
    if high > low:
        return low, high
    room = abs(low) * 0.01 or 1.0
    return low - room, high + room


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (steps of 1, 2, 2.5 or 5 times a power of ten) between low and high, `about` that many."""
    low, high = widened(low, high)
    raw = (high - low) / about
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(scale * nice for nice in (1, 2, 2.5, 5, 10) if scale * nice >= raw * 0.8)
    first = math.ceil(low / step - 1e-9)
    return [(first + i) * step for i in range(math.floor(high / step + 1e-9) - first + 1)]


def tick_texts(values: Sequence[float]) -> dict[float, str]:
    """The shortest decimals that tell the ticks apart."""
    for digits in range(7):
        texts = {value: f"{value:.{digits}f}" for value in values}
        if all(math.isclose(float(text), value, rel_tol=1e-6, abs_tol=1e-12) for value, text in texts.items()):
            return texts
    return {value: f"{value:.3g}" for value in values}


def foot(canvas: "Canvas", margin: int) -> list[str]:
    """The step axis: a rule with ticks, and the numbers under them."""
    rule, numbers, free = ["─"] * canvas.columns, [" "] * canvas.columns, 0
    low, high = canvas.steps
    for tick in ticks(low, high, max(2, canvas.columns // 14)):
        column = min(canvas.columns - 1, canvas.column(tick) // 2)
        text = short(tick)
        start = max(0, min(column - len(text) // 2, canvas.columns - len(text)))
        rule[column] = "┴"
        if start >= free:
            numbers[start : start + len(text)] = text
            free = start + len(text) + 2
    return [f"{'':>{margin}}└{''.join(rule)}", f"{'':>{margin}} {''.join(numbers)}".rstrip()]


def legend(names: Sequence[str], margin: int, colour: bool) -> str:
    entries = []
    for index, name in enumerate(names):
        mark = "⠒⠒" if index == 0 else MARKS[(index - 1) % len(MARKS)]
        ink, end = (COLOURS[index % len(COLOURS)], PLAIN) if colour else ("", "")
        entries.append(f"{ink}{mark}{end} {name}")
    return f"{'':>{margin}} {'   '.join(entries)}   over steps"


class Canvas:
    """A field of characters, each of 2 x 4 braille dots or one mark, with an ink (an escape sequence) of its own."""

    def __init__(self, columns: int, rows: int, steps: tuple[float, float], values: tuple[float, float]):
        self.columns, self.rows = columns, rows
        self.steps = widened(*steps) if steps[0] == steps[1] else steps
        self.low, self.high = values
        self._signs: dict[tuple[int, int], str] = {}
        self._dots: dict[tuple[int, int], int] = {}
        self._inks: dict[tuple[int, int], str] = {}

    def column(self, step: float) -> int:
        """The column of dots for a step."""
        low, high = self.steps
        return round((step - low) / (high - low) * (2 * self.columns - 1))

    def level(self, value: float) -> int:
        """The row of dots for a value, from the top."""
        return round((self.high - value) / (self.high - self.low) * (4 * self.rows - 1))

    def row(self, value: float) -> int:
        return self.level(value) // 4

    def line(self, points: Sequence[tuple[float, float]], ink: str) -> None:
        """A curve of dots, its columns joined, gaps bridged."""
        heaps: dict[int, list[float]] = {}
        for step, value in points:
            heaps.setdefault(self.column(step), []).append(value)
        columns = sorted(heaps)
        levels = [self.level(statistics.fmean(heaps[column])) for column in columns]
        self._dot(columns[0], levels[0], ink)
        for (left, right), (a, b) in zip(pairwise(columns), pairwise(levels)):
            length = max(right - left, abs(b - a), 1)
            for i in range(1, length + 1):
                self._dot(left + round(i * (right - left) / length), a + round(i * (b - a) / length), ink)

    def marks(self, points: Sequence[tuple[float, float]], mark: str, ink: str) -> None:
        """A mark at each point, but none right beside another."""
        free = -1
        for step, value in sorted(points):
            column = self.column(step) // 2
            if column >= free:
                self._signs[column, self.row(value)] = mark
                self._inks[column, self.row(value)] = ink
                free = column + 2

    def _dot(self, x: int, y: int, ink: str) -> None:
        place = (x // 2, y // 4)
        self._dots[place] = self._dots.get(place, 0) | BRAILLE[y % 4][x % 2]
        self._inks.setdefault(place, ink)

    def text(self, row: int) -> str:
        """One row of characters; neighbours of one ink share its escape sequence."""
        cells = [self._cell(column, row) for column in range(self.columns)]
        runs = [(ink, "".join(sign for _, sign in run)) for ink, run in groupby(cells, key=itemgetter(0))]
        return "".join(f"{ink}{signs}{PLAIN}" if ink else signs for ink, signs in runs)

    def _cell(self, column: int, row: int) -> tuple[str, str]:
        dots = self._dots.get((column, row))
        sign = self._signs.get((column, row)) or (chr(0x2800 + dots) if dots else " ")
        return self._inks.get((column, row), ""), sign


def curve_png(
    path: str | os.PathLike[str], series: Mapping[str, Points], *, title: str = "", value: str = "loss"
) -> None:
    """The same curves as a PNG, written whole or not at all. A dense curve is drawn pale with its running mean over it.

    `value` names the vertical axis. Raises `Refusal` when the disk is full or the folder may not be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needed at the very end only
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    for (name, points), ink in zip(series.items(), INK * (len(series) // len(INK) + 1)):
        draw(axes, name, finite(points), ink)
    axes.set_xlabel("step")
    axes.set_ylabel(value)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with whole(path) as temporary:
        figure.savefig(temporary, format="png")


def draw(axes: "Axes", name: str, points: Sequence[tuple[float, float]], ink: str) -> None:
    """One curve on matplotlib axes."""
    steps, values = [x for x, _ in points], [y for _, y in points]
    if len(points) > 100:
        axes.plot(steps, values, color=ink, linewidth=0.8, alpha=0.3)
        axes.plot(steps, smoothed(values, len(values) // 50), color=ink, linewidth=1.6, label=name)
    else:
        axes.plot(steps, values, color=ink, linewidth=1.4, marker="o", markersize=4, label=name)


def smoothed(values: Sequence[float], span: int) -> list[float]:
    """A running mean with weights fading over about `span` values on both sides, so that it does not lag behind."""
    back = fading(values[::-1], span)[::-1]
    return [(before + after) / 2 for before, after in zip(fading(values, span), back)]


def fading(values: Sequence[float], span: int) -> list[float]:
    """The mean of the values so far, weights fading exponentially, unbiased at the start."""
    keep, total, weight, means = 1 - 1 / max(1, span), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means
