import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.evals.boats import Sinking, Word
from trimaran import cli
from trimaran.errors import Refusal
from trimaran.evals.play import Player
from trimaran.evals.records import Records, model_digest, source_of
from trimaran.evals.run import ScoreSettings, digest, main, score, settings_of
from trimaran.model import hub
from trimaran.tasks import names
from trimaran.tasks.names import TASKS

SMALL = ScoreSettings(n=3, samples=2, max_tokens=8)


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("run")
    hub.save(model, place)
    tokenizer.save(place)
    return place


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_and_records_say_the_same(engine, tmp_path):
    tasks = {"hull": Word(), "mast": Word(word="mast")}
    scores = score(engine, tasks, SMALL, tmp_path)
    assert scores == score(engine, tasks, SMALL)  # the same without a folder
    records = lines(tmp_path / "hull" / "records.jsonl")
    keys = [(one["mode"], one["number"], one["sample"]) for one in records]
    assert len(keys) == len(set(keys)) == 3 * (2 + 1)
    sampled = [one for one in records if one["mode"] == "sampled"]
    assert scores["hull"].sampled.tokens == sum(one["tokens"] for one in sampled) / 6
    assert scores["hull"].greedy.n == 3 and scores["hull"].distinct == 3
    for one in records:
        task = Word()
        assert one["prompt"] == list(task.prompt(one["number"], "held_out").messages)
        assert one["scores"]["letters"] == len(one["messages"][-1]["content"])


