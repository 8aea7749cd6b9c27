"""Tensors in narrow numbers with scales: FP8 per tensor and in blocks, MXFP8, NVFP4.

    fp8_tensor   E4M3 or E5M2, one factor s = largest / amax, found from this very tensor ("current scaling")
    fp8_blocks   E4M3, one fp32 scale amax / 448 for each block of 1 x 128 or 128 x 128 numbers
    mxfp8        E4M3, one power of two for 32 numbers: the smallest from which on amax fits (OCP microscaling)
    nvfp4        E2M1, an E4M3 scale S for 16 or 16 x 16 numbers, an fp32 factor s for the tensor (arXiv 2509.25149):
                     s = 6 * 448 / amax(tensor)       S = E4M3(amax(block) / 6 * s)       d = S / s
                     code = E2M1(x / d)               x^ = code * d

Tensors are [.., R, K], blocks lie along K, the dimension that a product sums over; a stack has a factor for each
matrix. Odd sizes are filled up with zeros. Nothing breaks at the ends: a block of zeros, or one whose scale falls
below E4M3's smallest number, is zeros; a factor beyond fp32's largest number is that number. One number that is not
finite makes all numbers under its scale NaN (of nvfp4: all of its matrix), so that a run's check of the loss sees it.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.ops import formats
from trimaran.ops.formats import E2M1, E4M3, Format

MXFP8_BLOCK, NVFP4_BLOCK, FP8_BLOCK = 32, 16, 128


@dataclass(frozen=True)
class Rounded:
    """Numbers of a format, not yet packed: x = values * scale / factor.

    values [.., R', K'] fp32, filled up to whole blocks; scale [.., R'/r, K'/k], None: one; factor [.., 1, 1];
    block (r, k); shape (R, K).
    """

    form: Format
    values: Tensor
    scale: Tensor | None
    factor: Tensor
    block: tuple[int, int]
    shape: tuple[int, int]

    def numbers(self) -> Tensor:
        """values * scale, [.., R, K]: what a product takes before it is divided by the factors. Exact for nvfp4."""
        return self.cut(self.values if self.scale is None else blockwise(self.values, self.scale, self.block, False))

    def dequantize(self) -> Tensor:
        """The numbers that x became, [.., R, K] fp32."""
        if self.scale is None:
            return self.cut(self.values * (1 / self.factor))
        return self.cut(blockwise(self.values, self.scale / self.factor, self.block, False))

    def cut(self, values: Tensor) -> Tensor:
        return values[..., : self.shape[0], : self.shape[1]]

    @property
    def mT(self) -> "Rounded":
        """The transposed matrix: the same numbers, summed over the other dimension. For square blocks and none."""
        scale = None if self.scale is None else self.scale.mT
        return replace(self, values=self.values.mT, scale=scale, block=self.block[::-1], shape=self.shape[::-1])

    def packed(self) -> "Quantised":
        """The form that is stored."""
        if self.form is E2M1:
            assert self.scale is not None
            codes, scale = formats.four_bits(self.values), self.scale.to(torch.float8_e4m3fn)
            return Quantised("nvfp4", codes, scale, self.factor, self.block, self.shape)
        codes = self.values.to(self.form.dtype)
        if self.block == (1, MXFP8_BLOCK):
            assert self.scale is not None
            return Quantised("mxfp8", codes, formats.to_e8m0(self.scale), None, self.block, self.shape)
        factor = self.factor if self.scale is None else None
        return Quantised(f"fp8 {self.form.name}", codes, self.scale, factor, self.block, self.shape)


@dataclass(frozen=True)
class Quantised:
    """A tensor as it is stored. codes: 8-bit floats, or two E2M1 numbers a byte, the first in the lower half; scale:
    per block (E4M3 of nvfp4, E8M0 bytes of mxfp8, fp32 of fp8), None: one; factor: per matrix, fp32, None: one."""

    name: str
    codes: Tensor
    scale: Tensor | None
    factor: Tensor | None
    block: tuple[int, int]
    shape: tuple[int, int]

    @property
    def bits(self) -> int:
        """What storing it takes, filled-up blocks included."""
        parts = (part for part in (self.codes, self.scale, self.factor) if part is not None)
        return sum(8 * part.numel() * part.element_size() for part in parts)

    def unpacked(self) -> Rounded:
        """The same numbers in fp32."""
        form = E2M1 if self.name == "nvfp4" else formats.E5M2 if self.name.endswith("e5m2") else E4M3
        values = formats.from_four_bits(self.codes) if form is E2M1 else self.codes.float()
        scale = formats.from_e8m0(self.scale) if self.scale is not None and self.name == "mxfp8" else self.scale
        factor = values.new_ones((*values.shape[:-2], 1, 1)) if self.factor is None else self.factor
        return Rounded(form, values, None if scale is None else scale.float(), factor, self.block, self.shape)

    def dequantize(self) -> Tensor:
        """The numbers that x became, [.., R, K] fp32."""
        return self.unpacked().dequantize()


def blockwise(values: Tensor, scale: Tensor, block: tuple[int, int], divide: bool) -> Tensor:
    """Each block of `values` [.., R, K] times its scale, or divided by it."""
    rows, columns = block
    split = values.unflatten(-1, (-1, columns))
    by = scale[..., None]
    if rows > 1:
        split, by = split.unflatten(-3, (-1, rows)), by[..., None, :, :]
    split = split / by if divide else split * by
    return split.flatten(-2) if rows == 1 else split.flatten(-2).flatten(-3, -2)


def filled(x: Tensor, block: tuple[int, int]) -> Tensor:
    """x in fp32 with zeros up to whole blocks."""
    return F.pad(x.float(), (0, -x.shape[-1] % block[1], 0, -x.shape[-2] % block[0]))


def largest_of_blocks(x: Tensor, block: tuple[int, int]) -> Tensor:
    """max |x| of each block; NaN where there is one."""
    largest = x.abs().unflatten(-1, (-1, block[1])).amax(-1)
    return largest if block[0] == 1 else largest.unflatten(-2, (-1, block[0])).amax(-2)


def factor_of(x: Tensor, largest: float, amax: Tensor | None) -> Tensor:
    """largest / amax over the last two dimensions, [.., 1, 1]: 1 where all is zero, NaN where not all is finite."""
    if amax is None:
        amax = x.abs().amax((-2, -1), keepdim=True) if x.numel() else x.new_zeros((*x.shape[:-2], 1, 1))
    amax = amax.float()
    factor = (largest / amax).clamp(max=torch.finfo(torch.float32).max)
    return factor.where(amax != 0, 1.0).where(amax.isfinite(), math.nan)


def rounded(x: Tensor, form: Format, key: int | None) -> Tensor:
    return formats.nearest(x, form) if key is None else formats.by_chance(x, form, key)


def fp8_tensor(x: Tensor, form: Format = E4M3, amax: Tensor | None = None) -> Rounded:
    """x [.., R, K] under one factor each matrix, so that its largest number becomes the format's largest.

    amax [.., 1, 1]: the largest to count on, where x is a part of something; None: x's own.
    """
    factor = factor_of(x, form.largest, amax)
    return Rounded(form, formats.nearest(x.float() * factor, form), None, factor, (1, 1), (x.shape[-2], x.shape[-1]))


def fp8_blocks(x: Tensor, rows: int = 1) -> Rounded:
    """x [.., R, K] in E4M3, an fp32 scale for each block of `rows` (1 or 128) x 128."""
    block = rows, FP8_BLOCK
    padded = filled(x, block)
    amax = largest_of_blocks(padded, block)
    smallest = torch.finfo(torch.float32).tiny  # below it the division would lose the scale's digits
    scale = (amax / E4M3.largest).clamp(min=smallest).where(amax.isfinite(), math.nan)
    values = formats.nearest(blockwise(padded, scale, block, True), E4M3)
    return Rounded(E4M3, values, scale, values.new_ones((*x.shape[:-2], 1, 1)), block, (x.shape[-2], x.shape[-1]))


def mxfp8(x: Tensor) -> Rounded:
    """x [.., R, K] in E4M3, a power of two for each 32 numbers along K.

    The power is rounded up, so that nothing saturates (arXiv 2506.08027); the specification's own example rounds down.
    """
    block = 1, MXFP8_BLOCK
    padded = filled(x, block)
    scale = formats.power_above(largest_of_blocks(padded, block) / E4M3.largest)
    values = formats.nearest(blockwise(padded, scale, block, True), E4M3)
    return Rounded(E4M3, values, scale, values.new_ones((*x.shape[:-2], 1, 1)), block, (x.shape[-2], x.shape[-1]))


def nvfp4(x: Tensor, square: bool = False, key: int | None = None, amax: Tensor | None = None) -> Rounded:
    """x [.., R, K] in E2M1, an E4M3 scale for 16 numbers along K, or for 16 x 16 where `square`.

    key: round up or down by chance, drawn by this number; None: to the nearest. amax: as in `fp8_tensor`.
    """
    block = (NVFP4_BLOCK if square else 1), NVFP4_BLOCK
    padded = filled(x, block)
    factor = factor_of(padded, E2M1.largest * E4M3.largest, amax)
    scale = formats.nearest(largest_of_blocks(padded, block) / E2M1.largest * factor, E4M3)
    step = scale / factor
    quotient = blockwise(padded, step.where(step > 0, math.inf), block, True)  # a scale of zero: zeros, never NaN
    values = rounded(quotient, E2M1, key)
    return Rounded(E2M1, values, scale, factor, block, (x.shape[-2], x.shape[-1]))
