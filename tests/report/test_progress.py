"""The live line, the plain lines and the metrics, on a real terminal (a pty), a pipe, a full disk."""

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from trimaran.report import Metrics, Progress, environment, read_metrics, say, series
from trimaran.report.progress import Pace
from trimaran.report.terminal import hours, short, size_text


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pace_forgets_warm_up_and_counts_pauses():
    clock = Clock()
    pace = Pace(0, clock)
    assert pace.seconds_left(100) is None and pace.tokens_per_second == 0
    clock.now = 60.0  # the first step compiles
    pace.add(1, 10)
    assert pace.seconds_left(100) == pytest.approx(60 * 99)
    for step in range(2, 41):
        clock.now += 1.0
        pace.add(step, 10)
    assert pace.seconds_left(100) == pytest.approx(60)
    assert pace.tokens_per_second == pytest.approx(10)
    for step in range(41, 101):
        clock.now += 3.0  # the machine gets busy
        pace.add(step, 10)
    assert pace.seconds_left(200) == pytest.approx(300)
    assert pace.seconds_left(100) == 0


def test_pace_of_a_long_run_stays_small_and_right():
    clock = Clock()
    pace = Pace(5000, clock)
    for step in range(5001, 15001):
        clock.now += 0.5
        pace.add(step, 1)
    assert len(pace._samples) <= 1025
    assert pace.seconds_left(16000) == pytest.approx(500)


def steps_of(progress: Progress, clock: Clock, steps: range) -> None:
    for step in steps:
        clock.now += 1.0
        progress.update(step, tokens=4096, loss=10 / step, lr=1e-3)


def test_without_a_terminal_there_are_plain_lines_now_and_then():
    clock, stream = Clock(), io.StringIO()
    with Progress(40, stream=stream, every_s=5.0, clock=clock) as progress:
        steps_of(progress, clock, range(1, 41))
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()
    shown = [int(re.match(r"train +(\d+)/40 ", line)[1]) for line in lines[:-1]]
    assert shown == [1, 6, 11, 16, 21, 26, 31, 36, 40]
    assert re.fullmatch(r"train  21/40   52%  loss 0\.476  lr 1\.0e-03 +4\.1k tok/s  [\d.]+ [MG]B  0:19 left", lines[4])
    assert re.fullmatch(r"train  40 steps, 164k tokens in 0:40 \(\d:\d\d of CPU time\)", lines[-1])


@pytest.mark.parametrize(("values", "shown"), [
    ({"reward": 0.25, "apart": 1.5}, "apart 1.500"), ({"reward": 0.25, "other": 7}, "reward 0.250"),
])  # fmt: skip
def test_what_a_stage_works_on_leads(values, shown):
    clock, stream = Clock(), io.StringIO()
    with Progress(2, stream=stream, every_s=0.5, clock=clock) as progress:
        clock.now += 1
        progress.update(1, loss=0.5, **values)
        clock.now += 1
        progress.update(2, loss=0.5)  # of several updates of a batch only the first has a reward
    for line in stream.getvalue().splitlines()[:2]:
        assert re.search(rf"%  {re.escape(shown)}  loss 0\.500", line)


PROGRAM = """
from trimaran.report import Progress
with Progress(500, metrics={metrics!r}) as progress:
    for step in range(1, 501):
        progress.update(step, tokens=64, loss=500 / step, lr=1e-3)
        if step == 250:
            progress.log(step, val_loss=4.0)
            progress.say("half way")
    progress.curves(train="loss", val="val_loss")
"""