def test_an_interrupted_evaluation_goes_on_and_plays_nothing_twice(engine, tmp_path, monkeypatch):
    tasks = {"hull": Word()}
    whole = score(engine, tasks, SMALL, tmp_path / "whole")
    play, played = Player.play, []

    def interrupted(self, groups):
        for place, one in enumerate(play(self, groups)):
            if place == 4:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(Player, "play", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(engine, tasks, SMALL, tmp_path / "cut")
    path = tmp_path / "cut" / "hull" / "records.jsonl"
    first = lines(path)
    assert len(first) == 4
    with path.open("a") as file:
        file.write('{"mode": "sampled", "numb')  # torn by a kill

    def counted(self, groups):
        for one in play(self, groups):
            played.append(one)
            yield one

    monkeypatch.setattr(Player, "play", counted)
    assert score(engine, tasks, SMALL, tmp_path / "cut") == whole
    assert lines(path)[:4] == first and len(lines(path)) == 9
    assert len({(one["mode"], one["number"], one["sample"]) for one in lines(path)}) == 9
    played.clear()
    assert score(engine, tasks, SMALL, tmp_path / "cut") == whole and not played
    more = score(engine, tasks, SMALL.replace(n=5, samples=3), tmp_path / "cut")
    assert more["hull"].sampled.n == 5 and len(lines(path)) == 5 * 4
    assert score(engine, tasks, SMALL, tmp_path / "cut") == whole, "fewer again: what is asked for counts, no more"


@pytest.mark.parametrize("line", [b'{"mode": "samp\n', b"\xff\n", b"[1]\n", b'{"mode": "sampled"}\n'])
def test_a_damaged_record_is_refused_and_nothing_lost(tmp_path, line):
    path = tmp_path / "records.jsonl"
    sound = {"mode": "sampled", "number": 0, "sample": 0, "error": None}
    content = json.dumps(sound).encode() + b"\n" + line
    path.write_bytes(content)
    with pytest.raises(Refusal, match=r"line 2 is (damaged|no record).*next: take that line out"):
        Records(path)
    assert path.read_bytes() == content


def test_failed_episodes_are_told_and_played_again(engine, tmp_path, monkeypatch):
    settings = ScoreSettings(n=3, samples=4, max_tokens=40)
    broken = score(engine, {"sinking": Sinking()}, settings, tmp_path)["sinking"]
    assert broken.failed >= 1 and broken.sampled.reward == 0
    path = tmp_path / "sinking" / "records.jsonl"
    failed = [one for one in lines(path) if one["error"]]
    assert len(failed) == broken.failed
    assert all("ZeroDivisionError" in one["error"] and one["scores"] == {} for one in failed)
    monkeypatch.setattr(Sinking, "hole", False)
    mended = score(engine, {"sinking": Sinking()}, settings, tmp_path)["sinking"]
    assert mended.failed == 0 and len(lines(path)) == 3 * 5 and not any(one["error"] for one in lines(path))


def test_a_problem_is_drawn_once_for_all_ways_of_answering_and_only_where_one_lacks(engine, tmp_path):
    drawn = list[int]()

    class Costly(Word):
        def prompt(self, number, split="train"):
            drawn.append(number)
            return super().prompt(number, split)

    score(engine, {"hull": Costly()}, SMALL, tmp_path)
    assert drawn == [0, 1, 2]
    score(engine, {"hull": Costly()}, SMALL.replace(n=5), tmp_path)
    assert drawn == [0, 1, 2, 3, 4]


def test_a_task_with_an_end_is_scored_once_through(engine):
    found = score(engine, {"hull": Word(problems=2)}, SMALL)["hull"]
    assert found.sampled.n == 2


def test_two_evaluations_do_not_write_to_one_file(engine, tmp_path):
    from trimaran.train.folder import locked

    with locked(tmp_path / "hull"), pytest.raises(Refusal, match="in use"):
        score(engine, {"hull": Word()}, SMALL, tmp_path)


def test_the_verb_writes_results_and_prints_a_table(folder, capsys):
    words = ("score", str(folder), "tests.evals.boats:Word", "n=3", "samples=2", "max_tokens=8")
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == 0
    shown = capsys.readouterr()
    assert "Word" in shown.out and "sampled x 2" in shown.out and "9/9" in shown.err
    [place] = (folder / "scores").glob("Word-*")
    results = json.loads((place / "results.json").read_text())
    assert place.name.startswith("Word-") and results["made_on"]["torch"] and results["settings"]["n"] == 3
    assert results["tasks"]["Word"]["sampled"]["n"] == 3

    broken = [word.replace("Word", "Sinking") for word in words]
    with pytest.raises(SystemExit) as left:
        cli.main(broken)
    assert left.value.code == 1 and "failed" in capsys.readouterr().out

    with pytest.raises(SystemExit):
        cli.main([*words, "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again["tasks"] == results["tasks"] and len(list((folder / "scores").glob("Word-*"))) == 1
    with pytest.raises(SystemExit):
        cli.main([*words, "temperature=0.5", "tasks.Word.settings.word=mast"])
    assert len(list((folder / "scores").glob("Word-*"))) == 2


def test_the_digest_knows_what_matters(folder):
    def of(task, weights="w", **changes):
        return digest(task, ScoreSettings(**changes), weights)

    usual = of(Word())
    assert usual == of(Word(), n=5, samples=9, greedy=False, device="cpu", engine={"rows": 3})
    others = [of(Word(word="mast")), of(Word(), temperature=0.5), of(Word(), seed=1), of(Word(), split="train")]
    others += [of(Word(), weights="v"), of(Word(), thinking=False), of(Word(), engine={"ssm_dtype": "float16"})]
    assert len({usual, *others}) == 8
    assert "class Word" in source_of(Word())
    whole = source_of(names.task("ruler_common", {"length": 4096}))
    assert all(f"def {name}(" in whole for name in ("largest", "drawn"))  # of modules beside its own
    assert whole == source_of(names.task("ruler_common", {"length": 8192}))
    assert model_digest(folder) == model_digest(folder)


def test_tasks_come_from_names_and_from_files(tmp_path):
    settings = settings_of("arithmetic, tests.evals.boats:Word", ["tasks.arithmetic.settings.digits=1", "n=7"])
    assert list(settings.tasks) == ["arithmetic", "Word"] and settings.n == 7
    assert settings.open()["arithmetic"].digits == 1
    path = tmp_path / "tasks.toml"
    path.write_text('n = 9\n[tasks.sums]\ntask = "arithmetic"\nsettings = {digits = 1}\n[tasks.sorting]\n')
    settings = settings_of(str(path), ["samples=1"])
    assert settings.samples == 1 and settings.n == 9
    assert {name: task.name for name, task in settings.open().items()} == {"sums": "arithmetic", "sorting": "sorting"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no tasks to score"),
        (["arithmetik"], "did you mean 'arithmetic'"),
        (["arithmetic", "tasks.arithmetic.settings.digit=2"], "did you mean digits"),
        (["arithmetic", "sample=2"], "did you mean samples"),
        (["arithmetic", "samples=0", "greedy=false"], "samples = 0"),
        (["missing.toml"], "no file"),
        (["tests.evals.boats:Talk"], "the perfect episode has other replies"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_runs(folder, words, said):
    tasks, overrides = (words[0], words[1:]) if words else (None, [])
    with pytest.raises(Refusal, match=said):
        main(str(folder), overrides, tasks)


def test_every_registered_task_can_be_scored():
    for name in TASKS:
        asked = settings_of(name, [])
        assert name in {**asked.tasks, **asked.suites}


@pytest.mark.slow
def test_kill_and_call_again(folder):
    words = [sys.executable, "-m", "trimaran", "score", str(folder), "sorting", "n=150", "samples=4", "max_tokens=24"]
    first = subprocess.Popen([*words, "seed=1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (found := list(folder.glob("scores/sorting-*/records.jsonl"))) or len(found[0].read_bytes()) < 4000:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = Records(found[0]).known
    assert 0 < len(before) < 750
    again = subprocess.run([*words, "seed=1", "--json"], capture_output=True, text=True, check=True)
    records = lines(found[0])
    keys = [(one["mode"], one["number"], one["sample"]) for one in records]
    assert len(keys) == len(set(keys)) == 750 and list(before) == keys[: len(before)]
    document = json.loads(again.stdout)
    assert document["tasks"]["sorting"]["sampled"]["n"] == 150
