"""The scan's kernels against the step recurrence."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.agree import documents, drawn
from tests.ops.triton.operands import agree, given, guarded
from trimaran.ops import ssd, triton_ssd

BATCH, CHUNK = 2, 16  # several chunks


def operands(length, dtype, carried, borders, heads=6, width=8, groups=2, size=16, rate=-2.0) -> list[object]:
    wide = torch.float32
    return [
        given(BATCH, length, heads, width, dtype=dtype, seed=1),
        guarded(F.softplus(drawn(BATCH, length, heads, dtype=wide, seed=2).detach() + rate).requires_grad_()),
        guarded((-drawn(heads, dtype=wide, seed=3).detach().exp()).requires_grad_()),
        given(BATCH, length, groups, size, dtype=dtype, seed=4, scale=0.3),
        given(BATCH, length, groups, size, dtype=dtype, seed=5, scale=0.3),
        given(BATCH, heads, width, size, dtype=wide, seed=6) if carried else None,
        guarded(documents(BATCH, length)) if borders else None,
    ]


def scan(*inputs):
    return triton_ssd.ssd(*inputs, CHUNK)


@pytest.mark.parametrize(
    ("length", "dtype", "carried", "borders"),
    [(1, torch.bfloat16, False, False), (37, torch.float32, True, True)],
)
def test_scan_equals_recurrence(length, dtype, carried, borders):
    agree(scan, ssd.ssd_recurrence, *operands(length, dtype, carried, borders, heads=3, groups=1, size=12))


@pytest.mark.slow
@pytest.mark.parametrize("length", [63, 100, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("carried", "borders"), [(False, False), (True, True)], ids=["fresh", "carried, documents"])
def test_scan_equals_recurrence_at_length(length, dtype, carried, borders):
    agree(triton_ssd.ssd, ssd.ssd_recurrence, *operands(length, dtype, carried, borders))


@pytest.mark.slow
@pytest.mark.parametrize(("width", "size"), [(40, 32), (64, 128), (80, 128), (24, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths_that_are_no_powers_of_two(width, size, dtype):
    shape = {"heads": 3, "groups": 1, "width": width, "size": size}
    agree(triton_ssd.ssd, ssd.ssd_recurrence, *operands(100, dtype, True, True, **shape))


def test_strong_decay_neither_overflows_nor_turns_to_nan():
    x, dt, A, B, C, state, _ = operands(17, torch.float32, True, False, heads=1, groups=1)
    dt, A = torch.full_like(dt, 20.0).requires_grad_(), torch.full_like(A, -10.0).requires_grad_()
    agree(scan, ssd.ssd_recurrence, x, dt, A, B, C, state, None)


@pytest.mark.slow
def test_only_the_last_state_may_want_a_gradient():
    inputs = operands(20, torch.float32, True, True)
    agree(lambda *t: scan(*t)[1], lambda *t: ssd.ssd_recurrence(*t)[1], *inputs[:4], inputs[4].detach(), *inputs[5:])
