"""Pipelines: every stage does its part of what one process does."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.parallel.cases_loop import Texts
from tests.parallel.compare import begin, check_tensors, compare, equal_on, packed, trained, whole
from trimaran.errors import Refusal
from trimaran.parallel.settings import ParallelSettings
from trimaran.parallel.world import World, join
from trimaran.rl.preference import Preference
from trimaran.train.loop import Diverged, train_step
from trimaran.train.recipe import TrainSettings
from trimaran.train.validate import evaluate

CPU = torch.device("cpu")
TIED = {"pattern": "M*ME-", "mtp_pattern": "*E", "mtp_depth": 2, "tie_embeddings": True}


def two_stages(size: int) -> None:
    """MTP; a tie without it; neither norms nor a final one."""
    equal_on(("everything", "llama", "ngpt"), pp=size)


def copies_of_the_embedding(size: int) -> None:
    """Read at the last stage by head, and by two depths of the draft block on every second step; clipped and not."""
    for clip in (0.1, None):
        compare({"pp": size}, "moe", changes=TIED, train={"mtp_every": 2, "clip": clip})
    compare({"pp": size}, "latent", train={"mtp_scale": 0.0})
    run = begin("moe", TrainSettings(steps=3, batch_size=4, lr=1e-3), join(ParallelSettings(pp=size), CPU), TIED)
    trained(run, 3)
    copies: list = [None] * size
    dist.all_gather_object(copies, run.model.backbone.embeddings.weight.detach())
    assert copies[0].equal(copies[-1]), "copies of the embedding drift apart"


def fewer_parts_than_stages(size: int) -> None:
    """GPipe; each of the parts with several rows, and more parts than 1F1B has under way."""
    compare({"pp": size, "micro_batches": size // 2}, "moe", rows=6, changes={"pattern": "EMEE*-E"})


def many_parts(size: int) -> None:
    compare({"pp": size, "micro_batches": 3 * size}, "qwen", rows=6 * size, train={"recompute": "RE"})


def four_stages(size: int) -> None:
    """Experts in every stage, uneven ones, and one with nothing but the end."""
    compare({"pp": size, "micro_batches": size}, "moe", rows=8, changes={"pattern": "EMEE*-ME", "mtp_pattern": "*E"})
    compare({"pp": size}, "dense", rows=8, changes={"pattern": "M-*R", "tie_embeddings": True})


def stages_shared_out(size: int) -> None:
    """Each stage's weights over two processes, with the embedding read at both ends."""
    train = {"mtp_every": 2, "recompute": "M*"}
    compare({"pp": 2, "fsdp": 2, "micro_batches": 2}, "moe", changes=TIED, train=train)


def stages_cut_too(size: int) -> None:
    """Each stage's layers in two, or its rows."""
    compare({"pp": 2, "tp": 2, "micro_batches": 2}, "moe", changes=TIED)
    compare({"pp": 2, "cp": 2, "micro_batches": 2}, "moe", changes={"pattern": "ME*R"})


def scores(size: int) -> None:
    """Held-out text goes through the stages, with rows left over; training goes on as if it had not."""
    train = TrainSettings(steps=2, batch_size=4, lr=1e-3, eps=1e-5, router_bias_rate=1e-2)
    texts = Texts(5, packed(64, 5, 24, seed=11))
    world = join(ParallelSettings(pp=size), CPU)
    alone, spread = (begin("everything", train, one, {"vocab_size": 64}) for one in (World(), world))
    truth, found = evaluate(alone.model, [texts]), evaluate(spread.model, [texts], world, spread.pipeline)
    assert abs(found.loss - truth.loss) < 1e-5 * truth.loss and found.tokens == truth.tokens
    check_tensors("weight", trained(spread, 2).weights, trained(alone, 2).weights, 1e-5)


def stopped_by_one_stage(size: int) -> None:
    """A gradient that is not finite at the first stage alone stops all, before anything is updated."""
    world = join(ParallelSettings(pp=size), CPU)
    run = begin("moe", TrainSettings(steps=2, batch_size=4, lr=1e-3), world, {"vocab_size": 64})
    run.folder = Path(tempfile.mkdtemp())
    before = whole(run.model.state_dict(), run)
    poisoned = [torch.inf]
    if world.first:
        first = run.model.backbone.embeddings.weight
        first.register_hook(lambda grad: grad * poisoned[0])
    with pytest.raises(Diverged, match="nothing was updated"):
        train_step(run, packed(64, 4, 24, seed=1), 1e-3)
    check_tensors("weight", whole(run.model.state_dict(), run), before, 0.0)
    poisoned[0] = 1.0
    train_step(run, packed(64, 4, 24, seed=2), 1e-3)


def pipelines_refused(size: int) -> None:
    """What cannot go through in equal parts, and who cannot be asked in stages."""
    train = TrainSettings(steps=2, batch_size=6, lr=1e-3)
    world = join(ParallelSettings(pp=size), CPU)
    run = begin("dense", train, world, {"vocab_size": 64})
    with pytest.raises(Refusal, match="6 rows for 4 micro-batches"):
        train_step(run, packed(64, 6, 24, seed=1), 1e-3)
    with pytest.raises(Refusal, match=r"set parallel\.micro_batches"):
        begin("dense", train.replace(accumulate=2), world, {"vocab_size": 64})
    with pytest.raises(Refusal, match="at most 2 stages"):
        begin("mamba", train, World(ParallelSettings(pp=4), rank=world.rank, groups=world.groups), {})
    run.objective = Preference.__new__(Preference)
    with pytest.raises(Refusal, match=r"set parallel\.pp=1"):
        run.pipeline.gradients(run.objective, [], torch.no_grad)


CASES = {
    "two stages": (2, two_stages),
    "copies of the embedding": (2, copies_of_the_embedding),
    "many parts": (2, many_parts),
    "scores of a pipeline": (2, scores),
    "stopped by one stage": (2, stopped_by_one_stage),
    "pipelines refused": (2, pipelines_refused),
    "fewer parts than stages": (4, fewer_parts_than_stages),
    "four stages": (4, four_stages),
    "stages shared out": (4, stages_shared_out),
    "stages cut too": (4, stages_cut_too),
}
