"""Muon against torch's own, against the singular value decomposition, and through a checkpoint."""

import pytest
import torch

from tests.models import tiny_config
from trimaran.model.hybrid import build
from trimaran.train.muon import Muon, matrices, orthogonalised
from trimaran.train.optim import muon, set_learning_rate

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16), (1, 7)])
def test_matrices_move_as_with_torch(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    one = Muon([{"params": [ours], "matrices": True}], momentum=0.95, dtype=torch.bfloat16, lr=1e-2, weight_decay=0.1)
    other = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        one.step()
        other.step()
        moved = (theirs - start).norm()
        assert (ours - theirs).norm() < 0.02 * moved  # both iterate in bf16, in another order of products


def test_singular_values_become_about_one_and_vectors_stay():
    torch.manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(3, 20, 33, dtype=torch.float64), full_matrices=False)
    s = torch.linspace(0.05, 1, 20, dtype=torch.float64).expand_as(s)
    made = orthogonalised(u @ torch.diag_embed(s) @ vh, torch.float64)
    inside = u.mT @ made @ vh.mT
    values = inside.diagonal(dim1=-2, dim2=-1)
    assert (values > 0.6).all() and (values < 1.3).all()
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-10


def test_each_expert_is_a_matrix_of_its_own():
    torch.manual_seed(0)
    stacked = torch.randn(4, 12, 20, dtype=torch.float64)
    alone = torch.stack([orthogonalised(one[None], torch.float64)[0] for one in stacked])
    assert torch.allclose(orthogonalised(stacked, torch.float64), alone, atol=1e-12)
    scaled = stacked * torch.tensor([1.0, 1e-3, 1e3, 0.0], dtype=torch.float64)[:, None, None]
    assert torch.allclose(orthogonalised(scaled, torch.float64)[:3], alone[:3], atol=1e-9)
    assert not orthogonalised(scaled, torch.float64)[3].any()


def test_every_parameter_is_in_one_group_and_rates_keep_their_ratio():
    model = build(tiny_config("latent"), seed=0)
    optimizer = muon(model, times=2.0, momentum=0.95, dtype=torch.float32, **SETTINGS)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    chosen = matrices(model)
    names = {name for name, parameter in model.named_parameters() if parameter in chosen}
    assert "backbone.layers.0.mixer.in_proj.weight" in names
    assert any("experts" in name for name in names)
    assert not any(
        part in name for name in names for part in ("embeddings", "lm_head", "gate.weight", "conv1d", "norm")
    )
    set_learning_rate(optimizer, 3e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [6e-3, 3e-3, 3e-3]


def test_without_a_gradient_nothing_moves():
    model = build(tiny_config("attention"), seed=0)
    optimizer = muon(model, times=1.0, momentum=0.95, dtype=torch.float32, **SETTINGS)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
