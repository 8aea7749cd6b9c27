"""`train.precision` in a run: bf16 by autocast, fp8 and nvfp4 by rewriting the linear maps beneath it."""

import typing

from trimaran.errors import Refusal
from trimaran.model.hybrid import HybridModel
from trimaran.parallel.world import World
from trimaran.quant.linear import Draws
from trimaran.quant.rewrite import narrow
from trimaran.quant.settings import Low
from trimaran.report import say
from trimaran.train.recipe import TrainSettings

LOW = typing.get_args(Low)


def begin_precision(model: HybridModel, settings: TrainSettings, seed: int, world: World | None = None) -> Draws | None:
    """Puts the maps of the model that a run begins with into narrow numbers, where its recipe says so; returns what
    their draws derive from, for the run. Call it before the optimizer is made.

    Raises Refusal for a run on several processes.
    """
    if settings.precision not in LOW:
        return None
    if world is not None and not world.alone:
        found = f"train.precision = {settings.precision!r} with [parallel]"
        raise Refusal(found, "fp32, bf16", "leave [parallel] out, or set train.precision=bf16")
    touched = narrow(model, settings.precision, settings.formats, seed)  # type: ignore[arg-type]
    say(str(touched))
    return touched.draws


def check_begun(settings: TrainSettings, draws: Draws | None) -> None:
    """Refuses a run of a stage that would pass over its precision without a word."""
    if settings.precision in LOW and draws is None:
        found = f"train.precision = {settings.precision!r}"
        step = "set train.precision=bf16: this stage computes in the numbers that its engine samples in"
        raise Refusal(found, "fp32, bf16; fp8 and nvfp4 in pretraining, extension and fine-tuning", step)
