"""Processes that die, hang or are told to stop: nobody waits for ever, and what was begun goes on from a whole
checkpoint."""

import os
import random
import signal
from pathlib import Path

import pytest

from tests.parallel.spread import check_near, ended, finish, start, until
from tests.train.runs import write_recipe
from trimaran.parallel.launch import LOST
from trimaran.report import read_metrics
from trimaran.train import checkpoint

LONG = {"steps": 20, "checkpoint_every": 2, "eval_every": 10}
KILLS = 6
OPERATIONS = ((20, 110), (3, 8))  # of files under checkpoints/, when resuming and in the first saves, by rank


def saving(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    try:
        return any(name.startswith(checkpoint.STAGING) for name in os.listdir(run / "checkpoints"))
    except FileNotFoundError:
        return False


def steps(run: Path) -> int:
    return len(read_metrics(run / "metrics.jsonl"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(write_recipe(tmp_path_factory.mktemp("whole"), **LONG), 2)


def test_a_process_killed_again_and_again_while_saving_changes_nothing(tmp_path: Path, uninterrupted: Path) -> None:
    path, chance = write_recipe(tmp_path, **LONG), random.Random(int(os.environ.get("KILL_SEED", "0")))
    run, halves = tmp_path / "run", []
    for number in range(KILLS):
        victim = number % 2
        death = chance.randint(*OPERATIONS[victim])
        codes = ended(start(path, 2, deaths={victim: death}))
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == LOST, codes
        halves.append(saving(run))
        for step in checkpoint.steps_in(run / "checkpoints"):
            assert checkpoint.check(run / "checkpoints" / f"step-{step}")[1] == ""
    assert any(halves), "no kill fell into a save"
    finish(path, 2)
    check_near(run, uninterrupted, 0.0)
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (run, uninterrupted))
    assert [one["step"] for one in ours] == list(range(1, LONG["steps"] + 1))
    for name in ("loss", "mtp_1", "grad_norm", "max_vio", "tokens", "bits_per_byte"):
        assert [one.get(name) for one in ours] == [one.get(name) for one in theirs], name
    assert not [one for one in (run / "checkpoints").iterdir() if one.name.startswith(".")]


def test_a_process_that_hangs_is_given_up(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, steps=10_000)
    processes = start(path, 2, "parallel.timeout=3")
    assert until(lambda: steps(tmp_path / "run") > 2, processes)
    os.kill(processes[1].pid or 0, signal.SIGSTOP)
    processes[0].join(60)
    code = processes[0].exitcode
    processes[1].kill()
    ended(processes)
    assert code == LOST, (tmp_path / "rank-0.log").read_text()


def test_a_signal_to_one_stops_all_after_the_same_step(tmp_path: Path, uninterrupted: Path) -> None:
    path, run = write_recipe(tmp_path, **LONG), tmp_path / "run"
    processes = start(path, 2)
    assert until(lambda: steps(run) > 4, processes)
    os.kill(processes[1].pid or 0, signal.SIGTERM)
    assert ended(processes) == [128 + signal.SIGTERM] * 2
    done = steps(run)
    assert 4 < done < LONG["steps"] and checkpoint.candidates(run / "checkpoints")[0] == done
    assert f"stopped after step {done}" in (tmp_path / "rank-0.log").read_text()
    check_near(finish(path, 2), uninterrupted, 0.0)


def test_text_that_cannot_be_used_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    """Who says it agrees over a store, which is the first process's own where there is no launcher: if that has left
    by then, the other says it too."""
    path = write_recipe(tmp_path)
    (tmp_path / "text.jsonl").write_text("")
    assert ended(start(path, 2)) == [2, 2]
    words = [(tmp_path / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert sum(text.count("trimaran: ") for text in words) in (1, 2), words
    assert all(text.count("trimaran: ") <= 1 for text in words), words
    assert not (tmp_path / "run").exists()
