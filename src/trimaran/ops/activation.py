"""Squared ReLU, relu(x)^2 (Primer, arXiv 2109.08668), with one tensor kept for backward instead of two."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.ops import backend, native, native_training, triton_backend


def relu2(x: Tensor) -> Tensor:
    """relu(x)^2."""
    if triton_backend.runs("triton.relu2", x):
        from trimaran.ops import triton_experts

        return triton_experts.relu2(x)
    if not backend.allowed("torch.relu2"):
        return relu2_reference(x)
    if native.runs("native.relu2", x):
        return native.relu2(x)
    if native_training.runs("native.relu2", x) and x.is_contiguous():
        return native_training.ReLU2.apply(x)
    return ReLU2.apply(x) if torch.is_grad_enabled() else F.relu(x).square_()


def relu2_reference(x: Tensor) -> Tensor:
    return F.relu(x).square()


class ReLU2(torch.autograd.Function):
    """Keeps relu(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        if not ctx.needs_input_grad[0]:
            return positive.square_()
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2)
