"""AdamW and gradient clipping.

Weight decay follows Megatron-LM's rule: tensors of one dimension have none (A_log, D, dt_bias, norms, biases), all
others have it, the convolutions' filters [C, 1, taps] included.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

FUSED = ("cpu", "cuda")  # where torch has AdamW as one kernel


def adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`, decaying those with two dimensions or more."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in FUSED for parameter in trainable)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next update, for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Scales all gradients so that their global norm is at most `limit`; returns the norm before, on their device."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
    return norm
