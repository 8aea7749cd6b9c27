"""Killed without warning, again and again, some of the time while saving: the weights come out the same to the bit."""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.models import tiny
from tests.train.runs import server, start, write_recipe
from trimaran.report import read_metrics
from trimaran.train import checkpoint
from trimaran.train.optim import adamw

KILLS = 10
LONG = {"steps": 60, "checkpoint_every": 2, "eval_every": 30, "optimizer": "muon"}  # Muon brings AdamW along


def finish(path: Path) -> Path:
    process = start(path)
    process.join(120)
    assert process.exitcode == 0, path.with_suffix(".log").read_text()
    return path.parent / "run"


def kill(path: Path, chance: random.Random, *, saving: bool) -> bool:
    """Starts the run and kills it some steps later, or as it saves then. Whether half a checkpoint was left behind."""
    run = path.parent / "run"
    process, goal = start(path), records(run) + chance.randint(0, 8)
    while process.is_alive() and (records(run) < goal or (saving and not stages(run))):
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.01))
    process.kill()
    process.join()
    for step in checkpoint.steps_in(run / "checkpoints"):
        assert checkpoint.check(run / "checkpoints" / f"step-{step}")[1] == ""
    return bool(stages(run))


def kill_early(path: Path, chance: random.Random) -> None:
    """Before or while the text is encoded."""
    process = start(path)
    process.join(chance.uniform(0, 0.3))
    process.kill()
    process.join()


def records(run: Path) -> int:
    """Lines of the metrics."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stages(run: Path) -> list[str]:
    """Checkpoints that are being written."""
    try:
        return [name for name in os.listdir(run / "checkpoints") if name.startswith(checkpoint.STAGING)]
    except FileNotFoundError:
        return []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    return finish(write_recipe(tmp_path_factory.mktemp("whole"), **LONG))


def test_ten_kills_change_nothing(tmp_path, uninterrupted):
    path, chance = write_recipe(tmp_path, **LONG), random.Random(int(os.environ.get("KILL_SEED", "0")))
    kill_early(path, chance)
    halves = [kill(path, chance, saving=number % 2 == 1) for number in range(KILLS - 1)]
    run = finish(path)
    assert any(halves), "no kill fell into a checkpoint"
    assert "going on after step" in path.with_suffix(".log").read_text()
    for name in ("model.safetensors", "checkpoints/step-60/training.safetensors"):
        assert (run / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    hidden = [path.name for path in run.rglob("*") if path.name.startswith(".") or path.name.endswith(".tmp")]
    assert hidden == [".lock"]
    assert sorted(os.listdir(run / "checkpoints")) == ["LATEST", "step-58", "step-60"]
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (run, uninterrupted))
    assert [one["step"] for one in ours] == list(range(1, 61))
    for one, other in zip(ours, theirs):
        for name in ("loss", "mtp_1", "grad_norm", "max_vio", "tokens", "bits_per_byte"):
            assert one.get(name) == other.get(name), (one["step"], name)
    assert json.loads((run / "result.json").read_text())["bits_per_byte"] == theirs[-1]["bits_per_byte"]


EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def die_at(number: int) -> None:
    """This process is killed as it asks for the numbered file operation from now on."""
    seen = 0

    def watch(event: str, _: object) -> None:
        nonlocal seen
        if event not in EVENTS:
            return
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def save_and_die(folder: Path, found: Path) -> None:
    """Saves steps 1 and 2 again and again, killed at each file operation of the second in turn; tells what was left."""
    torch.set_num_threads(1)
    model = tiny("mamba", torch.float32)
    optimizer = adamw(model, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    left = []
    for number in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        checkpoint.save(folder, 1, model, optimizer, {}, keep=1)
        child = os.fork()
        if not child:
            die_at(number)
            checkpoint.save(folder, 2, model, optimizer, {}, keep=1)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:  # it came to its end
            break
        whole = [checkpoint.check(folder / f"step-{step}")[1] == "" for step in checkpoint.steps_in(folder)]
        resumed = checkpoint.restore(folder, model, optimizer, print)
        left.append([whole, resumed and resumed.step, [name for name in os.listdir(folder) if name[0] == "."]])
    found.write_text(json.dumps(left))


def test_killed_at_any_file_operation_of_a_save_one_whole_checkpoint_is_found(tmp_path):
    process = server().Process(target=save_and_die, args=(tmp_path / "checkpoints", tmp_path / "found.json"))
    process.start()
    process.join(120)
    left = json.loads((tmp_path / "found.json").read_text())
    assert len(left) > 30
    assert all(all(whole) for whole, _, _ in left), "every folder that is called a checkpoint is one"
    steps = [step for _, step, _ in left]
    assert set(steps) == {1, 2} and steps == sorted(steps)
    assert not any(left_over for _, _, left_over in left), "resuming tidies up"
