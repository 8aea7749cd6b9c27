"""Muon: momentum whose singular values are all made about 1, for the matrices of linear maps.

    m   <- mu m + (1 - mu) g                        u = (1 - mu) g + mu m           (Nesterov)
    X_0  = u / |u|_F                                X <- a X + (b A + c A A) X,  A = X X^T       five times
    W   <- (1 - lr decay) W - lr * 0.2 sqrt(max(rows, columns)) * X_5

K. Jordan et al. 2024 (the iteration and its a, b, c; singular values end between about 0.7 and 1.2); the factor that
gives updates AdamW's usual size, so that both can share a learning rate, is Moonlight's (arXiv 2502.16982). Embeddings,
head, routers, convolutions and everything of one dimension stay with AdamW. Nemotron-3's own reports train with AdamW.

A matrix whose rows are spread over processes is gathered for its step, which each of them then takes for itself.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trimaran.model.linear import Head, Linear, StackedLinear
from trimaran.parallel.places import local, place

ITERATION = (3.4445, -4.7750, 2.0315)  # a, b, c
STEPS = 5
LIKE_ADAMW = 0.2  # root mean square of AdamW's updates in practice


class Muon(torch.optim.AdamW):
    """AdamW, but for groups with `matrices = True`, whose parameters [.., rows, columns] take Muon's step.

    dtype: of the iteration's products; its errors are far below what it leaves of the singular values.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, dtype: torch.dtype, **settings: Any):
        super().__init__(groups, **settings)
        self.momentum, self.dtype = momentum, dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            if group.get("matrices"):
                self.step_matrices(group)
        return super().step(closure)

    def step_matrices(self, group: dict[str, Any]) -> None:
        """Muon's step; matrices of one shape, lying or standing, go through the iteration together."""
        weights = [weight for weight in group["params"] if weight.grad is not None]
        if not weights:
            return
        for weight in weights:
            if not self.state[weight]:  # AdamW looks for a count in every state that it loads
                self.state[weight] = {"step": torch.zeros(()), "momentum": torch.zeros_like(weight)}
        gradients = [local(weight.grad) for weight in weights]
        momenta = [local(self.state[weight]["momentum"]) for weight in weights]
        torch._foreach_add_([self.state[weight]["step"] for weight in weights], 1)
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for weight, u in zip(weights, torch._foreach_lerp(gradients, momenta, self.momentum)):
            u = whole(u, weight)
            lying = u if u.shape[-2] <= u.shape[-1] else u.mT
            alike[lying.shape[-2], lying.shape[-1]].append((weight, lying))
            weight.grad = None  # spent: AdamW passes it by
        torch._foreach_mul_([local(weight) for weight in weights], 1 - group["lr"] * group["weight_decay"])
        for (rows, columns), members in alike.items():
            updates = orthogonalised(torch.cat([u.reshape(-1, rows, columns) for _, u in members]), self.dtype)
            rate = group["lr"] * LIKE_ADAMW * math.sqrt(columns)
            for (weight, u), update in zip(members, updates.split([u.numel() // (rows * columns) for _, u in members])):
                update = update.view(u.shape)
                update = update if u.shape[-2:] == weight.shape[-2:] else update.mT
                local(weight).add_(own(update, weight), alpha=-rate)


def orthogonalised(u_SRC: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrices [S, R, C], R <= C, with their singular vectors kept and their singular values near 1, in `dtype`.

    A matrix of zeros stays one.
    """
    x = (u_SRC / u_SRC.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(u_SRC.dtype).tiny)).to(dtype)
    a, b, c = ITERATION
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def whole(u: Tensor, weight: Tensor) -> Tensor:
    """The whole matrix of which u has this process's rows, or the whole matrices of a stack that are here."""
    if u.ndim > 2 or not hasattr(weight, "placements"):
        return u
    from torch.distributed.tensor import DTensor

    assert isinstance(weight, DTensor)
    mesh, placements = weight.device_mesh, weight.placements
    return DTensor.from_local(u, mesh, placements, shape=weight.size(), stride=weight.stride()).full_tensor()


def own(update: Tensor, weight: Tensor) -> Tensor:
    """What this process has of a whole matrix; the reverse of `whole`."""
    if update.ndim > 2 or not hasattr(weight, "placements"):
        return update
    here = place(weight)
    return update[here.first : here.first + here.rows]


def matrices(model: nn.Module) -> set[Tensor]:
    """The weights of the model's linear maps, but for its head."""
    kinds = (module for module in model.modules() if isinstance(module, (Linear, StackedLinear)))
    return {module.weight for module in kinds if not isinstance(module, Head) and module.weight.requires_grad}
