"""The norms' kernels against the formulas."""

import pytest
import torch

from tests.ops.triton.operands import agree, given
from trimaran.ops import norm, triton_norm

EPS = 1e-5


def check(rows: int, width: int, groups: int, dtype: torch.dtype) -> None:
    x, weight = given(rows, width, dtype=dtype, seed=1), given(width, dtype=dtype, seed=2)
    agree(triton_norm.rms_norm, norm.rms_norm_reference, x, weight, EPS)
    y, gate = given(rows, width, dtype=torch.float32, seed=3), given(rows, width, dtype=dtype, seed=4)
    agree(triton_norm.gated_rms_norm, norm.gated_rms_norm_reference, y, gate, weight, groups, EPS)


@pytest.mark.parametrize(("rows", "width", "groups"), [(1, 12, 1), (13, 60, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_equal_formulas(rows, width, groups, dtype):
    check(rows, width, groups, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "width", "groups"), [(63, 24, 1), (100, 48, 6), (257, 21, 7), (1030, 40, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_equal_formulas_at_many_rows(rows, width, groups, dtype):
    check(rows, width, groups, dtype)


def test_rows_may_be_parts_of_wider_ones_and_the_answer_narrower():
    x, weight = given(2, 5, 40, dtype=torch.float32, seed=1), given(11, dtype=torch.float32, seed=2)
    part = x[..., 20:31]
    found = triton_norm.rms_norm(part, weight, EPS, torch.bfloat16)
    expected = norm.rms_norm_reference(part.detach().double(), weight.detach().double(), EPS)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)
