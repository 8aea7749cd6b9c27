"""LoRA in a training run: the table `[lora]` of a recipe, and the run folder that ends merged, adapters beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimaran.errors import Refusal
from trimaran.model import adapter, lora
from trimaran.model.dialects import model_type
from trimaran.model.hybrid import HybridModel
from trimaran.model.lora import LoraSettings
from trimaran.model.moe import MoE
from trimaran.report import say
from trimaran.train.recipe import TrainSettings

FOLDER = "adapter"  # of a run folder, in peft's layout


def with_still_routers(given: Any) -> Any:
    """The tables of a recipe, `train.router_bias_rate` 0 where there is a table lora and the rate is not given.

    Adapters hold no balancing bias: were it to move, base and adapters would no longer be the model that was trained.
    """
    if not isinstance(given, Mapping) or given.get("lora") in (None, "none"):
        return given
    train = given.get("train")
    if not isinstance(train, Mapping):
        return given
    return {**given, "train": {"router_bias_rate": 0.0, **train}}


def begin_adapters(model: HybridModel, settings: LoraSettings | None, train: TrainSettings, seed: int) -> None:
    """Gives the model that a run begins with its adapters; nothing where the recipe has no table lora.

    Call it before the optimizer is made. Raises Refusal for targets that match nothing, and for routers' biases that
    would move under the adapters.
    """
    if settings is None:
        return
    routers = [module.gate for module in model.modules() if isinstance(module, MoE)]
    if train.router_bias_rate and any(router.config.router == "sigmoid" for router in routers):
        found = f"train.router_bias_rate = {train.router_bias_rate} with lora"
        raise Refusal(found, "0: adapters hold no balancing bias", "leave it out, or set train.router_bias_rate=0")
    say(str(lora.apply(model, settings, seed)))


def end_adapters(model: HybridModel, folder: Path, base: str | None) -> None:
    """Saves the adapters of a finished run under folder/adapter and merges them; nothing where there are none.

    base: where the run began, for whoever opens the adapters.
    """
    if not lora.adapted(model):
        return
    adapter.save(model, folder / FOLDER, base)
    stacked = any(isinstance(module, lora.StackedLowRank) for module in lora.adapters(model).values())
    if stacked and model_type(model.config) == "nemotron_h":
        say(f"peft passes by what {folder / FOLDER} holds for routed experts; {folder} is merged and has it")
    lora.merge(model)
