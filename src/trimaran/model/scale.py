"""A learned vector whose storage has a scale of its own (nGPT, arXiv 2410.01131)."""

import torch
from torch import Tensor, nn

from trimaran.ops.numbers import at_least_fp32


class Scale(nn.Module):
    """Multiplies the last axis by a learned vector that starts at `value` and is stored at `stored`."""

    def __init__(self, width: int, value: float, stored: float):
        super().__init__()
        self.value, self.stored = value, stored
        self.weight = nn.Parameter(torch.empty(width))

    def vector(self) -> Tensor:
        """The vector itself, in at least fp32."""
        return at_least_fp32(self.weight) * (self.value / self.stored)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.vector().to(x.dtype)
