"""The loop on several processes that hold copies, or share them: rows alone are dealt out."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.parallel.compare import begin, check_tensors, compare, packed, trained, whole, world_of
from trimaran.data.batch import Batch
from trimaran.errors import Refusal
from trimaran.parallel.settings import ParallelSettings
from trimaran.parallel.world import World
from trimaran.train.loop import Diverged, train_step
from trimaran.train.recipe import TrainSettings
from trimaran.train.validate import evaluate


@dataclass
class Texts:
    """Held-out rows, two to a batch."""

    rows: int
    batch: Batch
    bytes: int = 1000

    @property
    def tokens(self) -> int:
        return int((self.batch.weights_BT > 0).sum())

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, self.rows, 2):
            yield self.batch.rows(first, first + 2)


def copies(size: int) -> None:
    compare({"replicate": size})


def copies_in_parts(size: int) -> None:
    compare({"replicate": size}, "moe", rows=8, accumulate=2)


def shares(size: int) -> None:
    compare({"fsdp": size})


def evaluation(size: int) -> None:
    """Scores are those of one process, whatever rows are left over for the last batch; the run goes on as if none had
    been taken."""
    train = TrainSettings(steps=2, batch_size=2, lr=1e-3, eps=1e-5, router_bias_rate=1e-2)
    texts = Texts(5, packed(64, 5, 24, seed=11))
    for sizes in ({"fsdp": size}, {"tp": size}):
        world = world_of(ParallelSettings(**sizes))
        changes = {"vocab_size": 64, "pattern": "M*-R", "mtp_pattern": ""}
        alone, spread = (begin("everything", train, one, changes) for one in (World(), world))
        truth, found = evaluate(alone.model, [texts]), evaluate(spread.model, [texts], world)
        assert abs(found.loss - truth.loss) < 1e-5 * truth.loss and found.tokens == truth.tokens
        check_tensors("weight", trained(spread, 2).weights, trained(alone, 2).weights, 1e-5)


def not_finite(size: int) -> None:
    """What one rank alone meets stops all of them, before anything is updated."""
    train = TrainSettings(steps=2, batch_size=4, lr=1e-3)
    world = world_of(ParallelSettings(replicate=size))
    run = begin("moe", train, world, {"vocab_size": 64})
    run.folder = Path(tempfile.mkdtemp())
    before = whole(run.model.state_dict(), run)
    bad = packed(64, 4, 24, seed=1)
    bad.weights_BT[-1] = torch.inf  # the last rank's row
    with pytest.raises(Diverged, match="nothing was updated"):
        train_step(run, bad, 1e-3)
    assert len(list(run.folder.iterdir())) == world.first, "the first process alone saves the batch"
    check_tensors("weight", whole(run.model.state_dict(), run), before, 0.0)
    train_step(run, packed(64, 4, 24, seed=2), 1e-3)


def refusals(size: int) -> None:
    """Sizes that do not divide a step are refused by all."""
    for sizes, rows, found in (({"fsdp": size}, 3, "a step of 3 rows"), ({"tp": size}, 2, "rows of 25 tokens")):
        world = world_of(ParallelSettings(**sizes))
        with pytest.raises(Refusal, match=found):
            world.share(packed(64, rows, 25, seed=0))


CASES = {
    "copies": (2, copies),
    "copies in parts": (2, copies_in_parts),
    "shares": (2, shares),
    "evaluation": (2, evaluation),
    "a loss that is not finite": (2, not_finite),
    "steps that do not divide": (2, refusals),
}
