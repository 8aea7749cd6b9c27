"""The stage from end to end: resumed as if it had never stopped, every rollout once, refusals before anything runs."""

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rl import toys
from tests.train.runs import carry_out
from trimaran import cli
from trimaran.errors import Refusal
from trimaran.ops.logprobs import token_logprobs
from trimaran.report import read_metrics
from trimaran.rl.main import begin, main
from trimaran.train import checkpoint, loop

VARIANTS = {
    "plain": {},
    "stale": {"rollouts": {"stale": 1}},
    "updates": {"train": {"batch_size": 4, "steps": 6, "checkpoint_every": 3}},
    "lora": {"lora": {"rank": 4, "dropout": 0.1}},
    "reference": {"policy": {"kl": 0.05}, "curriculum": {"pool": 12}, "shaping": {"answer_length": 0.1}},
}
SAME = ("model.safetensors", "rollouts.jsonl", "transcripts.md")


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return toys.folder(tmp_path_factory.mktemp("start") / "model")


def whole(start: Path, folder: Path, **changes) -> Path:
    assert main(toys.recipe(start, folder / "whole", **changes)) == 0
    return folder / "whole"


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]


def same_run(run: Path, other: Path) -> None:
    for name in SAME:
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (run, other))
    assert [one["step"] for one in ours] == [one["step"] for one in theirs]
    timed = {"tokens_per_second", "wall_s", "cpu_s", "memory_bytes"}
    for one, two in zip(ours, theirs):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in two.items() if k not in timed}


class Stop(Exception):
    """Stands for a process that ends."""


@pytest.mark.parametrize("changes", [VARIANTS["stale"], VARIANTS["updates"]], ids=["stale", "updates"])
def test_stopped_before_every_update_it_ends_the_same(changes, start, tmp_path, monkeypatch):
    run = whole(start, tmp_path, **changes)
    recipe = toys.recipe(start, tmp_path / "stopped", **changes)
    update = loop.train_step
    for last in range(1, recipe.train.steps):  # rollouts of that step are written by then, the checkpoint is older

        def until(run, batch, lr, last=last):
            if run.step == last:
                raise Stop
            return update(run, batch, lr)

        monkeypatch.setattr(loop, "train_step", until)
        with pytest.raises(Stop):
            main(recipe)
    monkeypatch.setattr(loop, "train_step", update)
    assert main(recipe) == 0
    same_run(tmp_path / "stopped", run)


def start_process(path: Path) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.rl.toys", "trimaran.rl.main", "tests.train.runs"])
    process = context.Process(target=carry_out, args=(str(path), [], str(path.with_suffix(".log"))))
    process.start()
    return process


def records(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_killed_and_interrupted_again_and_again_it_ends_the_same(changes, start, tmp_path):
    train = {"steps": 30, "checkpoint_every": 2, **changes.get("train", {})}
    changes = {**changes, "train": train | {"steps": 30}}
    run = whole(start, tmp_path, **changes)
    path = toys.write_recipe(tmp_path / "recipe.toml", start, tmp_path / "killed", **changes)
    chance = random.Random(0)
    for number in range(8):
        process, goal = start_process(path), records(tmp_path / "killed") + chance.randint(1, 6)
        while process.is_alive() and records(tmp_path / "killed") < goal:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL if number % 2 else signal.SIGINT)
        process.join(60)
        for step in checkpoint.steps_in(tmp_path / "killed" / "checkpoints"):
            assert checkpoint.check(tmp_path / "killed" / "checkpoints" / f"step-{step}")[1] == ""
    process = start_process(path)
    process.join(120)
    assert process.exitcode == 0, path.with_suffix(".log").read_text()
    assert "going on after step" in path.with_suffix(".log").read_text()
    same_run(tmp_path / "killed", run)


