"""Weights drawn by processes that have no room for the whole model: those of one process, bit for bit."""

import itertools
from pathlib import Path

from tests.models import tiny_config
from tests.parallel.compare import Batches, check_tensors, whole, world_of
from trimaran.model.hybrid import build
from trimaran.parallel.parallelize import spread
from trimaran.parallel.settings import ParallelSettings
from trimaran.train.loop import Run
from trimaran.train.prepare import objective_of, optimizer_of
from trimaran.train.recipe import TrainSettings

SIZES = ({"fsdp": 2}, {"tp": 2}, {"pp": 2}, {"tp": 2, "fsdp": 2}, {"fsdp": 4, "ep": 2})


def drawn_apart(size: int) -> None:
    train = TrainSettings(steps=1, batch_size=4, lr=1e-3)
    for sizes, kind in itertools.product(SIZES, ("everything", "ngpt")):
        settings = ParallelSettings(**sizes)
        if settings.world != size or (settings.ep > 1 and kind == "ngpt"):
            continue
        world, config = world_of(settings), tiny_config(kind)
        model, cuts = spread(config, world, 3)
        objective, optimizer = objective_of(train, model, world), optimizer_of(train, model)
        run = Run(Path(), train, model, objective, optimizer, Batches(97, 4, 24), world=world, cuts=cuts)
        check_tensors("weight", whole(model.state_dict(), run), build(config, seed=3).state_dict(), 0.0)


CASES = {"drawn apart by 2": (2, drawn_apart), "drawn apart by 4": (4, drawn_apart)}
