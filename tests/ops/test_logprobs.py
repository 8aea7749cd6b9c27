"""Chunked log-probabilities against all logits at once."""

import pytest
import torch
from torch import nn

from tests.ops.agree import DTYPES, LENGTHS, drawn, near
from trimaran.model.linear import Embedding, Head, TiedHead
from trimaran.ops.logprobs import token_laws, token_laws_reference, token_logprobs
from trimaran.ops.loss import cross_entropy

WIDTH, VOCAB = 16, 97
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def head(kind: str, dtype: torch.dtype) -> nn.Module:
    weight = nn.Parameter(drawn(VOCAB, WIDTH, dtype=dtype, seed=1).detach())
    module: nn.Module = Head(WIDTH, VOCAB) if kind == "plain" else Embedding(VOCAB, WIDTH)
    module.weight = weight
    return module if kind == "plain" else TiedHead(module)


def targets(length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["plain", "tied"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_all_logits_at_once(kind, length, dtype, temperature):
    weights = drawn(length, dtype=torch.float64, seed=5).detach()
    found = []
    for run, chosen in ((token_laws, dtype), (token_laws_reference, torch.float64)):
        module = head(kind, dtype).to(chosen)
        hidden = drawn(length, WIDTH, dtype=dtype, seed=2).detach().to(chosen).requires_grad_()
        options = {"chunk": 40} if run is token_laws else {}
        logp, entropy = run(hidden, module, targets(length), temperature=temperature, **options)
        assert not entropy.requires_grad
        (logp * weights.to(logp.dtype)).sum().backward()
        found.append((logp.detach(), entropy, hidden.grad, next(module.parameters()).grad))
    for one, other in zip(*found):
        near(one, other, TOLERANCE[dtype])
    assert found[0][0].dtype == torch.promote_types(dtype, torch.float32)
    assert found[0][3].dtype == dtype


def test_gradient_is_that_of_finite_differences():
    module = head("plain", torch.float64)
    hidden = drawn(7, WIDTH, dtype=torch.float64, seed=2)

    def run(hidden, weight):
        return token_logprobs(hidden, module, targets(7), chunk=3, temperature=0.8)

    assert torch.autograd.gradcheck(run, (hidden, module.weight))


def test_mean_of_logprobs_is_the_cross_entropy():
    module, hidden = head("plain", torch.float64), drawn(50, WIDTH, dtype=torch.float64, seed=2)
    loss = cross_entropy(hidden, module, targets(50), torch.full((50,), 0.02))
    near(-token_logprobs(hidden, module, targets(50)).mean(), loss.detach(), 1e-7)


def test_huge_logits_stay_finite():
    module = head("plain", torch.float32)
    module.weight.data *= 1e4
    hidden = drawn(50, WIDTH, dtype=torch.float32, seed=2)
    logp, entropy = token_laws(hidden, module, targets(50))
    logp.sum().backward()
    assert logp.isfinite().all() and entropy.isfinite().all() and hidden.grad.isfinite().all()
    assert (logp <= 0).all() and (entropy >= 0).all()


def test_no_tokens_give_none():
    module, hidden = head("plain", torch.float32), torch.empty(0, WIDTH, requires_grad=True)
    logp = token_logprobs(hidden, module, torch.empty(0, dtype=torch.int64))
    logp.sum().backward()
    assert logp.shape == (0,) and not module.weight.grad.any()


def test_frozen_head_passes_gradients_on():
    module = head("plain", torch.float64).requires_grad_(False)
    hidden = drawn(50, WIDTH, dtype=torch.float64, seed=2)
    token_logprobs(hidden, module, targets(50), chunk=7).sum().backward()
    other = hidden.detach().requires_grad_()
    token_laws_reference(other, module, targets(50))[0].sum().backward()
    near(hidden.grad, other.grad, 1e-12)


def test_weights_changed_before_backward_are_noticed():
    module, hidden = head("plain", torch.float32), drawn(5, WIDTH, dtype=torch.float32, seed=2)
    logp = token_logprobs(hidden, module, targets(5))
    with torch.no_grad():
        module.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()