def on_a_terminal(program: str, columns: int, **environ: str) -> str:
    """What a program writes to a terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", **environ},
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux says EIO when the other side has closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait() == 0
    return written.decode().replace("\r\n", "\n")


def screen(written: str) -> list[str]:
    """The lines that stay on the screen: \\r goes back, CSI K clears, colours vanish."""
    lines = []
    for row in re.sub(r"\x1b\[\d*m", "", written).split("\n"):
        cells = ""
        for part in row.split("\r"):
            cells = part.removeprefix("\x1b[K") if part.startswith("\x1b[K") else part + cells[len(part) :]
        lines.append(cells)
    return lines


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_on_a_terminal_one_line_is_redrawn_within_its_width(tmp_path, columns):
    written = on_a_terminal(PROGRAM.format(metrics=str(tmp_path / "m.jsonl")), columns)
    live = [part for part in re.sub(r"\x1b\[\d*m", "", written).split("\r\x1b[K") if part.startswith("train")]
    assert max(len(part.split("\n")[0]) for part in live) < columns
    assert ("lr 1.0e-03" in written) == (columns > 40), "what is least needed gives way"
    assert ("━" in written) == (columns > 80)
    lines = screen(written)
    assert "half way" in lines
    assert any("│" in line for line in lines) and any("● val" in line for line in lines)
    assert re.match(r"train  500/500  100%", lines[-3])
    assert lines[-2].startswith("train  500 steps, 32k tokens in 0:0")
    assert lines[-1] == ""


def test_no_color_and_dumb_terminals_are_heard(tmp_path):
    program = PROGRAM.format(metrics=str(tmp_path / "m.jsonl"))
    assert "\x1b[3" not in on_a_terminal(program, 80, NO_COLOR="1")
    assert "\x1b" not in on_a_terminal(program, 80, TERM="dumb")


def test_metrics_are_json_lines_with_wall_and_cpu_time(tmp_path):
    clock, path = Clock(), tmp_path / "run" / "metrics.jsonl"
    with Progress(3, stream=io.StringIO(), metrics=path, clock=clock) as progress:
        steps_of(progress, clock, range(1, 4))
        progress.log(3, val_loss=float("nan"))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 3]
    assert [r["tokens"] for r in records[:3]] == [4096, 8192, 12288]
    assert [r["wall_s"] for r in records] == [1, 2, 3, 3]
    assert all(r["cpu_s"] >= 0 and r["memory_bytes"] > 1e6 for r in records)
    assert records[3]["val_loss"] == "nan"
    assert series(path, train="loss", nothing="none") == {"train": ((1, 2, 3), (10, 5, pytest.approx(10 / 3)))}


def test_resuming_drops_what_will_be_done_again_and_counts_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    clock = Clock()
    progress = Progress(10, stream=io.StringIO(), metrics=path, clock=clock)
    steps_of(progress, clock, range(1, 8))
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    clock = Clock()
    progress = Progress(10, stream=io.StringIO(), metrics=path, start=5, clock=clock)
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5]
    steps_of(progress, clock, range(6, 11))
    records = read_metrics(path)
    assert [r["step"] for r in records] == list(range(1, 11))
    assert [r["wall_s"] for r in records] == list(range(1, 11))
    assert records[-1]["tokens"] == 10 * 4096
    Progress(10, stream=io.StringIO(), metrics=path, clock=Clock())
    assert path.read_text() == "", "a run from the beginning starts an empty file"


def test_metrics_that_cannot_be_written_are_said_once_and_stop_nothing(tmp_path):
    said = []
    metrics = Metrics(tmp_path / "metrics.jsonl", warn=said.append)
    metrics.path = "/dev/full"
    for step in range(3):
        metrics.write(step=step)
    assert len(said) == 1 and "/dev/full: no space left on device" in said[0]
    metrics.path = tmp_path / "metrics.jsonl"
    metrics.write(step=3)
    assert read_metrics(metrics.path) == [{"step": 3}], "writing is tried again"

    (tmp_path / "file").write_text("")
    said.clear()
    Metrics(tmp_path / "file" / "metrics.jsonl", warn=said.append).write(step=1)
    assert len(said) == 1


def test_a_terminal_that_goes_away_stops_nothing(tmp_path):
    clock, stream = Clock(), io.StringIO()
    progress = Progress(10, stream=stream, metrics=tmp_path / "m.jsonl", clock=clock)
    steps_of(progress, clock, range(1, 3))
    stream.close()
    steps_of(progress, clock, range(3, 11))
    progress.close()
    assert len(read_metrics(tmp_path / "m.jsonl")) == 10


def test_a_curve_that_cannot_be_saved_stops_nothing(tmp_path, capsys):
    clock = Clock()
    progress = Progress(3, stream=io.StringIO(), metrics=tmp_path / "m.jsonl", clock=clock)
    steps_of(progress, clock, range(1, 4))
    progress.curves(tmp_path / "m.jsonl" / "curve.png", loss="loss")
    assert "the curve is not saved" in capsys.readouterr().out


def test_say_prints_what_the_stream_can_show(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("loss ⠒⠒ 3.2")
    assert raw.getvalue() == b"loss ?? 3.2\n"


def test_numbers_in_few_letters():
    assert [short(n) for n in (0, 7, 999.6, 1234, 999_950, 3.2e9)] == ["0", "7", "1k", "1.23k", "1M", "3.2B"]
    assert [size_text(n) for n in (2e3, 6.12e8, 1.5e9)] == ["2 kB", "612 MB", "1.5 GB"]
    assert [hours(n) for n in (0.4, 61, 7384)] == ["0:00", "1:01", "2:03:04"]


def test_the_environment_names_versions_machine_and_date():
    found = environment()
    assert found["trimaran"] and found["python"] and found["cpu"] and found["cores"]
    assert re.match(r"\d{4}-\d\d-\d\dT", found["date"])
    json.dumps(found)
