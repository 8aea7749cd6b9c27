"""The two norms as modules; the maths is in ops.norm."""

import torch
from torch import Tensor, nn

from trimaran.ops import norm


class RMSNorm(nn.Module):
    """RMS norm over the last axis with a weight per channel.

    Under autocast it hands on the narrow dtype, so that the maps that read it do not each cast it again.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return norm.rms_norm(x, self.weight, self.eps, dtype)


class GatedRMSNorm(nn.Module):
    """Mamba-2's output norm: gate first, then RMS per group."""

    def __init__(self, width: int, groups: int, eps: float):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        return norm.gated_rms_norm(y, gate, self.weight, self.groups, self.eps)
