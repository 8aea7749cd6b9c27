"""The schedule against its formulas, written out as tables."""

import math

import pytest

from trimaran.train.optim import adamw, clip, set_learning_rate
from trimaran.train.schedule import SHAPES, Schedule

TABLE = {
    "linear": {0.0: 1.0, 0.1: 0.9, 0.25: 0.75, 0.5: 0.5, 0.9: 0.1},
    "cosine": {0.0: 1.0, 0.25: 0.8535533905932737, 0.5: 0.5, 0.75: 0.14644660940672624},
    "exponential": {0.0: 1.0, 0.25: 0.681792830507429, 0.5: 0.4142135623730951, 0.75: 0.189207115002721},
    "minus_sqrt": {0.0: 1.0, 0.01: 0.9, 0.1: 0.683772233983162, 0.25: 0.5, 0.64: 0.2},
}


@pytest.mark.parametrize("shape", TABLE)
def test_decay_follows_its_formula(shape):
    schedule = Schedule(steps=1000, lr=3e-3, min_lr=3e-5, warmup=50, decay=200, shape=shape)
    for r, c in TABLE[shape].items():
        assert schedule(800 + round(200 * r)) == pytest.approx(3e-5 + (3e-3 - 3e-5) * c, rel=1e-12)
    assert schedule(800) == 3e-3, "the decay begins at exactly the peak"
    assert schedule(1000) == pytest.approx(3e-5, rel=1e-12)
    rates = [schedule(step) for step in range(800, 1001)]
    assert rates == sorted(rates, reverse=True)


def test_warm_up_moves_at_once_and_ends_at_the_peak():
    schedule = Schedule(steps=100, lr=1.0, warmup=4, decay=20)
    assert [schedule(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert {schedule(step) for step in range(4, 81)} == {1.0}


@pytest.mark.parametrize("shape", SHAPES)
def test_without_warm_up_or_decay_the_rate_is_constant(shape):
    assert {Schedule(steps=10, lr=0.5, shape=shape)(step) for step in range(10)} == {0.5}


def test_one_step_runs():
    assert Schedule(steps=1, lr=1.0, warmup=0, decay=0)(0) == 1.0
    assert Schedule(steps=1, lr=1.0, decay=1)(0) == 1.0
    assert math.isfinite(Schedule(steps=1, lr=1.0, warmup=1)(0))


def test_only_tensors_of_one_dimension_are_spared_from_decay(model):
    optimizer = adamw(model, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    decayed, spared = (group["params"] for group in optimizer.param_groups)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[one].rsplit(".", 1)[-1] for one in decayed} == {"weight"}
    assert any(names[one].endswith("conv1d.weight") for one in decayed)
    assert {"A_log", "D", "dt_bias", "bias", "weight"} == {names[one].rsplit(".", 1)[-1] for one in spared}
    assert all("norm" in names[one] for one in spared if names[one].endswith("weight"))
    assert len(decayed) + len(spared) == len(names)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


def test_clipping_limits_the_global_norm(model):
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    expected = math.sqrt(sum(float(one.grad.double().square().sum()) for one in model.parameters()))
    assert float(clip(model.parameters(), None)) == pytest.approx(expected, rel=1e-5)
    assert float(clip(model.parameters(), 0.5)) == pytest.approx(expected, rel=1e-5)
    assert float(clip(model.parameters(), 10.0)) == pytest.approx(0.5, rel=1e-5)
    assert float(clip(model.parameters(), 10.0)) == pytest.approx(0.5, rel=1e-5), "a small norm is left alone"
