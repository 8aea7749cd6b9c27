"""The norms against their formulas."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.agree import DTYPES, LENGTHS, agree, drawn, near
from trimaran.ops import blocks, norm

WIDTH, EPS = 24, 1e-5


@pytest.fixture(params=[100, 1 << 19], ids=["many blocks", "one block"])
def piece(request, monkeypatch):
    monkeypatch.setattr(blocks, "ELEMENTS", request.param)


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(length, dtype):
    agree(
        lambda x, w: norm.rms_norm(x, w, EPS),
        lambda x, w: norm.rms_norm_reference(x, w, EPS),
        drawn(2, length, WIDTH, dtype=dtype, seed=1),
        drawn(WIDTH, dtype=dtype, seed=2),
    )


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 3])
def test_gated_rms_norm(length, dtype, groups):
    wide = torch.promote_types(dtype, torch.float32)
    agree(
        lambda y, z, w: norm.gated_rms_norm(y, z, w, groups, EPS),
        lambda y, z, w: norm.gated_rms_norm_reference(y, z, w, groups, EPS),
        drawn(2, length, WIDTH, dtype=wide, seed=1),
        drawn(2, length, WIDTH, dtype=dtype, seed=2),
        drawn(WIDTH, dtype=dtype, seed=3),
    )


def test_formulas_are_the_known_ones():
    x, w = drawn(5, WIDTH, dtype=torch.float64, seed=1), drawn(WIDTH, dtype=torch.float64, seed=2)
    near(norm.rms_norm_reference(x, w, EPS), F.rms_norm(x, (WIDTH,), w, EPS), 1e-12)
    gated = norm.gated_rms_norm_reference(x, 2 * x, w, 3, EPS)
    parts = [F.rms_norm(u, (WIDTH // 3,), None, EPS) for u in (x * F.silu(2 * x)).chunk(3, -1)]
    near(gated, torch.cat(parts, -1) * w, 1e-12)


def test_other_dtype_out():
    x, w = drawn(5, WIDTH, dtype=torch.float32, seed=1), drawn(WIDTH, dtype=torch.float32, seed=2)
    assert norm.rms_norm(x, w, EPS, torch.bfloat16).dtype == torch.bfloat16
    near(norm.rms_norm(x, w, EPS, torch.bfloat16), norm.rms_norm_reference(x, w, EPS), 1e-2)