def test_every_rollout_is_there_once(start, tmp_path):
    run = whole(start, tmp_path, rollouts={"stale": 1})
    found = [(one["step"], one["environment"], one["group"], one["sample"]) for one in rows(run)]
    assert found == [(step, "one", group, sample) for step in range(1, 5) for group in range(4) for sample in range(4)]
    assert [one["number"] for one in rows(run)[::4]] == list(range(16)), "every prompt is new"
    for one in rows(run):
        assert one["reward"] == one["scores"]["reward"] and len(one["logprobs"]) == len(one["said"])


def test_a_stale_batch_was_sampled_before_the_update(start, tmp_path):
    late = {"train": {"lr": 3e-2}, "policy": {"overlong": "score", "gap_limit": "none"}}
    sync, stale = whole(start, tmp_path / "a", **late), whole(start, tmp_path / "b", rollouts={"stale": 1}, **late)
    gaps = [[one["gap_max"] for one in read_metrics(run / "metrics.jsonl")] for run in (sync, stale)]
    assert max(gaps[0]) < 1e-4
    assert gaps[1][0] < 1e-4 and min(gaps[1][1:]) > 1e-3
    first = [[one["ids"] for one in rows(run) if one["step"] <= 2] for run in (sync, stale)]
    assert first[0][:16] == first[1][:16] and first[0][16:] != first[1][16:]


def test_several_updates_of_a_batch_use_each_group_once(start, tmp_path):
    run = whole(start, tmp_path, train={"batch_size": 4, "steps": 8, "lr": 3e-2})
    assert {one["step"] for one in rows(run)} == {1, 5}
    metrics = read_metrics(run / "metrics.jsonl")
    assert [("reward" in one) for one in metrics] == [True, False, False, False] * 2
    # the proximal policy is the sampler's, although the weights have moved since
    assert max(one["gap_max"] for one in metrics) < 1e-4
    assert metrics[3]["clipped"] > 0


def test_the_weights_of_before_are_read_in_the_trainers_numbers(start, tmp_path):
    train = {"batch_size": 4, "precision": "bf16"}
    run = begin(toys.recipe(start, tmp_path / "r", train=train, policy={"overlong": "score", "idle": "train"}))
    rows = next(run.loader)
    counts = rows.weights_BT > 0
    apart = []
    for precision in ("bf16", "fp32"):
        run.settings = run.settings.replace(precision=precision)
        with loop.autocast(run):
            hidden = run.model.train().hidden(rows.tokens_BT, rows.doc_ids_BT)[counts]
            own = token_logprobs(hidden, run.model.head, rows.targets_BT[counts]).detach()
        apart.append(float((own - rows.proximal_BT[counts]).abs().mean()))
    assert apart[0] < 0.1 * apart[1]


def test_metrics_and_transcripts(start, tmp_path):
    run = whole(start, tmp_path, environments={"one": toy(), "other": toy()}, policy={"kl": 0.01})
    for one in read_metrics(run / "metrics.jsonl"):
        names = [f"{name}/{where}" for name in ("reward", "length", "cut", "failed") for where in ("one", "other")]
        assert {*names, "entropy", "kl", "clipped", "masked", "gap", "gap_max", "left_out"} <= one.keys()
        assert sum(one[f"solved_{share}"] for share in (0, 25, 50, 75, 99, 1)) == pytest.approx(1)
    text = (run / "transcripts.md").read_text()
    assert text.count("## Step ") == 8 and "<|im_start|>user" in text and "advantage" in text


def toy(**settings) -> dict:
    return {"task": "tests.rl.toys:Capitals", "settings": settings}


def test_failed_rollouts_are_recorded_and_left_out(start, tmp_path):
    run = whole(start, tmp_path, environments={"one": toy(breaks=2)}, train={"steps": 9, "checkpoint_every": 0})
    broken = [one for one in rows(run) if one["number"] >= 32 and one["number"] % 2 == 0]
    assert len(broken) == 8
    assert all("the verifier broke" in one["error"] for one in broken)
    assert all(one["reward"] is None and one["advantage"] is None for one in broken)
    assert read_metrics(run / "metrics.jsonl")[-1]["failed"] == 0.5
    assert "ZeroDivisionError" in (run / "transcripts.md").read_text()


