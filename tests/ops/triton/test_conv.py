"""The convolution's kernels against the formula."""

import pytest
import torch

from tests.ops.agree import documents
from tests.ops.triton.operands import agree, given, guarded
from trimaran.ops import conv, triton_conv

BATCH, TAPS = 2, 4


def reference(x, weight, bias, tail, seg):
    return torch.nn.functional.silu(conv.causal_conv(x, weight, bias, tail, seg))


def check(length: int, channels: int, dtype: torch.dtype, carried: bool, borders: bool, bias: bool = True) -> None:
    agree(
        triton_conv.causal_conv_silu,
        reference,
        given(BATCH, length, channels, dtype=dtype, seed=1),
        given(channels, TAPS, dtype=dtype, seed=2),
        given(channels, dtype=dtype, seed=3) if bias else None,
        given(BATCH, TAPS - 1, channels, dtype=dtype, seed=4) if carried else None,
        guarded(documents(BATCH, length)) if borders else None,
    )


@pytest.mark.parametrize(
    ("length", "dtype", "carried", "borders"),
    [(1, torch.float32, True, True), (2, torch.bfloat16, False, False), (37, torch.bfloat16, True, True)],
)
def test_conv_equals_formula(length, dtype, carried, borders):
    check(length, 21, dtype, carried, borders)


@pytest.mark.slow
@pytest.mark.parametrize("length", [63, 100, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("carried", "borders"), [(False, False), (True, True)], ids=["fresh", "carried, documents"])
def test_conv_equals_formula_at_length(length, dtype, carried, borders):
    check(length, 67, dtype, carried, borders, bias=carried)


def test_inputs_may_be_channels_of_something_wider():
    x = given(BATCH, 9, 40, dtype=torch.float32, seed=1)
    weight = given(21, TAPS, dtype=torch.float32, seed=2)
    found = triton_conv.causal_conv_silu(x[..., 7:28], weight, None)
    assert torch.equal(found, triton_conv.causal_conv_silu(x[..., 7:28].contiguous(), weight, None))
