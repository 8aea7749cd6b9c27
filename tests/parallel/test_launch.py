"""The launcher: one command, all processes, one exit code. Judged by what was written."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import trimaran
from tests.parallel.compare import apart
from tests.train import runs
from tests.train.runs import command, environment, write_recipe
from trimaran.parallel.launch import LOST, own_part, told
from trimaran.report import read_metrics

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = {"steps": 100_000, "checkpoint_every": 2}


def started(words: list[str], log: Path) -> subprocess.Popen:
    with open(log, "ab") as file:
        return subprocess.Popen(words, env=environment(), stdout=file, stderr=subprocess.STDOUT, cwd=log.parent)


def waited(met, process: subprocess.Popen, log: Path, seconds: float = 200) -> None:
    until = time.monotonic() + seconds
    while not met():
        assert process.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.02)


def children(process: subprocess.Popen) -> list[int]:
    """The processes that it started, by rank."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for pid in map(int, found):
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks |= {int(word[5:]): pid for word in words if word.startswith(b"RANK=")}
    return [ranks[rank] for rank in sorted(ranks)]


def steps(folder: Path) -> int:
    return len(read_metrics(folder / "run" / "metrics.jsonl"))


def test_one_command_trains_on_two_processes_and_the_result_opens(tmp_path: Path) -> None:
    """The laptop's recipe, fp32 for numbers to compare and small for seconds."""
    path, log = tmp_path / "text.toml", tmp_path / "log"
    shutil.copy(ROOT / "recipes" / "laptop" / "text.toml", path)
    small = [
        f"data.path={runs.write_text(tmp_path / 'text.jsonl')}",
        "tokenizer.vocab_size=320",
        "train.precision=fp32",
    ]
    small += ["data.sequence_length=32", "data.held_out=0.1", "train.steps=6", "train.batch_size=4"]
    alone = runs.start(path, f"run={tmp_path / 'alone'}", *small)
    words = [f"run={tmp_path / 'run'}", *small, "parallel.fsdp=2"]
    assert started(command(path, *words), log).wait(180) == 0, log.read_text()
    alone.join(180)
    said = log.read_text()
    assert said.count("saved in") == said.count("tokens: ") == 1, "only one process speaks"
    model, truth = (trimaran.load(tmp_path / name) for name in ("run", "alone"))
    tokens = torch.randint(300, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert apart(model(tokens), truth(tokens)) <= 1e-5
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "alone"))
    assert [one["step"] for one in ours] == [one["step"] for one in theirs]
    for mine, other in zip(ours, theirs):
        for name in ("loss", "grad_norm", "max_vio", "bits_per_byte"):
            assert mine.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-4), (mine["step"], name)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_interrupted_then_killed_then_orphaned_it_says_so_and_goes_on(tmp_path: Path) -> None:
    path, log = write_recipe(tmp_path, **ENDLESS), tmp_path / "log"

    process = started(command(path, "parallel.fsdp=2"), log)
    waited(lambda: steps(tmp_path) > 2, process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(200) == 128 + signal.SIGINT
    assert "stopped after step" in log.read_text()

    before = steps(tmp_path)
    process = started(command(path, "parallel.fsdp=2"), log)
    waited(lambda: steps(tmp_path) > before + 3, process, log)
    os.kill(children(process)[1], signal.SIGKILL)
    assert process.wait(200) == 128 + signal.SIGKILL
    last = log.read_text().splitlines()[-1]
    assert re.fullmatch(r"trimaran: process 1 \(pid \d+\) was killed by SIGKILL; the same command goes on .*", last)
    assert f"going on after step {before} of" in log.read_text()

    before = steps(tmp_path)
    process = started(command(path, "parallel.fsdp=2"), log)
    waited(lambda: steps(tmp_path) > before + 1, process, log)
    ranks = children(process)
    process.kill()
    until = time.monotonic() + 200
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks), "processes without a launcher go on"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_torchrun_starts_a_run_again_whose_process_was_killed(tmp_path: Path) -> None:
    path, log = write_recipe(tmp_path, steps=40, checkpoint_every=2), tmp_path / "log"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    process = started([*torchrun, "-m", "trimaran", "train", str(path), "parallel.fsdp=2"], log)
    waited(lambda: steps(tmp_path) > 4, process, log)
    os.kill(children(process)[1], signal.SIGKILL)
    assert process.wait(180) == 0, log.read_text()
    assert "going on after step" in log.read_text()
    process = started(command(path, f"run={tmp_path / 'alone'}", "parallel.fsdp=2"), log)
    assert process.wait(180) == 0
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "alone"))
    assert ours == theirs


def test_a_restart_reads_nothing_of_the_start_before() -> None:
    """Three processes (threads here), started three times over one store, the first one always ahead of the others."""
    store, wait = dist.HashStore(), timedelta(seconds=30)
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(own_part, store, 0, 3, wait)]
            time.sleep(0.05)
            waiting += [pool.submit(own_part, store, rank, 3, wait) for rank in (1, 2)]
            first, *others = [one.result() for one in waiting]
        assert not first.check(["found"])
        first.set("found", "")
        assert all(other.check(["found"]) for other in others)


class Failure:
    """As torch's ProcessFailure."""

    def __init__(self, exitcode: int):
        self.exitcode, self.pid, self.message = exitcode, 1, "why"


@pytest.mark.parametrize(
    ("codes", "said", "code"),
    [
        ({0: LOST, 1: -9}, "process 1 (pid 1) was killed by SIGKILL", 137),
        ({0: -15, 1: LOST, 2: -11}, "process 2 (pid 1) was killed by SIGSEGV", 139),
        ({0: LOST, 1: -15}, "process 1 (pid 1) was killed by SIGTERM", 143),
        ({0: LOST, 1: LOST}, "process 0 waited for another one in vain (why)", LOST),
        ({0: LOST, 1: 2}, "", 2),
        ({0: 1, 1: LOST}, "", 1),
    ],
)
def test_the_cause_is_whoever_did_not_suffer_from_others(codes, said, code, capsys) -> None:
    assert told({rank: Failure(one) for rank, one in codes.items()}) == code
    words = capsys.readouterr().err
    assert words.startswith(f"trimaran: {said};") if said else not words
