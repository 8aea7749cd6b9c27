"""The benchmark's own rules: no speed without agreement, ratios the right way round."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def cpu():
    path = Path(__file__).parents[2] / "benchmarks" / "cpu.py"
    spec = importlib.util.spec_from_file_location("cpu_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def side(cpu, value: float, seconds: float):
    def turn():
        time.sleep(seconds)
        return torch.full((4,), value)

    return cpu.Side(turn, 100)


def test_outputs_that_differ_are_red_and_without_speed(cpu):
    for value in (1.1, float("nan")):
        found = cpu.row("case", "model", "fp32", [side(cpu, value, 0), side(cpu, 1.0, 0)], 2)
        assert "red" in found and "ours" not in found and "ratio" not in found


def test_ratio_is_ours_over_the_peer(cpu):
    found = cpu.row("case", "model", "fp32", [side(cpu, 1.0, 0.01), side(cpu, 1.0, 0.05)], 3)
    assert found["ours"] > found["peer"] and found["ratio"] > 2 and found["repeats"] == 3


def test_shapes_are_those_of_the_anchors(cpu):
    from trimaran.model.hybrid import build

    millions = {
        name: sum(p.numel() for p in build(config, device="meta").parameters()) / 1e6
        for name, config in cpu.MODELS.items()
    }
    assert {name: round(count, 1) for name, count in millions.items()} == {"dense": 111.6, "moelat": 242.1}
