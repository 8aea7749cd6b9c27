"""The chunked scans against the step recurrence."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.agree import DTYPES, LENGTHS, TOLERANCE, agree, documents, drawn, near
from trimaran.ops import ssd
from trimaran.ops.ssd_chunks import ChunkedScan

BATCH, HEADS, WIDTH, GROUPS, SIZE = 2, 6, 8, 2, 16


def operands(length: int, dtype: torch.dtype, carried: bool, borders: bool) -> list[object]:
    wide = torch.promote_types(dtype, torch.float32)
    state = drawn(BATCH, HEADS, WIDTH, SIZE, dtype=wide, seed=6) if carried else None
    return [
        drawn(BATCH, length, HEADS, WIDTH, dtype=dtype, seed=1),
        F.softplus(drawn(BATCH, length, HEADS, dtype=wide, seed=2).detach() - 2).requires_grad_(),
        (-drawn(HEADS, dtype=wide, seed=3).detach().exp()).requires_grad_(),
        drawn(BATCH, length, GROUPS, SIZE, dtype=dtype, seed=4, scale=0.3),
        drawn(BATCH, length, GROUPS, SIZE, dtype=dtype, seed=5, scale=0.3),
        state,
        documents(BATCH, length) if borders else None,
    ]


def chunked(*inputs: object) -> tuple[torch.Tensor, torch.Tensor]:
    return ChunkedScan.apply(*inputs, 32)


@pytest.mark.parametrize("run", [ssd.ssd_batched, chunked], ids=["batched", "chunked"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("borders", [False, True], ids=["whole", "documents"])
def test_scan_equals_recurrence(run, length, dtype, carried, borders):
    agree(run, ssd.ssd_recurrence, *operands(length, dtype, carried, borders))


def test_the_chosen_scan_is_one_of_them():
    agree(ssd.ssd, ssd.ssd_recurrence, *operands(100, torch.float64, True, True))


def test_strong_decay_neither_overflows_nor_turns_to_nan():
    """dt A of -200 per token: exp of the differences above the diagonal would be infinite."""
    x, dt, A, B, C, state, _ = operands(100, torch.float32, True, False)
    dt = torch.full_like(dt, 20.0).requires_grad_()
    A = torch.full_like(A, -10.0).requires_grad_()
    agree(ssd.ssd, ssd.ssd_recurrence, x, dt, A, B, C, state, None)


def test_step_of_size_zero_leaves_the_state_alone():
    x, dt, A, B, C, state, _ = operands(63, torch.float64, True, False)
    _, after = ssd.ssd(x, torch.zeros_like(dt), A, B, C, state)
    near(after, state, 0)
    _, short = ssd.ssd(x[:, :40], dt[:, :40], A, B[:, :40], C[:, :40], state)
    padded = torch.cat([dt[:, :40], torch.zeros_like(dt[:, 40:])], 1)
    near(ssd.ssd(x, padded, A, B, C, state)[1], short, 1e-12)


@pytest.mark.parametrize("length", LENGTHS)
def test_split_and_carry_equals_whole(length):
    inputs = operands(length, torch.float64, False, False)
    whole, last = ssd.ssd(*inputs)
    x, dt, A, B, C, _, _ = inputs
    cut = length // 3
    state, pieces = None, []
    for part in (slice(0, cut), slice(cut, length)):
        if x[:, part].shape[1]:
            y, state = ssd.ssd(x[:, part], dt[:, part], A, B[:, part], C[:, part], state)
            pieces.append(y)
    near(torch.cat(pieces, 1), whole, 1e-12)
    near(state, last, 1e-12)


@pytest.mark.parametrize("borders", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_state_adds_its_part(length, borders):
    def apart(x, dt, A, B, C, state, seg):
        y, last = ssd.ssd(x, dt, A, B, C, None, seg)
        decay_BH = (dt * A).sum(1).exp()
        if seg is not None:
            decay_BH = decay_BH * seg[:, -1:].eq(0)
        return y + ssd.ssd_from_past(dt, A, C, state, seg), last + decay_BH[..., None, None] * state

    agree(apart, ssd.ssd_recurrence, *operands(length, torch.float64, True, borders))


@pytest.mark.parametrize("length", [1, 5, 33])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_fold_equals_recurrence(length, dtype):
    """The state alone, also when some tokens never happened, and in the old state's memory; and the outputs alone."""
    x, dt, A, B, C, state, _ = operands(length, dtype, True, False)
    exact = [t.double() for t in (x, dt, A, B, C, state)]
    near(ssd.ssd_look(x, dt, A, B, C, state), ssd.ssd_recurrence(*exact)[0], TOLERANCE[dtype])
    for kept in (length, length // 2, 0):
        some = dt * (torch.arange(length) < kept)[:, None]
        exact = (t.double() for t in (x, some, A, B, C, state))
        expected = ssd.ssd_recurrence(*exact)[1]
        before = state.clone()
        near(ssd.ssd_fold(x, some, A, B, state), expected, FOLD[dtype])
        assert torch.equal(state, before)
        near(ssd.ssd_fold(x, some, A, B, before, in_place=True), expected, FOLD[dtype])
        near(before, expected, FOLD[dtype])


FOLD = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5}  # the state is never held in bf16


@pytest.mark.parametrize("length", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_steps_equal_recurrence_after_every_token(length, dtype):
    x, dt, A, B, C, state, _ = operands(length, dtype, True, False)
    before = state.clone()
    y, states = ssd.ssd_steps(x, dt, A, B, C, state)
    assert torch.equal(state, before)
    for kept in range(1, length + 1):
        exact = (t.double() for t in (x[:, :kept], dt[:, :kept], A, B[:, :kept], C[:, :kept], state))
        expected, last = ssd.ssd_recurrence(*exact)
        near(y[:, :kept], expected, TOLERANCE[dtype])
        near(states[kept - 1], last, FOLD[dtype])
