"""The kernels around the experts against ops.experts, and whole experts for few tokens."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.agree import near
from tests.ops.triton.operands import DEVICE, TOLERANCE, agree, exact, given, guarded
from trimaran.ops import experts, triton_experts
from trimaran.ops.activation import relu2_reference

EXPERTS = 5


def chosen(tokens: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(tokens)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu2(dtype):
    agree(triton_experts.relu2, relu2_reference, given(3, 41, dtype=dtype, seed=1))


@pytest.mark.parametrize(("tokens", "width", "dtype"), [(1, 21, torch.float32), (7, 12, torch.bfloat16)])
def test_out_to_the_experts_and_back(tokens, width, dtype):
    check_round_trip(tokens, width, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "width"), [(63, 21), (100, 1200), (257, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_to_the_experts_and_back_with_many(tokens, width, dtype):
    check_round_trip(tokens, width, dtype)


def check_round_trip(tokens: int, width: int, dtype: torch.dtype) -> None:
    x, weight = given(tokens, width, dtype=dtype, seed=1), given(tokens, 3, dtype=torch.float32, seed=2)
    # The gradient of spare rows is zero: they are in the second plan only.
    tight, spare = (experts.dispatch(chosen(tokens, 3), weight.detach().cpu(), EXPERTS, align) for align in (1, 4))
    token, slot = guarded(tight.token_S), guarded(tight.slot_MK)
    agree(triton_experts.to_experts, lambda x, token, slot: x.index_select(0, token), x, token, slot)
    rows, slot = given(len(spare.token_S), width, dtype=dtype, seed=3), guarded(spare.slot_MK)
    agree(triton_experts.from_experts, lambda y, slot, w: (y[slot] * w[..., None]).sum(1), rows, slot, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_through_experts(dtype):
    check_few(3, 20, 36, 12, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_through_wide_experts(dtype):
    check_few(5, 300, 530, 270, dtype)


def check_few(tokens: int, inner: int, hidden: int, outer: int, dtype: torch.dtype) -> None:
    x = given(tokens, inner, dtype=dtype, seed=1).detach()
    up = given(EXPERTS, hidden, inner, dtype=dtype, seed=2, scale=inner**-0.5).detach()
    down = given(EXPERTS, outer, hidden, dtype=dtype, seed=3, scale=hidden**-0.5).detach()
    weight, ids = given(tokens, 2, dtype=torch.float32, seed=4).detach(), chosen(tokens, 2)
    found = triton_experts.few_through(x, up, down, ids.to(DEVICE), weight)
    x, up, down, weight = (exact(t) for t in (x, up, down, weight))
    each = torch.einsum("mkof,mkf->mko", down[ids], F.relu(torch.einsum("mkfi,mi->mkf", up[ids], x)).square())
    near(found.cpu(), (each * weight[..., None]).sum(1), TOLERANCE[dtype])
