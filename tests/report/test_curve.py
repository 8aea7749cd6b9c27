"""Curves: the right dots in the right places, and a PNG that is one."""

import math
import re

import pytest

from trimaran.errors import Refusal
from trimaran.report import curve_png, curve_terminal
from trimaran.report.curve import smoothed, ticks

FALLING = (range(1, 401), [3 + 8 * math.exp(-step / 40) for step in range(1, 401)])


def test_a_curve_in_the_terminal_as_it_looks():
    drawn = curve_terminal(
        {"loss": ([0, 50, 100], [4.0, 2.0, 1.0]), "val": ([50, 100], [2.5, 1.5])}, width=32, height=6
    )
    assert drawn.splitlines() == [
        " 4┤⠑⠢⢄⡀",
        "  │   ⠈⠑⠢⢄",
        "  │       ⠉⠒⠤⣀",
        " 2┤           ⠉⠒⠤●",
        "  │               ⠉⠉⠒⠒⠤⢄⣀⡀     ●",
        "  │                      ⠈⠉⠒⠒⠤⠤⣀",
        "  └┴─────────────┴─────────────┴",
        "   0            50           100",
        "   ⠒⠒ loss   ● val   over steps",
    ]


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize(("width", "height"), [(76, 14), (40, 6), (120, 30)])
def test_a_curve_keeps_to_its_field(width, height, colour):
    drawn = curve_terminal({"a": FALLING, "b": FALLING}, width=width, height=height, colour=colour)
    for code in ("\x1b[36m", "\x1b[33m", "\x1b[0m"):
        assert (code in drawn) == colour
        drawn = drawn.replace(code, "")
    lines = drawn.splitlines()
    assert len(lines) == height + 3, "the field, the axis, its numbers, the legend"
    assert max(map(len, lines)) <= width
    assert lines[-1].split() == ["⠒⠒", "a", "●", "b", "over", "steps"]


def test_a_falling_curve_falls():
    rows = curve_terminal({"loss": FALLING}).splitlines()[:14]
    field = [re.split("[│┤]", row)[1] for row in rows]
    columns = [[row for row in range(14) if len(field[row]) > c and field[row][c] > "\u2800"] for c in range(72)]
    heights = [min(found) for found in columns if found]
    assert heights == sorted(heights) and heights[0] == 0 and heights[-1] == 13


@pytest.mark.parametrize("values", [[2.0], [1.0, 1.0, 1.0], [0.0, 0.0], [-1e-9, 1e9], [5.0, math.nan, math.inf, 4.0]])
def test_odd_curves_are_drawn(values):
    assert "│" in curve_terminal({"loss": (range(len(values)), values)})


def test_nothing_to_draw_is_said():
    assert curve_terminal({}) == curve_terminal({"loss": ([1], [math.nan])}) == "(no finite points to draw)"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (2.96, 11.3, [4, 6, 8, 10]), (0, 1e-3, None), (7, 7, None)],
)
def test_ticks_are_round_and_inside(low, high, expected):
    found = ticks(low, high, 4)
    assert 2 <= len(found) <= 7
    if expected:
        assert found == expected


def test_smoothing_keeps_a_line_and_does_not_lag():
    assert smoothed([2.0] * 50, 8) == pytest.approx([2.0] * 50)
    ramp = [float(i) for i in range(200)]
    assert smoothed(ramp, 8)[100] == pytest.approx(100, abs=1e-3)


def test_png_is_a_png_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "deep" / "curve.png"
    curve_png(path, {"train": FALLING, "val": ([100, 400], [3.5, 3.1])}, title="a run")
    curve_png(path, {"train": FALLING}, title="a run")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["curve.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="cannot write"):
        curve_png(tmp_path / "file" / "curve.png", {"train": FALLING})
