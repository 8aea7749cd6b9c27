"""Rounding to a narrower number up or down by chance, so that many small additions are right on average.

A state that decays slowly and is rounded to nearest at every step loses additions smaller than half its spacing, always
in the same direction. Rounded up with probability (x - below) / (above - below) it is unbiased; heads that decay fast
forget their rounding anyway and are slightly better off with the nearest.

The chance comes from a counter, not from a generator: it depends on a key (where in a sequence, which layer) and on the
element's number, so a result depends neither on what else is in the batch nor on what was computed before.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
FRACTION = 13  # bits of chance: as many as fp32 has more than fp16
EXPONENT = 0x7F800000  # of an fp32 number


def stochastic_round(x: Tensor, chance: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`: the neighbour above where the fraction between both neighbours plus `chance` in [0, 1) reaches 1.

    Numbers beyond the largest of `dtype` become the largest.
    """
    info, x = torch.finfo(dtype), x.float()
    power = (x.view(torch.int32) & EXPONENT).view(torch.float32)  # the power of two at or below |x|
    spacing = power.clamp_(min=info.smallest_normal).mul_(info.eps)
    return (x / spacing).add_(chance).floor_().mul_(spacing).clamp_(info.min, info.max).to(dtype)


def chances(keys: Sequence[int] | Tensor, count: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1), uniform and repeatable: [len(keys), count] in fp32, multiples of 2^-13."""
    if not isinstance(keys, Tensor):
        keys = torch.tensor([key - (key >> 31 << 32) for key in keys], dtype=torch.int32, device=device)
    elements = scrambled(torch.arange(count, dtype=torch.int32, device=device))
    bits = scrambled(elements ^ keys[:, None])
    return (bits & ((1 << FRACTION) - 1)).float().mul_(2.0**-FRACTION)


def scrambled(x: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every input bit moves every output bit (Wellons' lowbias32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)), (16, 1)):
        x = x ^ (x >> shift & WORD >> shift)  # words are signed: the mask makes the shift a plain one
        x = x * factor
    return x


def key_of(*numbers: int) -> int:
    """One 32-bit key from several numbers, the same mixing on Python's integers."""
    key = 0
    for number in numbers:
        key = (key ^ number) & WORD
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 0x9E3779B1)):
            key = (key ^ key >> shift) * factor & WORD
    return key


def keys_of(first: int, numbers_N: Tensor) -> Tensor:
    """key_of(first, number) of every number as signed 32-bit words, made where the numbers are."""
    key_N = (numbers_N.long() ^ key_of(first)) & WORD
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 0x9E3779B1)):
        # In halves: a product of two 32-bit words would leave 64 signed bits.
        mixed_N = key_N ^ key_N >> shift
        key_N = mixed_N * (factor & 0xFFFF) + ((mixed_N * (factor >> 16) & 0xFFFF) << 16) & WORD
    return torch.where(key_N >> 31 == 1, key_N - (1 << 32), key_N).to(torch.int32)
