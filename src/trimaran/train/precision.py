"""`train.precision` in a run: bf16 by autocast, fp8 and nvfp4 by rewriting the linear maps beneath it."""

import typing

from trimaran.errors import Refusal
from trimaran.model.hybrid import HybridModel
from trimaran.ops.rounding import key_of
from trimaran.parallel.world import World
from trimaran.quant.linear import Draws
from trimaran.quant.rewrite import narrow
from trimaran.quant.settings import Low
from trimaran.report import say
from trimaran.train.recipe import TrainSettings

LOW = typing.get_args(Low)


def begin_precision(model: HybridModel, settings: TrainSettings, seed: int, world: World | None = None) -> Draws | None:
    """Puts the maps of the model that a run begins with into narrow numbers, where its recipe says so; returns what
    their draws derive from, for the run. Call it on the whole model, before it is spread and the optimizer is made.

    world: the processes of the run; each finds the scales of what it holds, and makes draws of its own.
    """
    if settings.precision not in LOW:
        return None
    alone = world is None or world.alone
    own = seed if alone else key_of(seed, typing.cast(World, world).rank)
    touched = narrow(model, typing.cast(Low, settings.precision), settings.formats, own)
    say(str(touched))
    return touched.draws


def check_begun(settings: TrainSettings, draws: Draws | None) -> None:
    """Refuses a run of a stage that would pass over its precision without a word."""
    if settings.precision in LOW and draws is None:
        found = f"train.precision = {settings.precision!r}"
        step = "set train.precision=bf16: this stage computes in the numbers that its engine samples in"
        raise Refusal(found, "fp32, bf16; fp8 and nvfp4 in pretraining, extension and fine-tuning", step)
