"""The random Hadamard transform along a contraction: rotate blocks of 16 of both operands, and the product stays.

    rotated = x D H / 4,   H = 16 x 16 Hadamard matrix, D = diag(SIGNS)        (arXiv 2509.25149)

(A D H / 4)(B D H / 4)^T = A B^T, since H H^T = 16 and D D = 1. What lies in few numbers of a block is spread over all
of it, so that fewer of the small ones beside a large one are flushed to zero. One fixed draw of signs serves all; a
plain H would turn a block of equal numbers into one large number and zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 16
SIGNS = (1, 1, -1, 1, -1, -1, -1, 1, -1, 1, 1, 1, -1, 1, -1, -1)  # drawn once


def rotation(like: Tensor) -> Tensor:
    """D H / 4, [16, 16], in the dtype and on the device of `like`; its transpose is its inverse."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=like.dtype, device=like.device)
    square = two
    while len(square) < SIZE:
        square = torch.kron(square, two)
    return square * torch.tensor(SIGNS, dtype=like.dtype, device=like.device)[:, None] / 4


def rotate(x: Tensor) -> Tensor:
    """The last dimension, in blocks of 16, rotated: [.., K] -> [.., K up to a multiple of 16], zeros put behind."""
    x = F.pad(x, (0, -x.shape[-1] % SIZE))
    return (x.unflatten(-1, (-1, SIZE)) @ rotation(x)).flatten(-2)
