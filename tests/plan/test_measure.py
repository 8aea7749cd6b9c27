"""What a machine's figures are fitted with: known coefficients come back, and a real measurement makes sense."""

import json

import numpy as np
import pytest

from tests.cli.test_cli import run_main
from tests.plan.small import machine
from trimaran.plan.costs import Costs, Job
from trimaran.plan.hardware import COLLECTIVES, Reach, find
from trimaran.plan.layout import Layout
from trimaran.plan.probes import PROBES, SPREAD, fitted, fitted_spread, nonnegative, probe_model, spreads


def bare():
    whole = Reach(matmul=1.0, attention=1.0, scan=1.0, memory=1.0, optimizer=1.0, tile=8, step=0.0)
    return machine(chunk_operations=85, hides=False, reach=whole)


def steps(hardware) -> list[float]:
    """What the cost model itself says of the probes."""
    found = []
    for one in PROBES:
        job = Job(probe_model(one.pattern, one.width), one.sequence, one.rows, hardware, "fp32")
        found.append(Costs(job).step(Layout(micro_batch=one.rows)).total)
    return found


def test_known_coefficients_come_back():
    """Steps that the cost model predicts are fitted by the coefficients it predicted them with."""
    known = Reach(
        matmul=0.6, attention=0.3, scan=0.1, memory=0.5, optimizer=0.7, launch=2e-5, step=4e-3, tile=8, link=0.75
    )
    found = fitted(bare(), "fp32", steps(bare().replace(reach=known)))
    for name in ("matmul", "attention", "scan", "memory", "optimizer", "launch", "step"):
        assert getattr(found, name) == pytest.approx(getattr(known, name), rel=0.02), name


def test_noise_of_a_tenth_leaves_predictions_within_it():
    known = Reach(matmul=0.6, attention=0.3, scan=0.1, memory=0.5, optimizer=0.7, launch=2e-5, step=4e-3, tile=8)
    truth = steps(bare().replace(reach=known))
    noise = np.random.default_rng(0).normal(1, 0.1, len(truth))
    found = steps(bare().replace(reach=fitted(bare(), "fp32", list(truth * noise))))
    assert np.mean(np.abs(np.array(found) / truth - 1)) < 0.1


def spread_steps(hardware, processes: int) -> list[float]:
    """What the cost model itself says of spread probes."""
    found = []
    for one in SPREAD:
        for axes in spreads(processes):
            layout = Layout(**axes, micro_batch=one.rows * processes // Layout(**axes).rows)
            job = Job(probe_model(one.pattern, one.width), one.sequence, one.rows * processes, hardware, "fp32")
            found.append(Costs(job).step(layout).total)
    return found


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_what_spread_steps_lack_comes_back(processes):
    """Messages that take longer, and waiting, are told apart; steps that lack neither are left alone."""
    curves = {kind: [(256.0, 1e-4), (1e6, 2e-3)] for kind in COLLECTIVES}
    known = bare().replace(curves=curves, reach=Reach(matmul=0.6, memory=0.5, link=0.75))
    slow = known.replace(reach=known.reach.replace(exchange=3.3, waits=0.15))
    found = fitted_spread(known, "fp32", processes, spread_steps(slow, processes))
    assert (found.exchange, found.waits) == (pytest.approx(3.3, rel=0.01), pytest.approx(0.15, rel=0.01))
    same = fitted_spread(known, "fp32", processes, spread_steps(known, processes))
    assert (same.exchange, same.waits) == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    assert fitted_spread(known.replace(hides=True), "fp32", processes, []) == known.reach


def test_least_squares_without_negatives():
    generator = np.random.default_rng(0)
    matrix = generator.random((20, 4))
    wanted = matrix @ np.array([1.0, 0.0, 2.0, 0.5])
    assert nonnegative(matrix, wanted) == pytest.approx([1, 0, 2, 0.5], abs=1e-4)
    assert min(nonnegative(matrix, -wanted)) == 0


def test_this_cpu_has_measured_figures():
    hardware = find("cpu")
    assert set(hardware.curves) == set(COLLECTIVES) and not hardware.hides
    assert all(len(curve) >= 5 and curve == sorted(curve) for curve in hardware.curves.values())
    assert "processes" in hardware.source


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_real_measurement(capsys, tmp_path):
    """Two processes on this machine; the plan made with the figures is of plausible size."""
    path = tmp_path / "mine.json"
    words = ("2m", "--gpus", "2", "--measure", str(path), "--seq", "128", "--global-batch", "8", "--precision", "fp32")
    code, out, err = run_main(capsys, "plan", *words, "--json")
    assert (code, err) == (0, "")
    content = json.loads(out)
    assert content["hardware"] == "cpu" and 1e-3 < content["step_seconds"] < 60
    measured = find(str(path))
    assert all(len(measured.curves[kind]) == 9 for kind in COLLECTIVES)
    again = run_main(capsys, "plan", "2m", "--gpus", "2", "--hardware", str(path), *words[5:], "--json")
    assert json.loads(again[1])["step_seconds"] == content["step_seconds"]
