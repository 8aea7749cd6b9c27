"""Which numbers the three products of a linear map take, by recipe.

    y  [M, O] = x  W^T        summed over the inputs I       fprop
    dx [M, I] = g  W          summed over the outputs O      dgrad
    dW [O, I] = g^T x         summed over the tokens M       wgrad

Every operand is rounded with its blocks along the dimension that its product sums over, so each tensor is rounded
twice: as it is, and turned for the way back. M tokens, I inputs, O outputs; a stack of weights [E, O, I] has a factor
for each matrix.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from torch import Tensor

from trimaran.ops import formats_scaled as scaled
from trimaran.ops.formats import E4M3, E5M2
from trimaran.ops.formats_scaled import FP8_BLOCK, Rounded
from trimaran.ops.hadamard import rotate
from trimaran.ops.rounding import key_of


class Operand(IntEnum):
    """Operands of the three products; those that come back turned are summed over the other dimension."""

    WEIGHT = 0  # fprop, [O, I]
    WEIGHT_TURNED = 1  # dgrad, [I, O]
    ACTIVATION = 2  # fprop, [M, I]
    ACTIVATION_TURNED = 3  # wgrad, [I, M]
    GRADIENT = 4  # dgrad, [M, O]
    GRADIENT_TURNED = 5  # wgrad, [O, M]

    @property
    def turned(self) -> bool:
        return bool(self % 2)

    @property
    def is_weight(self) -> bool:
        return self in (Operand.WEIGHT, Operand.WEIGHT_TURNED)

    @property
    def is_gradient(self) -> bool:
        return self in (Operand.GRADIENT, Operand.GRADIENT_TURNED)


class Formats(Protocol):
    """Rounds x [.., R, K] for its use as `what`; turned operands come out as [.., K, R].

    key: what draws derive from. amax [.., 1, 1]: the largest number of what x is a part of (one expert's tokens), None:
    x's own.
    """

    def __call__(self, x: Tensor, what: Operand, key: int, amax: Tensor | None = None) -> Rounded: ...


@dataclass(frozen=True)
class FP8Tensor:
    """One factor for a tensor, found from it; gradients may take E5M2's wider range."""

    wide_gradients: bool = True

    def __call__(self, x: Tensor, what: Operand, key: int, amax: Tensor | None = None) -> Rounded:
        one = scaled.fp8_tensor(x, E5M2 if what.is_gradient and self.wide_gradients else E4M3, amax)
        return one.mT if what.turned else one


@dataclass(frozen=True)
class FP8Blocks:
    """E4M3 everywhere; weights in blocks of 128 x 128, the same numbers in both directions, all else in 1 x 128."""

    def __call__(self, x: Tensor, what: Operand, key: int, amax: Tensor | None = None) -> Rounded:
        if what.is_weight:
            one = scaled.fp8_blocks(x, FP8_BLOCK)
            return one.mT if what.turned else one
        return scaled.fp8_blocks(x.mT if what.turned else x)


@dataclass(frozen=True)
class MXFP8:
    """E4M3 with a power of two for each 32 numbers; weights are rounded anew for each direction."""

    def __call__(self, x: Tensor, what: Operand, key: int, amax: Tensor | None = None) -> Rounded:
        return scaled.mxfp8(x.mT if what.turned else x)


@dataclass(frozen=True)
class NVFP4:
    """NVIDIA's recipe (arXiv 2509.25149): weights in 16 x 16 blocks, the same numbers in both directions; gradients
    rounded by chance; both operands of wgrad rotated along the tokens. The fields are its ablations."""

    hadamard: bool = True
    by_chance: tuple[Operand, ...] = (Operand.GRADIENT, Operand.GRADIENT_TURNED)
    square_weights: bool = True

    def __call__(self, x: Tensor, what: Operand, key: int, amax: Tensor | None = None) -> Rounded:
        # A weight's draws are the same in both directions, as its numbers are to be.
        draw = key_of(key, Operand.WEIGHT if what.is_weight else what) if what in self.by_chance else None
        if what.is_weight and self.square_weights:
            one = scaled.nvfp4(x, True, draw)
            return one.mT if what.turned else one
        x = x.mT if what.turned else x
        if self.hadamard and what.turned and not what.is_weight:
            return scaled.nvfp4(rotate(x.float()), key=draw)  # rotated, it has another amax
        return scaled.nvfp4(x, key=draw, amax=amax)
