"""RMS norm, and Mamba-2's gated grouped RMS norm. Mean squares and weight multiplies in at least fp32, cast last."""

import torch.nn.functional as F
from torch import Tensor

from trimaran.ops.numbers import at_least_fp32


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    x = at_least_fp32(x_D)
    return (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_D).to(x_D.dtype)


def gated_rms_norm(y_D: Tensor, gate_D: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    """RMS norm of y * silu(gate), separately over each of `groups` equal slices of the last axis.

    The gate comes before the norm (norm_before_gate = False in the released models). Returned in gate's dtype.
    """
    u = at_least_fp32(y_D) * F.silu(at_least_fp32(gate_D))
    grouped = u.unflatten(-1, (groups, -1))
    scale = (grouped.square().mean(-1, keepdim=True) + eps).rsqrt()
    return ((grouped * scale).flatten(-2) * weight_D).to(gate_D.dtype)


def unit_norm(x_D: Tensor) -> Tensor:
    """x / ||x|| over the last axis, computed in at least fp32 (nGPT, arXiv 2410.01131)."""
    return F.normalize(at_least_fp32(x_D), dim=-1, eps=0.0).to(x_D.dtype)
