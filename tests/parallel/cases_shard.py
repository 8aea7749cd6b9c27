"""Shares of weights, alone and together with other axes."""

from functools import partial
from typing import Any

from torch.profiler import ProfilerActivity, profile

from tests.parallel.compare import begin, compare, world_of
from trimaran.parallel.settings import ParallelSettings
from trimaran.train.loop import train_step
from trimaran.train.recipe import TrainSettings


def case(sizes: dict[str, int], kind: str, size: int, **more: object) -> None:
    compare(sizes, kind, **more)


def traffic(size: int) -> None:
    """Per step: a unit's weights are gathered once per part and direction, the root's once per part; gradients are
    added up once, however many parts there are, and the numbers of a step with the norm in two exchanges more."""
    units, root = 5, 1  # "M-M*-"
    for accumulate in (1, 2):
        found = exchanges({"fsdp": size}, accumulate)
        assert found["gather"] == accumulate * (2 * units + root), found
        assert found["reduce"] == units + root + 2, found
    assert exchanges({"replicate": size}, 2) == {"gather": 0, "reduce": units + root + 2}


def exchanges(sizes: dict[str, int], accumulate: int) -> dict[str, int]:
    """How often a step's processes exchange something."""
    world = world_of(ParallelSettings(**sizes))
    run = begin("dense", TrainSettings(steps=2, batch_size=4, lr=1e-3, accumulate=accumulate), world, {})
    train_step(run, next(run.loader), 1e-3)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        train_step(run, next(run.loader), 1e-3)
    counts = {event.key: event.count for event in watched.key_averages()}
    # gloo adds up and scatters by the same routine
    return {"gather": counts.get("gloo:all_gather", 0), "reduce": counts.get("gloo:all_reduce", 0)}


MUON: dict[str, Any] = {"train": {"optimizer": "muon"}}
CASES = {
    "traffic of a step": (2, traffic),
    "fsdp on the sphere": (2, partial(case, {"fsdp": 2}, "ngpt")),
    "fsdp of three kinds": (2, partial(case, {"fsdp": 2}, "qwen", accumulate=2)),
    "muon over fsdp": (2, partial(case, {"fsdp": 2}, "everything", **MUON)),
    "muon over fsdp x ep": (4, partial(case, {"fsdp": 4, "ep": 2}, "qwen", **MUON)),
    "muon over cp x pp": (4, partial(case, {"cp": 2, "pp": 2}, "dense", **MUON)),
    "fsdp x tp": (4, partial(case, {"fsdp": 2, "tp": 2}, "everything")),
    "fsdp x tp on the sphere": (4, partial(case, {"fsdp": 2, "tp": 2}, "ngpt")),
    "replicate x tp, tied": (4, partial(case, {"replicate": 2, "tp": 2}, "llama", accumulate=2)),
    "replicate x fsdp": (4, partial(case, {"replicate": 2, "fsdp": 2}, "everything", rows=8, accumulate=2)),
}
