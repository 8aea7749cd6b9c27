"""What goes wrong on one rank is noticed by all before anything is changed."""

import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.cases_checkpoint import begun, check_equal, keeper_of, shared_folder, state, steps
from trimaran.errors import Refusal
from trimaran.parallel.settings import ParallelSettings
from trimaran.parallel.world import join
from trimaran.train.loop import Diverged, train_step
from trimaran.train.watch import EVERY, Watch


def not_finite(size: int) -> None:
    """A loss of NaN on the last rank: every rank stops at that step, weights and optimizer as before it."""
    run = begun({"fsdp": size})
    run.folder = shared_folder()
    steps(run, 2)
    before = state(run)
    terms = run.objective.terms

    def spoilt(part: object) -> tuple[Tensor, dict[str, Tensor]]:
        loss, named = terms(part)
        return (loss * torch.nan, named) if dist.get_rank() == size - 1 else (loss, named)

    run.objective.terms = spoilt  # type: ignore[method-assign]
    with pytest.raises(Diverged, match="step 3 gave grad_norm = nan"):
        train_step(run, next(run.loader), 1e-3)
    check_equal(state(run), before)
    dist.barrier()
    assert [path.name for path in Path(run.folder).iterdir()] == ["diverged-step-3.safetensors"]


def full(size: int) -> None:
    """A disk that takes nothing more of one rank: the save fails on all, the checkpoint before it stays."""
    run, folder = begun({"fsdp": size}), shared_folder()
    before, after = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with keeper_of(run, folder) as keeper:
        keeper.save(1, run.model, run.optimizer, run.cuts, {})
        keeper.wait()
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, after))
        keeper.save(2, run.model, run.optimizer, run.cuts, {})
        with pytest.raises(Refusal, match=r"cannot write .*shard-00001"):
            keeper.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, after))
        dist.barrier()
        assert sorted(path.name for path in folder.iterdir()) == ["LATEST", "step-1"]
        saved = keeper.restore(run.model, run.optimizer, run.cuts, print)
    assert saved is not None and saved.step == 1


def slow(size: int) -> None:
    """A process that takes ten times as long over its own work is named by all, once; everybody's numbers are there."""
    watch = Watch(join(ParallelSettings(fsdp=size), torch.device("cpu")))
    told = []
    for step in range(1, 2 * EVERY + 1):
        with watch.own():
            time.sleep(0.02 if dist.get_rank() == 1 else 0.002)
        values, warning = watch.after_step(step)
        assert bool(values) == (step % EVERY == 0)
        told.append(warning)
    named = [line.partition(" is slow")[0] for line in told if line]
    assert named == ["warning: process 1"], told
    assert len(values["own_s_by_process"]) == len(values["memory_by_process"]) == size
    assert min(values["memory_by_process"]) > 1e6


CASES = {
    "a loss that is not finite on one of 4": (4, not_finite),
    "a disk full for one of 2": (2, full),
    "a slow one of 2": (2, slow),
}
