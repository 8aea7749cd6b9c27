"""A whole model with every kernel forced against the same model with none: losses, gradients, prefill and decoding."""

import pytest
import torch

from tests.ops.triton.operands import DEVICE
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import HybridModel, build
from trimaran.ops import (
    backend,
    triton_backend,
    triton_conv,
    triton_experts,
    triton_norm,
    triton_router,
    triton_ssd,
    triton_step,
)

SMALL = ModelConfig(
    pattern="ME-",
    vocab_size=32,
    hidden_size=12,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    mamba_num_heads=2,
    mamba_head_dim=8,
    ssm_state_size=12,
    n_groups=1,
    chunk_size=16,
    intermediate_size=12,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_latent_size=8,
    moe_intermediate_size=12,
    initializer_range=0.3,
)
TWINS = {  # of each twin the function that it enters, in training or in decoding
    "conv": (triton_conv, "causal_conv_silu"),
    "experts": (triton_experts, "from_experts"),
    "norm": (triton_norm, "rms_norm"),
    "relu2": (triton_experts, "relu2"),
    "router": (triton_router, "route"),
    "ssd": (triton_ssd, "ssd"),
    "step": (triton_step, "mamba"),
}


@pytest.fixture(scope="module")
def model() -> HybridModel:
    return build(SMALL, device=DEVICE)


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The twins that ran."""
    seen: set[str] = set()
    for twin, (module, name) in TWINS.items():
        own = getattr(module, name)

        def noted(*given, twin=twin, own=own):
            seen.add(twin)
            return own(*given)

        monkeypatch.setattr(module, name, noted)
    return seen


def everything(model: HybridModel) -> list[torch.Tensor]:
    """Loss and gradients over two documents and padding; and logits of a prefill and of a step behind it."""
    tokens = torch.arange(9, device=DEVICE)[None]
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1, -1]], device=DEVICE)
    loss = model(tokens, documents).square().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [loss.detach(), *gradients, *decoded(model, tokens)]


@torch.no_grad()
def decoded(model: HybridModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    state = model.new_state(batch=1)
    return [model(tokens[:, part], state=state) for part in (slice(0, 4), slice(4, 5))]


def test_every_kernel_runs_where_named_and_gives_the_references_numbers(model, entered):
    with backend.using("reference"):
        expected = everything(model)
    assert not entered
    with backend.using("triton,-native"):
        found = everything(model)
    # "paged" belongs to the engine's captured step: tests/engine/test_captured.py
    assert entered == set(TWINS) == set(backend.TWINS["triton"]) - {"paged"}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the kernels run unasked")
def test_the_interpreter_runs_nothing_unasked(model, entered):
    decoded(model, torch.arange(9, device=DEVICE)[None])
    assert triton_backend.missing() is None and not entered


def test_one_kernel_can_be_forbidden(model, entered):
    with backend.using("triton,-native,-triton.ssd"):
        decoded(model, torch.arange(9, device=DEVICE)[None])
    assert "ssd" not in entered and {"conv", "norm", "step"} <= entered
