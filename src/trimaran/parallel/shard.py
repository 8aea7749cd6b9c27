"""FSDP2 over a model: each process keeps a part of every weight, gradient and optimizer state.

Three kinds of parameters, by who holds the rest of them:

    whole     not cut by tp: over fsdp x cp x tp; every rank's gradient is a part of the sum
    cut       cut by tp: over fsdp x cp
    experts   dealt out by ep: over efsdp

and for each `replicate` copies. One unit per block, so that no more than one or two blocks' weights are gathered at
once; embedding, head and final norm are the root's, gathered for the whole of a step: the loss differentiates the
head inside its own forward. Gradients are summed, never averaged: every rank's loss is its part of one sum.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from trimaran.model.hybrid import HybridModel
from trimaran.model.moe import MoE
from trimaran.parallel.stages import Elsewhere
from trimaran.parallel.world import World


def shard(model: HybridModel, world: World, cut: Sequence[list[nn.Module]] = ()) -> None:
    """Shards all parameters of `model` in place. cut: the modules that tp has cut, by what is gathered at once."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    whole, split = world.mesh("whole"), world.mesh("cut")
    for modules in cut:
        unite(modules, split)
    if world.settings.ep > 1:
        for module in model.modules():
            if isinstance(module, MoE):
                unite([module.experts], world.mesh("efsdp"))
    units: list[nn.Module] = [layer for layer in model.backbone.layers if not isinstance(layer, Elsewhere)]
    if model.mtp is not None:
        units.append(model.mtp)  # one unit: it reads its first block's norms and map outside of that block's forward
    if world.settings.tp > 1 and model.ends:
        units.append(model.backbone.norm_f)  # embedding and head, the root's other parameters, are cut
    for unit in units:
        # What tp leaves whole in a block without experts is a norm's weight: not worth bringing twice.
        few = world.settings.tp > 1 and not any(isinstance(module, MoE) for module in unit.modules())
        unite([unit], whole, reshard_after_forward=not few)
    unite([model], split if world.settings.tp > 1 else whole, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")


def unite(modules: list[nn.Module], mesh: DeviceMesh, **settings: Any) -> None:
    """One unit of what `modules` hold and no unit inside them does."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    fully_shard(modules if len(modules) > 1 else modules[0], mesh=mesh, **settings)
    state = modules[0]
    assert isinstance(state, FSDPModule)
    state.set_gradient_divide_factor(1.0)
    state.set_force_sum_reduction_for_comms(True)  # gloo has no other


def synchronise(model: nn.Module, last: bool, world: World) -> None:
    """Before a part's forward: gradients travel behind the last part alone, the sums of the others stay here."""
    if world.alone:
        return
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
