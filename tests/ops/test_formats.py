"""Narrow numbers against torch's own 8-bit types and against an oracle in fp64 that knows nothing but the code book."""

import math

import numpy as np
import pytest
import torch

from trimaran.ops import formats
from trimaran.ops import formats_scaled as scaled
from trimaran.ops.formats import E2M1, E2M1_NUMBERS, E4M3, E5M2
from trimaran.ops.hadamard import rotate, rotation

CODES = np.array(E2M1_NUMBERS)
ALL_E4M3 = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # every positive number
KINDS = {
    "fp8": scaled.fp8_tensor,
    "e5m2": lambda x: scaled.fp8_tensor(x, E5M2),
    "rows": scaled.fp8_blocks,
    "squares": lambda x: scaled.fp8_blocks(x, 128),
    "mxfp8": scaled.mxfp8,
    "nvfp4": scaled.nvfp4,
    "square nvfp4": lambda x: scaled.nvfp4(x, square=True),
}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest_code(x: np.ndarray) -> np.ndarray:
    """The nearest E2M1 number in fp64, ties to the even code, by comparing with all eight."""
    distance = np.abs(np.minimum(np.abs(x), 6.0)[..., None] - CODES)
    best = distance.min(-1, keepdims=True)
    even = np.where(distance == best, np.arange(8) % 2, 2)  # of equally near codes the even one
    return np.copysign(CODES[even.argmin(-1)], x)


@pytest.mark.parametrize("form", [E4M3, E5M2], ids=lambda form: form.name)
def test_eight_bits_are_torchs(form):
    bits = torch.arange(-(2**31), 2**31 - 1, 9973, dtype=torch.int64).to(torch.int32)
    codes = torch.arange(256, dtype=torch.uint8).view(form.dtype).float()
    codes = codes[codes.isfinite()]
    middles = (codes[:-1] + codes[1:]) / 2  # ties, of both signs
    x = torch.cat([bits.view(torch.float32), codes, middles, torch.tensor([math.inf, -math.inf, math.nan])])
    expected = x.clamp(-form.largest, form.largest).to(form.dtype).float()
    assert torch.equal(formats.nearest(x, form).nan_to_num(12345.0), expected.nan_to_num(12345.0))


def test_four_bits_are_the_nearest_code_under_every_scale():
    grid = torch.arange(-8 * 64, 8 * 64 + 1) / 64  # past the largest code, every tie among them
    grid = torch.nn.functional.pad(grid, (0, -len(grid) % 14)).view(-1, 14)
    for scale in ALL_E4M3:
        # A block whose largest number is 6 S gets exactly S, and a tensor whose largest is 2688 has factor 1.
        x = torch.cat([grid.clamp(-6, 6) * scale, 6 * scale.expand(len(grid), 1), torch.zeros(len(grid), 1)], 1)
        x = torch.cat([x, torch.full((1, 16), 2688.0)])
        one = scaled.nvfp4(x)
        assert one.factor == 1 and (one.scale[:-1] == scale).all()
        expected = nearest_code(x[:-1].double().numpy() / float(scale)) * float(scale)
        assert np.array_equal(one.dequantize()[:-1].numpy(), expected.astype(np.float32))
    assert np.array_equal(formats.nearest(grid, E2M1).numpy(), nearest_code(grid.numpy()))  # 6 .. 8 clip


