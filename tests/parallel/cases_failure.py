"""What goes wrong on one rank is noticed by all before anything is changed."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.cases_checkpoint import begun, check_equal, shared_folder, state, steps
from trimaran.train.loop import Diverged, train_step


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


CASES = {"a loss that is not finite on one of 4": (4, not_finite)}
