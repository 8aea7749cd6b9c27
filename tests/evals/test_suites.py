"""Suites of several tasks, analyses, and two folders side by side; all through the verb's own function."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
from matplotlib.figure import Figure

from tests.cli.test_cli import run_main
from tests.evals.boats import Word
from trimaran.errors import Refusal
from trimaran.evals.compare import compared, difference_interval
from trimaran.evals.run import main, settings_of
from trimaran.evals.suites import SUITES, Report, Row, Suite, context_of, lengths_of
from trimaran.model import hub
from trimaran.tasks.task import Task


class Deep(Word):
    """Has problems only where they fit."""

    length: int = 4
    leaks: bool = False  # whether problem 1 breaks it

    def score(self, trace):
        if self.leaks and trace.prompt.number == 1:
            raise ZeroDivisionError("a hole below the waterline")
        return super().score(trace)

    def prompt(self, number, split="train"):
        if self.length < 4:
            raise Refusal(f"length {self.length}", "4 or more", "more")
        return super().prompt(number, split)


class Harbour(Suite):
    """Words at several lengths."""

    name: ClassVar[str] = "harbour"
    lengths: tuple[int, ...] = (4,)
    leaks: bool = False

    def rows(self, context):
        tasks = {str(length): Deep(length=length, leaks=self.leaks) for length in self.lengths}
        return {name: Row(task, {"max_tokens": task.length, "samples": 0}) for name, task in tasks.items()}

    def report(self, context, results):
        faults = [name for name, one in results.items() if one.fault is not None]
        scored = {name: one.score.greedy.reward for name, one in results.items() if one.score is not None}
        tokens = {name: max(one["tokens"] for one in results[name].records) for name in scored}
        picture = Figure()
        picture.subplots().bar(list(scored), list(scored.values()))
        return Report({"rewards": scored, "tokens": tokens, "faults": faults}, f"harbour: {len(scored)} rows", picture)


@pytest.fixture
def harbour(monkeypatch):
    monkeypatch.setitem(SUITES, "harbour", f"{__name__}:Harbour")


def saved(model, tokenizer, place: Path) -> Path:
    hub.save(model, place)
    tokenizer.save(place)
    return place


def test_rows_have_their_own_settings_and_a_fault_stops_no_other(model, tokenizer, tmp_path, harbour, capsys):
    folder = saved(model, tokenizer, tmp_path / "run")
    (folder / "recipe.toml").write_text("[data]\nsequence_length = 128\n")
    words = ["n=3", "samples=2", "max_tokens=9", "dtype=float64", "engine.memory_bytes=16777216"]
    code = main(str(folder), words, "harbour", json=True, lengths="5,2,7")
    found = json.loads(capsys.readouterr().out)["suites"]["harbour"]
    assert code == 1  # a row without a score
    assert list(found["rows"]) == ["5", "2", "7"] and found["faults"] == ["2"] and found["trained_length"] == 128
    assert "length 2" in found["rows"]["2"]["error"]
    assert found["rewards"].keys() == {"5", "7"} and found["tokens"]["5"] <= 5 and found["tokens"]["7"] <= 7
    assert found["rows"]["5"]["sampled"] is None and found["rows"]["5"]["greedy"]["n"] == 3
    (home,) = folder.glob("scores/harbour-*/harbour.png")
    assert json.loads((home.parent / "results.json").read_text())["suites"]["harbour"] == found


def test_the_same_command_again_plays_nothing(model, tokenizer, tmp_path, harbour, capsys):
    folder = saved(model, tokenizer, tmp_path / "run")
    words = ["n=2", "dtype=float64", "engine.memory_bytes=16777216"]
    assert main(str(folder), words, "harbour") == 0
    first = {path: path.read_bytes() for path in folder.glob("scores/*/records.jsonl")}
    assert first and main(str(folder), words, "harbour") == 0
    assert first == {path: path.read_bytes() for path in folder.glob("scores/*/records.jsonl")}
    assert "harbour: 1 rows" in capsys.readouterr().out


def test_episodes_that_failed_are_counted_and_left_out(model, tokenizer, tmp_path, harbour, capsys):
    folder = saved(model, tokenizer, tmp_path / "run")
    words = ["n=3", "dtype=float64", "engine.memory_bytes=16777216", "suites.harbour.leaks=true"]
    assert main(str(folder), words, "harbour", json=True) == 1
    found = json.loads(capsys.readouterr().out)["suites"]["harbour"]
    assert found["rows"]["4"]["greedy"]["failed"] == 1 and found["rows"]["4"]["greedy"]["n"] == 2


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("arithmetic", [], "4k"), "--lengths without a suite: arithmetic"),
        (("harbour", [], "4q"), "'4q'"),
        (("harbour", [], "0"), "'0'"),
        (("harbour", ["suites.harbour.length=4"]), "length"),
        (("harbor", []), "harbor"),
    ],
)
def test_what_cannot_be_asked(model, tokenizer, tmp_path, harbour, asked, said):
    tasks, overrides, *lengths = asked
    with pytest.raises(Refusal) as refusal:
        main(str(saved(model, tokenizer, tmp_path)), overrides, tasks, lengths=lengths[0] if lengths else None)
    assert said in str(refusal.value)


def test_lengths_and_contexts(tmp_path):
    assert lengths_of("4k,8k,1M,100") == [4096, 8192, 1 << 20, 100]
    assert context_of(str(tmp_path)).trained is None
    assert settings_of("arithmetic", []).suites == {}


def test_two_folders_side_by_side(model, tokenizer, tmp_path, capsys):
    one, other = (saved(model, tokenizer, tmp_path / name) for name in "ab")
    words = ["n=6", "samples=2", "max_tokens=8", "dtype=float64", "engine.memory_bytes=16777216"]
    words += ["tasks.word.task=tests.evals.boats:Word"]
    with pytest.raises(Refusal, match="no scores in"):
        compared(one, other)
    assert main(str(one), words) == main(str(other), [*words, "seed=0"]) == 0
    same = compared(one, other)
    assert [(pair.task, pair.mode, pair.n) for pair in same] == [("word", "greedy", 6), ("word", "sampled", 6)]
    assert all(pair.difference == 0 and not pair.sure and pair.a == pair.b for pair in same)
    for path in other.glob("scores/*/records.jsonl"):  # as if all answers had been right
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["scores"]["reward"] = 1.0
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    capsys.readouterr()
    code, out, _ = run_main(capsys, "score", "--compare", str(one), str(other), "--json")
    assert code == 0
    for pair in json.loads(out)["pairs"]:
        assert pair["b"] == 1 and pair["difference"] == pytest.approx(1 - pair["a"])
        assert pair["interval"][0] <= pair["difference"] <= pair["interval"][1]
    assert run_main(capsys, "score", "--compare", str(one), str(other))[1].count("*") >= 1
    code, _, err = run_main(capsys, "score", "--compare", str(one))
    assert code == 2 and "--compare with one folder" in err


def test_intervals_of_differences():
    low, high = difference_interval([1.0, 0.0, 1.0, 0.0, -1.0, 1.0, 0.5, 1.0])
    assert -1 <= low < 0.4375 < high <= 1
    low, high = difference_interval([0.0] * 10)
    assert low == -high and high == pytest.approx(1 - 0.025**0.1)


def test_every_suite_and_analysis_opens():
    from trimaran.config import imported
    from trimaran.evals.suites import ANALYSES

    for place in SUITES.values():
        assert issubclass(imported(place), Suite)
    assert all(callable(imported(place)) for place in ANALYSES.values())
    assert not SUITES.keys() & ANALYSES.keys() and issubclass(Deep, Task)
