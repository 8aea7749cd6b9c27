"""Routed linear maps against a dense loop over all experts."""

import pytest
import torch

from tests.ops.agree import DTYPES, LENGTHS, agree, drawn, near
from trimaran.ops import experts

EXPERTS, CHOSEN, WIDTH = 8, 3, 16


def routed(ids, align):
    def run(x, weights, up, down):
        plan = experts.dispatch(ids, weights, EXPERTS, align)
        rows = experts.grouped_linear(experts.to_experts(x, plan), up, plan.count_E)
        return experts.from_experts(experts.grouped_linear(rows.relu().square(), down, plan.count_E), plan)

    return run


def dense(ids):
    def run(x, weights, up, down):
        every = torch.einsum("mef,eof->meo", torch.einsum("mi,efi->mef", x, up).relu().square(), down)
        combine = torch.zeros(len(x), EXPERTS, dtype=weights.dtype).scatter(1, ids, weights)
        return torch.einsum("meo,me->mo", every, combine)

    return run


@pytest.mark.parametrize("align", [1, 4, 32])
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("busy", [EXPERTS, 4], ids=["all experts", "some idle"])
@pytest.mark.parametrize("hidden", [24, 7], ids=["aligned", "odd width"])
def test_grouped_equals_dense(align, tokens, dtype, busy, hidden):
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, busy, generator=generator).topk(CHOSEN).indices
    agree(
        routed(ids, align),
        dense(ids),
        drawn(tokens, WIDTH, dtype=dtype, seed=1),
        drawn(tokens, CHOSEN, dtype=torch.promote_types(dtype, torch.float32), seed=2),
        drawn(EXPERTS, hidden, WIDTH, dtype=dtype, seed=3, scale=0.3),
        drawn(EXPERTS, WIDTH, hidden, dtype=dtype, seed=4, scale=0.3),
    )


@pytest.mark.parametrize("tokens", [1, 3, 32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@torch.no_grad()
def test_everyone_equals_dense(tokens, dtype):
    """Without a gradient few tokens of small experts go through all of them."""
    ids = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(tokens)).topk(CHOSEN).indices
    x, weights = drawn(tokens, WIDTH, dtype=dtype, seed=1), drawn(tokens, CHOSEN, dtype=dtype, seed=2)
    up, down = drawn(EXPERTS, 24, WIDTH, dtype=dtype, seed=3), drawn(EXPERTS, WIDTH, 24, dtype=dtype, seed=4)
    plan = experts.plan(ids, weights, EXPERTS, 2 * 24 * WIDTH)
    assert isinstance(plan, experts.Everyone)
    rows = experts.through_experts(experts.to_experts(x, plan), up, plan).relu().square()
    out = experts.from_experts(experts.through_experts(rows, down, plan), plan)
    near(out, dense(ids)(x, weights, up, down), 1e-11 if dtype == torch.float64 else 1e-3)


def test_large_experts_and_gradients_want_an_order():
    ids, weights = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    assert isinstance(experts.plan(ids, weights, EXPERTS, 64), experts.Dispatch)
    with torch.no_grad():
        assert isinstance(experts.plan(ids, weights, EXPERTS, 64), experts.Everyone)
        assert isinstance(experts.plan(ids, weights, EXPERTS, 1 << 20), experts.Dispatch)


def test_spare_rows_are_bounded_and_every_choice_has_its_own_row():
    ids = torch.rand(100, EXPERTS).topk(CHOSEN).indices
    plan = experts.dispatch(ids, torch.ones(100, CHOSEN), EXPERTS, 32)
    assert int(plan.count_E.sum()) == len(plan.token_S) <= 300 + 31 * EXPERTS
    assert plan.slot_MK.unique().numel() == 300
    assert (plan.count_E % 32 == 0).all()
    assert (plan.token_S[plan.slot_MK] == torch.arange(100)[:, None]).all()
    ends = plan.count_E.cumsum(0)
    assert (torch.bucketize(plan.slot_MK, ends, right=True) == ids).all()


def test_alignment_grows_with_the_load():
    assert [experts.alignment(rows, 8) for rows in (8, 63, 64, 256, 4096)] == [1, 1, 2, 8, 32]