def nvfp4_oracle(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(dequantised, x / d) in fp64, from the formulas alone; E4M3 by comparing with all its numbers."""
    numbers = np.concatenate([[0.0], ALL_E4M3.numpy().astype(np.float64)])
    factor = np.float32(2688.0) / np.float32(np.abs(x).max())
    out, quotients = np.empty_like(x), np.empty_like(x)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], 16):
            block = x[row, start : start + 16]
            target = float(np.float32(np.float32(np.abs(block).max()) / np.float32(6)) * factor)
            distance = np.abs(numbers - min(target, 448.0))
            tied = np.flatnonzero(distance == distance.min())
            scale = numbers[tied[tied % 2 == 0][0] if len(tied) > 1 else tied[0]]
            step = float(np.float32(scale) / factor)
            quotient = block / step if step else np.zeros_like(block)
            quotients[row, start : start + 16] = quotient
            out[row, start : start + 16] = nearest_code(quotient) * step
    return out, quotients


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_nvfp4_is_its_formulas(spread):
    x = gaussian(24, 80) * torch.exp(spread * gaussian(24, 80, seed=1))  # wide: scales that underflow among them
    expected, quotient = nvfp4_oracle(x.double().numpy())
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    clear = np.abs(np.abs(quotient)[..., None] - ties).min(-1) > 1e-6  # fp32 division may meet a tie that fp64 misses
    assert clear.mean() > 0.99
    assert np.allclose(scaled.nvfp4(x).dequantize().numpy()[clear], expected[clear], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (17, 33), (130, 257), (2, 5, 48)], ids=str)
def test_packed_is_what_was_rounded(kind, shape):
    one = KINDS[kind](gaussian(*shape))
    packed = one.packed()
    assert one.dequantize().shape == shape
    assert torch.equal(packed.dequantize(), one.dequantize())
    torch.testing.assert_close(one.numbers() / one.factor, one.dequantize(), rtol=1e-6, atol=0)


def test_bits_of_storage():
    x = gaussian(256, 256)
    bits = {kind: make(x).packed().bits / x.numel() for kind, make in KINDS.items()}
    factor = 32 / x.numel()
    assert bits["nvfp4"] == 4 + 8 / 16 + factor and bits["square nvfp4"] == 4 + 8 / 256 + factor
    assert bits["mxfp8"] == 8 + 8 / 32 and bits["rows"] == 8 + 32 / 128 and bits["fp8"] == bits["e5m2"] == 8 + factor


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind):
    assert (KINDS[kind](torch.zeros(20, 40)).packed().dequantize() == 0).all()
    x = gaussian(256, 256)
    x[:128, :128] = 0  # whole blocks of every kind
    assert (KINDS[kind](x).dequantize()[:128, :128] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e-30, 1e30, 3e38])
def test_the_smallest_and_largest_tensors_are_finite(kind, size):
    x = gaussian(16, 128).clamp(-1, 1) * size
    error = (KINDS[kind](x).dequantize() - x).abs().max()
    assert error.isfinite()
    assert error <= (0.3 * size if size >= 1e-37 else 1.01 * size)  # below, numbers may vanish, never grow


def test_a_scale_that_underflows_flushes_its_block():
    x = torch.full((2, 16), 1e-4)
    x[1] = 2688.0  # factor 1: the first block's scale is 1e-4 / 6, below half of E4M3's smallest
    one = scaled.nvfp4(x)
    assert one.scale[0] == 0 and (one.dequantize()[0] == 0).all() and (one.dequantize()[1] == 2688).all()
    x[0] = 6 * 2.0**-9  # the smallest scale there is
    assert torch.equal(scaled.nvfp4(x).dequantize(), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
def test_what_is_not_finite_makes_its_block_nan(kind, bad):
    x = gaussian(2, 256)
    x[0, 0] = bad
    for found in (KINDS[kind](x).dequantize(), KINDS[kind](x).packed().dequantize()):
        assert found[0, :16].isnan().all()
        if kind in ("fp8", "e5m2", "nvfp4", "square nvfp4"):
            assert found.isnan().all()
        else:
            assert found[:, 128:].isfinite().all()


def test_current_scaling_meets_the_largest_number():
    for seed in range(50):
        x = gaussian(64, 64, seed=seed)
        assert scaled.fp8_tensor(x).values.abs().max() == 448
        assert scaled.fp8_tensor(x, E5M2).values.abs().max() == 57344
    x[3, 4] = 100 * x.abs().max()  # a spike: found at once, so nothing saturates
    one = scaled.fp8_tensor(x)
    assert (one.values.abs() == 448).sum() == 1
    assert abs(one.dequantize()[3, 4] / x[3, 4] - 1) < 1e-6


def test_mxfp8_never_saturates():
    x = gaussian(64, 256) * torch.exp(4 * gaussian(64, 1, seed=1))
    one = scaled.mxfp8(x)
    largest = one.values.abs().unflatten(-1, (-1, 32)).amax(-1)
    assert (largest <= 448).all() and (largest > 223).all()
    assert ((one.dequantize() - x).abs() <= x.abs() * 2.0**-4 + one.scale.repeat_interleave(32, -1) * 2.0**-10).all()


def relative_error(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).square().mean() / x.square().mean())


def test_errors_of_a_gaussian_are_the_measured_ones():
    x = gaussian(512, 512)
    found = {kind: relative_error(x, make(x).dequantize()) for kind, make in KINDS.items()}
    assert found["nvfp4"] == pytest.approx(0.0091, rel=0.03)
    assert found["square nvfp4"] == pytest.approx(0.0124, rel=0.03)
    assert found["fp8"] ** 0.5 == pytest.approx(0.026, rel=0.03)
    draws = torch.stack([scaled.nvfp4(x, key=key).dequantize() for key in range(10)])
    assert relative_error(x, draws[0]) == pytest.approx(0.0187, rel=0.03)
    assert relative_error(x, draws.mean(0)) < 0.0187 / 8  # averages out, what clips does not


def test_chance_is_unbiased_where_nothing_clips():
    x = gaussian(64, 64, seed=3)
    one = scaled.nvfp4(x)
    step = (one.scale / one.factor).repeat_interleave(16, -1)
    inside = x.abs() / step < 6  # a scale that was rounded down lets its block's largest clip
    assert 0.9 < inside.float().mean() < 1
    count = 200
    draws = torch.stack([scaled.nvfp4(x, key=key).dequantize() for key in range(count)]).double()
    spacing = formats.spacing(x / step, E2M1)
    fraction = (x / step / spacing).frac().abs()
    deviation = (fraction * (1 - fraction)).sqrt() * spacing * step  # of one draw, by theory
    z = ((draws.mean(0) - x.double()) / (deviation / count**0.5))[inside & (fraction > 0)]
    assert abs(float(z.mean())) * len(z) ** 0.5 < 4  # no common bias
    assert 0.9 < float(z.square().mean()) < 1.1  # nor one by element, and as wide as theory says


def test_draws_are_even_and_differ_by_key():
    device = torch.device("cpu")
    first, again, other = (formats.draws(key, 100_001, device) for key in (7, 7, 8))
    assert torch.equal(first, again) and abs(float(torch.corrcoef(torch.stack([first, other]))[0, 1])) < 0.02
    assert first.min() > 0 and first.max() < 1
    assert abs(float(first.mean()) - 0.5) < 0.005 and abs(float(first.var()) - 1 / 12) < 0.001
    assert torch.equal(formats.by_chance(torch.tensor(CODES).float(), E2M1, 1), torch.tensor(CODES).float())


def test_square_blocks_turn_and_rows_do_not():
    w = gaussian(512, 512)
    assert torch.equal(scaled.nvfp4(w.T, True).dequantize(), scaled.nvfp4(w, True).dequantize().T)
    turned, rows = scaled.nvfp4(w.T).dequantize(), scaled.nvfp4(w).dequantize().T
    assert 0.15 < (turned == rows).float().mean() < 0.3
    assert torch.equal(scaled.nvfp4(w, True).mT.dequantize(), scaled.nvfp4(w.T, True).dequantize())


# the rotation


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-14)], ids=str)
@pytest.mark.parametrize("tokens", [16, 63, 100])
def test_the_rotation_cancels(dtype, limit, tokens):
    a, b = gaussian(8, tokens).to(dtype), gaussian(5, tokens, seed=1).to(dtype)
    assert (rotate(a) @ rotate(b).mT - a @ b.mT).norm() <= limit * (a @ b.mT).norm()
    assert torch.equal(rotation(a) @ rotation(a).mT, torch.eye(16, dtype=dtype))


def test_the_rotation_lifts_what_a_large_neighbour_flushes():
    x = gaussian(256, 256)
    x[:, ::16] = 20 * x[:, ::16].sign()
    small = torch.ones_like(x, dtype=torch.bool)
    small[:, ::16] = False
    plain, turned = scaled.nvfp4(x), scaled.nvfp4(rotate(x))
    assert 0.45 < float((plain.values[small] == 0).float().mean()) < 0.65
    assert float((turned.values == 0).float().mean()) < 0.12
    # It does not lower the error there: the block holds the large number exactly anyway.
    assert relative_error(rotate(x), turned.dequantize()) > relative_error(x, plain.dequantize())


def test_the_rotation_helps_blocks_of_one_sign():
    x = 3 + 0.2 * gaussian(256, 256)
    plain, turned = relative_error(x, scaled.nvfp4(x).dequantize()), scaled.nvfp4(rotate(x)).dequantize()
    assert relative_error(rotate(x), turned) < 0.6 * plain
