"""y = x W^T. A CPU's matrix libraries are made for many rows; few rows, as in decoding, go to a kernel of our own."""

import torch.nn.functional as F
from torch import Tensor

from trimaran.ops import native


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """[..., I] -> [..., O]; sums in fp32, rounded once to x's dtype."""
    if native.takes_linear(x, weight_OI):
        return native.linear(x, weight_OI)
    return F.linear(x, weight_OI)
