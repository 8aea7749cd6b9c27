"""The one rewrite from a model on one process to this process's part of it."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from trimaran.errors import Refusal
from trimaran.model.config import ModelConfig
from trimaran.model.drawn import drawn
from trimaran.model.hybrid import HybridModel, build
from trimaran.model.moe import MoE
from trimaran.parallel.context import Context
from trimaran.parallel.dispatch import deal_out
from trimaran.parallel.places import Cut, local, places, uncut
from trimaran.parallel.rows import Row
from trimaran.parallel.shard import shard
from trimaran.parallel.stages import cut_stage
from trimaran.parallel.tensor import cut_layers
from trimaran.parallel.world import World


def spread(config: ModelConfig, world: World, seed: int, context: int = 0) -> tuple[HybridModel, dict[str, Cut]]:
    """This process's part of the model that `build(config, seed=seed)` would draw, and what `parallelize` returns.

    No process ever holds more than its part and one module's weights.
    """
    model = build(config, "meta", seed=None)
    cuts = parallelize(model, world, context)
    model.to_empty(device=world.device)
    fill(model, cuts, drawn(config, world.device, seed=seed))
    return model, cuts


@torch.no_grad()
def fill(model: HybridModel, cuts: Mapping[str, Cut], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes this process's part of whole tensors into `model`; all that it holds have to be among them."""
    where, held = places(model, cuts), model.state_dict(keep_vars=True)
    for name, whole in tensors:
        if name in where:
            for box in where[name].boxes(local(held.pop(name))):
                box.view.copy_(whole[box.slices])
    assert not held, f"nothing was given for {sorted(held)}"


def parallelize(model: HybridModel, world: World, context: int = 0) -> dict[str, Cut]:
    """Leaves this process its part of `model`, in place; what tp and ep left of every parameter, by name.

    Every process gives it the same model, from the same seed or checkpoint, before an optimizer is made. context: keys
    that a query sees on average, by which the stages of a pipeline are balanced. Raises Refusal for sizes that do not
    divide the model.
    """
    if world.alone:
        raise Refusal("one process", "two or more", "leave [parallel] out")
    if world.settings.pp > 1:
        cut_stage(model, world, context)
    cuts = {name: uncut(tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    units: list[list[nn.Module]] = []
    if world.settings.tp > 1:
        cut, units = cut_layers(model, world)
        cuts |= cut
    if world.settings.ep > 1:
        cuts |= deal_out(model, world)
    if world.settings.cp > 1:
        model.backbone.over = Context(world.group("cp"), world.device)
    if world.settings.cp * world.settings.tp > 1:
        for module in model.modules():
            if isinstance(module, MoE):
                module.row = Row(world.group("row"), world.place["tp"], world.settings.tp)
    if world.settings.replicate * world.settings.shards > 1:
        shard(model, world, units)
    return cuts
