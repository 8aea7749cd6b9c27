"""Layers cut along heads, widths and vocabulary; the residual stream along the tokens."""

from functools import partial

import pytest

from tests.parallel.compare import TOLERANCE, begin, check_tensors, compare, packed, whole, world_of
from trimaran.errors import Refusal
from trimaran.parallel.settings import ParallelSettings
from trimaran.parallel.world import World
from trimaran.train.recipe import TrainSettings


def cut(kind: str, size: int, **changes: object) -> None:
    compare({"tp": size}, kind, changes=changes, rows=2)


def logits(size: int) -> None:
    """model(tokens) gives the logits of all ids, and their gradient reaches the weights."""
    world = world_of(ParallelSettings(tp=size))
    train = TrainSettings(steps=1, batch_size=2, lr=1e-3)
    changes = {"vocab_size": 63, "pattern": "M*-R", "mtp_pattern": ""}
    alone, spread = (begin("everything", train, one, changes) for one in (World(), world))
    batch, found = packed(63, 2, 24, seed=3), []
    for run in (alone, spread):
        out_BTV = run.model(batch.tokens_BT, batch.doc_ids_BT)
        (out_BTV.square().sum() / run.world.settings.tp).backward()  # a process's part of the sum
        gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
        found.append({"logits": out_BTV.detach(), **whole(gradients, run)})
    check_tensors("result", found[1], found[0], TOLERANCE)


def refused(size: int) -> None:
    """Heads, groups, widths and vocabularies that do not divide are named."""
    world = world_of(ParallelSettings(tp=size))
    train = TrainSettings(steps=1, batch_size=2, lr=1e-3)
    for changes, found in (
        ({"pattern": "M", "n_groups": 1}, "n_groups = 1"),
        ({"pattern": "R", "num_attention_heads": 3, "num_key_value_heads": 3}, "num_attention_heads = 3"),
        ({"pattern": "-", "intermediate_size": 7}, "width = 7"),
        ({"pattern": "-", "vocab_size": 1}, "a vocabulary of 1"),
    ):
        with pytest.raises(Refusal, match=found):
            begin("dense", train, world, changes)


KINDS = ("mamba", "attention", "window", "dense", "llama", "ngpt", "everything", "moe")
CASES = {f"tp of {kind}": (2, partial(cut, kind)) for kind in KINDS}
CASES |= {
    "tp of logits": (2, logits),
    "tp of what does not divide": (2, refused),
    "tp 4 with two key-value heads": (4, partial(cut, "rope")),
    "tp of a vocabulary that does not divide": (2, partial(cut, "dense", vocab_size=63)),
}
