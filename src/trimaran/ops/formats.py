"""Narrow numbers: E4M3 and E5M2 (8 bits), E2M1 (4 bits), E8M0 (a power of two); rounding, codes, chance.

    E4M3   sign, 4 bits of exponent, 3 of fraction    2^-9 .. 448      no infinities
    E5M2   sign, 5, 2                                 2^-16 .. 57344   infinities, which nothing here rounds to
    E2M1   sign, 2, 1                                 0, .5, 1, 1.5, 2, 3, 4, 6
    E8M0   exponent alone                             2^-127 .. 2^127, and one NaN

(OCP 8-bit and microscaling specifications.) Rounding saturates: what is larger than the largest number, infinities
included, becomes the largest; NaN stays NaN. All arithmetic is fp32, where every step below is exact but the rounding
itself, so that the results are the same bits on every device.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trimaran.ops.rounding import EXPONENT, scrambled

CHANCE = 16  # bits of a draw; two draws come from a word


@dataclass(frozen=True)
class Format:
    """A sign, `fraction` bits behind the leading one, normal numbers from 2^`lowest` on, and the `largest` number."""

    name: str
    fraction: int
    lowest: int
    largest: float
    dtype: torch.dtype | None = None  # torch's own, where it can compute with it


E4M3 = Format("e4m3", 3, -6, 448.0, torch.float8_e4m3fn)
E5M2 = Format("e5m2", 2, -14, 57344.0, torch.float8_e5m2)
E2M1 = Format("e2m1", 1, 0, 6.0)
E2M1_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; a fourth bit is the sign


def spacing(x: Tensor, form: Format) -> Tensor:
    """The distance between the format's two neighbours of each number."""
    power = (x.view(torch.int32) & EXPONENT).view(torch.float32)  # the power of two at or below |x|
    return power.clamp_(min=2.0**form.lowest).mul_(2.0**-form.fraction)


def nearest(x: Tensor, form: Format) -> Tensor:
    """fp32 numbers rounded to the nearest of the format, ties to the even code."""
    x = x.clamp(-form.largest, form.largest)
    step = spacing(x, form)
    return x.div_(step).round_().mul_(step)


def by_chance(x: Tensor, form: Format, key: int) -> Tensor:
    """fp32 numbers rounded to the neighbour above with probability (x - below) / (above - below).

    `key` says which draw. Right on average but for what saturates. Numbers of the format stay what they are.
    """
    x = x.clamp(-form.largest, form.largest)
    step = spacing(x, form)
    return x.div_(step).add_(draws(key, x.numel(), x.device).view(x.shape)).floor_().mul_(step)


def draws(key: int, count: int, device: torch.device) -> Tensor:
    """`count` numbers spread evenly over (0, 1): odd multiples of 2^-17, by a counter, so the same whenever asked."""
    words = scrambled(torch.arange((count + 1) // 2, dtype=torch.int32, device=device))
    words = scrambled(words ^ (key - (key >> 31 << 32)))
    return words.view(torch.int16)[:count].float().add_(2.0 ** (CHANCE - 1) + 0.5).mul_(2.0**-CHANCE)


def four_bits(values: Tensor) -> Tensor:
    """E2M1 numbers [.., 2n] as bytes [.., n], the first of two in the lower half."""
    edges = torch.tensor(E2M1_NUMBERS[1:], device=values.device)
    codes = torch.bucketize(values.abs(), edges, right=True).to(torch.uint8) | (values.signbit().to(torch.uint8) << 3)
    return codes[..., ::2] | codes[..., 1::2] << 4


def from_four_bits(codes: Tensor) -> Tensor:
    """The E2M1 numbers [.., 2n] of bytes [.., n]."""
    numbers = torch.tensor([*E2M1_NUMBERS, *(-number for number in E2M1_NUMBERS)], device=codes.device)
    return numbers[torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()]


def power_above(x: Tensor) -> Tensor:
    """The smallest power of two that is at least x >= 0, within E8M0's range; NaN where x is not finite."""
    fraction, exponent = torch.frexp(x)
    exponent = (exponent - (fraction == 0.5).int()).clamp(-127, 127).where(x > 0, -127)
    return torch.ldexp(torch.ones_like(x), exponent).where(x.isfinite(), math.nan)


def to_e8m0(powers: Tensor) -> Tensor:
    """Powers of two as bytes: the exponent + 127; 255 is NaN."""
    exponent = torch.frexp(powers).exponent + 126
    return exponent.where(powers.isfinite(), 255).to(torch.uint8)


def from_e8m0(codes: Tensor) -> Tensor:
    """The powers of two of bytes."""
    powers = torch.ldexp(torch.ones_like(codes, dtype=torch.float32), codes.int() - 127)
    return powers.where(codes != 255, math.nan)
