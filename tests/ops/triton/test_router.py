"""The router's kernel against the model's router."""

import pytest
import torch

from tests.ops.triton.operands import agree, given, guarded
from trimaran.model.config import ModelConfig
from trimaran.model.moe import Router
from trimaran.ops import triton_router

FACTOR = 2.5


def reference(logits, bias, k, groups, kept, normalised, factor):
    """model.moe.Router behind its product, sorted by expert: which of the chosen comes first is nobody's business."""
    config = ModelConfig(
        pattern="E", vocab_size=8, hidden_size=8, n_routed_experts=logits.shape[1], num_experts_per_tok=k,
        n_group=groups, topk_group=kept, norm_topk_prob=normalised, routed_scaling_factor=factor,
        moe_intermediate_size=8,
    )  # fmt: skip
    router = Router(config).to(logits.dtype)
    router.weight.data = torch.eye(logits.shape[1], dtype=logits.dtype)
    router.e_score_correction_bias.data = bias
    return in_order(*router(logits))


def in_order(scores, ids, weights):
    ids, order = ids.sort(1)
    return scores, weights.gather(1, order), scores.gather(1, ids)


def found(*inputs):
    return in_order(*triton_router.route(*inputs))


def check(tokens, experts, k, groups, kept, normalised):
    logits = given(tokens, experts, dtype=torch.float32, seed=1, scale=2.0)
    bias = guarded(torch.randn(experts, generator=torch.Generator().manual_seed(2)) * 0.2)
    agree(found, reference, logits, bias, k, groups, kept, normalised, FACTOR)


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "groups", "kept", "normalised"),
    [(1, 5, 5, 1, 1, True), (7, 12, 3, 1, 1, True), (5, 12, 3, 4, 2, False), (3, 6, 2, 6, 3, True)],
)
def test_choice_equals_the_routers(tokens, experts, k, groups, kept, normalised):
    check(tokens, experts, k, groups, kept, normalised)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [63, 257])
@pytest.mark.parametrize(("experts", "k", "groups", "kept"), [(128, 6, 1, 1), (96, 8, 8, 4), (512, 22, 1, 1)])
def test_choice_equals_the_routers_with_many_experts(tokens, experts, k, groups, kept):
    check(tokens, experts, k, groups, kept, True)


def test_a_row_of_nan_gives_nan_and_ids_that_exist():
    logits = torch.tensor([[float("nan")] * 5, [0.0, 1.0, 2.0, 3.0, 4.0]])
    _, ids, weights = triton_router.route(guarded(logits), guarded(torch.zeros(5)), 2, 1, 1, True, 1.0)
    assert ids.min() >= 0 and ids.max() < 5 and sorted(ids[1].tolist()) == [3, 4]
    assert weights[0].isnan().all() and weights[1].isfinite().all()


def test_a_row_whose_scores_all_underflow_gives_no_nan():
    logits = torch.full((1, 4), -200.0, requires_grad=True)
    _, _, weights = triton_router.route(guarded(logits), guarded(torch.zeros(4)), 2, 1, 1, True, 1.0)
    assert weights.isfinite().all()
