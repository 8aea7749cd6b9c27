"""AdamW, Muon for the matrices where asked, and gradient clipping.

Weight decay follows Megatron-LM's rule: tensors of one dimension have none (A_log, D, dt_bias, norms, biases), all
others have it, the convolutions' filters [C, 1, taps] included.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimaran.parallel.places import local
from trimaran.parallel.world import World
from trimaran.train.muon import Muon, matrices

FUSED = ("cpu", "cuda")  # where torch has AdamW as one kernel


def adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`, decaying those with two dimensions or more."""
    groups = decaying(model, set(), weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fusible(model))


def muon(
    model: nn.Module,
    *,
    lr: float,
    times: float,
    momentum: float,
    dtype: torch.dtype,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Muon:
    """Muon for the linear maps of `model`, at `times` the learning rate; AdamW for the rest of its parameters."""
    chosen = matrices(model)
    ordered = [parameter for parameter in model.parameters() if parameter in chosen]
    shared: dict[str, Any] = {"weight_decay": weight_decay, "matrices": True, "times": times}
    groups = [{"params": alike, **shared} for alike in by_mesh(ordered)]
    groups += decaying(model, chosen, weight_decay)
    settings = {"lr": lr, "betas": betas, "eps": eps, "fused": fusible(model)}
    return Muon(groups, momentum=momentum, dtype=dtype, **settings)


def decaying(model: nn.Module, without: set[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups, with weight decay and without; empty ones are left out."""
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in without]
    groups: list[dict[str, Any]] = []
    for alike in by_mesh(rest):
        groups.append({"params": [p for p in alike if p.ndim > 1], "weight_decay": weight_decay})
        groups.append({"params": [p for p in alike if p.ndim <= 1], "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that are spread over the same processes: an optimizer's kernel takes no others in one call."""
    found: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(found.values())


def fusible(model: nn.Module) -> bool:
    return all(parameter.device.type in FUSED for parameter in model.parameters())


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next update; a group may take a multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("times", 1.0)


def clip(
    parameters: Iterable[nn.Parameter],
    limit: float | None,
    world: World | None = None,
    copies: Sequence[nn.Parameter] = (),
) -> Tensor:
    """Scales all gradients so that their global norm is at most `limit`; returns the norm before, on their device.

    world: the processes that hold the gradients between them; copies: parameters here that another process counts.
    """
    parameters = list(parameters)
    if world is None or world.alone:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        if limit is not None:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
        return norm
    gradients = {p: local(p.grad) for p in parameters if p.grad is not None}
    counted = [gradient for p, gradient in gradients.items() if not any(p is copy for copy in copies)]
    norm = world.norm(nn.utils.get_total_norm(counted, foreach=True))
    if limit is not None:
        torch._foreach_mul_([*gradients.values()], (limit / (norm + 1e-6)).clamp(max=1.0))  # torch's own formula
    return norm
