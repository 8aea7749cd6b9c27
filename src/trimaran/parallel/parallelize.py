"""The one rewrite from a model on one process to this process's part of it."""

from torch import nn

from trimaran.errors import Refusal
from trimaran.model.hybrid import HybridModel
from trimaran.parallel.places import Cut, uncut
from trimaran.parallel.shard import shard
from trimaran.parallel.tensor import cut_layers
from trimaran.parallel.world import World


def parallelize(model: HybridModel, world: World) -> dict[str, Cut]:
    """Leaves this process its part of `model`, in place; what tp and ep left of every parameter, by name.

    Every process gives it the same model, from the same seed or checkpoint, before an optimizer is made. Raises Refusal
    for sizes that do not divide the model.
    """
    if world.alone:
        raise Refusal("one process", "two or more", "leave [parallel] out")
    cuts = {name: uncut(tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    units: list[list[nn.Module]] = []
    if world.settings.tp > 1:
        cut, units = cut_layers(model, world)
        cuts |= cut
    shard(model, world, units)
    return cuts
