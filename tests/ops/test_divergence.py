"""Chunked divergences against all logits at once."""

from functools import partial

import pytest
import torch

from tests.ops.agree import DTYPES, LENGTHS, drawn, near
from tests.ops.test_loss import TOLERANCE, WIDTH, head
from trimaran.ops.divergence import divergence_reference, forward_kl, reverse_kl

WAYS = {"forward": forward_kl, "reverse": reverse_kl}


def inputs(length: int, dtype: torch.dtype, students: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden vectors of students and teacher, and weights, every third of them 0."""
    weights = torch.rand(length, generator=torch.Generator().manual_seed(0))
    weights[::3] = 0
    hidden = drawn(students, length, WIDTH, dtype=dtype, seed=2).detach()
    return hidden, drawn(length, WIDTH, dtype=dtype, seed=3).detach(), weights


@pytest.mark.parametrize("kind", ["plain", "tied"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("way", WAYS)
def test_equals_plain(way, kind, length, dtype, temperature):
    found = []
    for run, chosen in ((WAYS[way], dtype), (partial(divergence_reference, way), torch.float64)):
        module, other = head(kind, dtype)[0].to(chosen), head("plain", dtype)[0].to(chosen)
        hidden, teacher, weights = inputs(length, dtype)
        hidden, teacher = hidden.to(chosen).requires_grad_(), teacher.to(chosen).requires_grad_()
        options = {"chunk": 40} if run is WAYS[way] else {}
        loss, each = run(hidden, module, teacher, other, weights, temperature, **options)
        (3 * loss).backward()
        assert teacher.grad is None and next(other.parameters()).grad is None
        found.append((loss.detach(), each, hidden.grad, next(module.parameters()).grad))
    for one, reference in zip(*found):
        near(one, reference, TOLERANCE[dtype])
    assert found[0][0].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("run", WAYS.values())
def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(run):
    module = head("plain", torch.float32)[0]
    _, teacher, weights = inputs(100, torch.float32)
    hidden = teacher[None].clone().requires_grad_()
    loss, _ = run(hidden, module, teacher, module, weights, 2.0, chunk=37)
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


def test_the_reverse_gradient_is_the_mean_of_those_of_sampled_tokens():
    """sum over tokens of their probability times -(log p_teacher - log p) grad log p: what sampling estimates."""
    module = head("plain", torch.float64)[0]
    hidden, teacher, _ = inputs(1, torch.float64, students=1)
    hidden.requires_grad_()
    reverse_kl(hidden, module, teacher, module, torch.ones(1))[0].backward()
    other = hidden.detach().requires_grad_()
    log_V = module(other)[0, 0].log_softmax(-1)
    gain_V = (module(teacher)[0].log_softmax(-1) - log_V).detach()
    (-log_V.detach().exp() * gain_V * log_V).sum().backward()
    near(hidden.grad, other.grad, 1e-12)


def test_the_weight_of_the_temperature_keeps_the_size_of_gradients():
    module = head("plain", torch.float64)[0]
    hidden, teacher, weights = inputs(63, torch.float64, students=1)
    norms = []
    for temperature in (50.0, 100.0):  # where both laws are nearly flat, the gradient depends on it no more
        one = hidden.clone().requires_grad_()
        forward_kl(one, module, teacher, module, weights, temperature)[0].backward()
        norms.append(one.grad.norm())
    assert torch.isclose(*norms, rtol=2e-2)


@pytest.mark.parametrize("run", WAYS.values())
def test_logits_that_leave_no_mass_stay_finite(run):
    module = head("plain", torch.float32)[0]
    module.weight.data *= 1e4
    hidden, teacher, weights = inputs(50, torch.float32)
    hidden.requires_grad_()
    loss, _ = run(hidden, module, teacher, module, weights, 2.0)
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all()


def test_a_frozen_head_and_no_gradient():
    module = head("plain", torch.float64)[0]
    hidden, teacher, weights = inputs(50, torch.float64)
    with torch.no_grad():
        assert not forward_kl(hidden, module, teacher, module, weights)[0].requires_grad
    module.requires_grad_(False)
    hidden.requires_grad_()
    forward_kl(hidden, module, teacher, module, weights)[0].backward()
    assert hidden.grad.abs().sum() > 0 and module.weight.grad is None