def test_rollouts_cut_off_are_filtered(start, tmp_path):
    run = whole(start, tmp_path, policy={"overlong": "filter"})
    cut = [one for one in rows(run) if one["finish"] == "length"]
    assert cut and all(one["advantage"] is None for one in cut)


def test_malformed_answers_pay(start, tmp_path):
    source = begin(toys.recipe(start, tmp_path / "m", policy={"overlong": "score", "malformed": 5.0})).loader
    rollouts = [replace(one, malformed=place == 3) for place, one in enumerate(source.roll())]
    found = source.judge(rollouts)
    plain = source.judge([replace(one, malformed=False) for one in rollouts])
    assert [a - b for a, b in zip(plain, found)] == [0, 0, 0, 5] + [0] * 12


def test_shuffled_rewards_stay_in_their_group(start, tmp_path):
    shuffled = begin(toys.recipe(start, tmp_path / "s", policy={"shuffle_rewards": True, "overlong": "score"})).loader
    plain = begin(toys.recipe(start, tmp_path / "p")).loader
    rollouts = plain.roll()
    honest, dealt = plain.judge(rollouts), shuffled.judge(rollouts)
    assert honest != dealt
    for group in range(4):
        part = slice(4 * group, 4 * group + 4)
        assert sorted(honest[part]) == pytest.approx(sorted(dealt[part]))


def test_the_folder_it_leaves_opens(start, tmp_path, capsys):
    run = whole(start, tmp_path)
    assert json.loads((run / "result.json").read_text())["steps"] == 4
    with pytest.raises(SystemExit) as over:
        cli.main(["generate", str(run), "abc", "max_tokens=3"])
    assert over.value.code == 0


REFUSED = {
    "an unknown task": ({"environments": {"one": {"task": "arithmetik"}}}, "unknown task 'arithmetik'|arithmetik"),
    "a setting it has not": ({"environments": {"one": toy(colour="red")}}, "colour"),
    "no environment": ({"environments": {}}, "no environments"),
    "a batch that does not divide": ({"train": {"batch_size": 5}}, r"train\.batch_size = 5"),
    "stale and several updates": ({"rollouts": {"stale": 1}, "train": {"batch_size": 4}}, "stale = 1"),
    "the draft block": ({"train": {"mtp_scale": 0.3}}, "mtp_scale"),
    "greedy": ({"rollouts": {"temperature": 0.0}}, "temperature"),
    "a range upside down": ({"policy": {"importance_range": [5.0, 0.5]}}, "importance_range"),
    "a range that no rule reads": ({"policy": {"importance": "none", "importance_range": [0.5, 5.0]}}, "none"),
    "effort that nobody is asked for": ({"shaping": {"effort": 0.1}}, r"shaping\.effort = 0\.1"),
    "drafts by the clock": ({"engine": {"drafter": "mtp"}}, r"engine\.draft = 0"),
    "routers beside adapters": ({"lora": {"rank": 4}, "policy": {"train_router": True}}, "train_router = true"),
    "dropout in the head": ({"lora": {"rank": 4, "dropout": 0.1, "targets": ["head"]}}, "adapter on the head"),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_runs(changes, words, start, tmp_path):
    with pytest.raises(Refusal, match=words):
        main(toys.recipe(start, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


class Generous(toys.Capitals):
    """A task whose verifier takes anything."""

    def score(self, trace):
        return {"reward": 1.0}


def test_a_task_whose_check_fails_is_refused(start, tmp_path):
    recipe = toys.recipe(start, tmp_path / "run", environments={"one": {"task": "tests.rl.test_run:Generous"}})
    with pytest.raises(Refusal, match="scores 1"):
        main(recipe)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(Refusal, match="is no folder"):
        main(toys.recipe(tmp_path / "nothing", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
