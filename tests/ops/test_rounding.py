"""Rounding by chance: between the neighbours, right on average, repeatable, and worth it where states decay slowly."""

import pytest
import torch

from trimaran.ops.rounding import chances, key_of, scrambled, stochastic_round

CPU = torch.device("cpu")


def numbers(count: int) -> torch.Tensor:
    """Of all sizes that fp16 knows, subnormal ones included."""
    generator = torch.Generator().manual_seed(0)
    mantissa, exponent = torch.randn(count, generator=generator), torch.randint(-24, 14, (count,), generator=generator)
    return torch.ldexp(mantissa, exponent)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_result_is_one_of_the_two_neighbours(dtype):
    x = numbers(20_000)
    found = stochastic_round(x, chances([3], len(x), CPU)[0], dtype).double()
    nearest = x.to(dtype)
    step = torch.nextafter(nearest.abs(), torch.tensor(torch.inf, dtype=dtype)).double() - nearest.abs().double()
    assert ((found - x.double()).abs() < step * (1 + 1e-6)).all()
    assert 0.3 < (found > x.double()).double().mean() < 0.7


def test_numbers_that_need_no_rounding_stay():
    x = torch.cat([numbers(1000).half().float(), torch.tensor([0.0, 65504.0, -65504.0])])
    for key in range(5):
        assert torch.equal(stochastic_round(x, chances([key], len(x), CPU)[0], torch.float16).float(), x)
    assert stochastic_round(torch.tensor([1e6, -1e6]), torch.zeros(2), torch.float16).tolist() == [65504, -65504]
    assert stochastic_round(torch.tensor([torch.nan]), torch.zeros(1), torch.float16).isnan().all()


def test_the_probability_is_the_fraction_exactly():
    """Over every possible chance, the mean is the number itself: fp32 has 13 bits more than fp16."""
    every = torch.arange(1 << 13) / (1 << 13)
    for x in (1.0 + 2**-23, 1.3, -7.7, 1023.77, 6.5e-5, -65503.0):
        x = torch.tensor(x)
        mean = stochastic_round(x.expand(len(every)), every, torch.float16).double().mean()
        assert abs(float(mean) - float(x)) <= 1e-9 * max(1.0, abs(float(x)))


def test_chances_are_even_and_repeat():
    keys = [key_of(layer, place) for layer in range(4) for place in range(50)]
    assert len(set(keys)) == len(keys)
    drawn = chances(keys, 500, CPU)
    assert torch.equal(drawn[7:9], chances(keys[7:9], 500, CPU)), "a row does not depend on the others"
    counts = (drawn.flatten() * 64).long().bincount(minlength=64).double()
    expected = drawn.numel() / 64
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 63) < 4 * (2 * 63) ** 0.5
    for other in (drawn.roll(1, 0), drawn.roll(1, 1), drawn.roll(50, 0)):  # places, elements, layers
        assert abs(float(torch.corrcoef(torch.stack([drawn.flatten(), other.flatten()]))[0, 1])) < 0.02
    words = torch.randint(-(1 << 31), 1 << 31, (50_000,), dtype=torch.int32)
    assert len(scrambled(words.unique()).unique()) == len(words.unique())


@pytest.mark.parametrize(
    ("decay", "by_chance", "by_nearest"), [(0.9999, (0, 0.004), (0.015, 0.05)), (0.99, (0, 0.002), (0, 0.002))]
)
def test_slow_decay_needs_chance_and_fast_decay_does_not(decay, by_chance, by_nearest):
    """h <- a h + u, u about 0.02, 4000 times, against the same in fp64: the bias of both roundings."""
    heads, generator = 256, torch.Generator().manual_seed(1)
    exact = torch.zeros(heads, dtype=torch.float64)
    chance, nearest = torch.zeros(heads).half(), torch.zeros(heads).half()
    for place in range(4000):
        u = torch.randn(heads, generator=generator) * 0.01 + 0.02
        exact = exact * decay + u
        chance = stochastic_round(chance.float() * decay + u, chances([key_of(0, place)], heads, CPU)[0], torch.float16)
        nearest = (nearest.float() * decay + u).half()
    for found, (low, high) in ((chance, by_chance), (nearest, by_nearest)):
        assert low <= abs(float((found.double() / exact - 1).mean())) <= high
