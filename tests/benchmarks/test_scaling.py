"""The benchmark's own rules: no time without agreement; speed and overhead the right way round; layouts that exist."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from trimaran.parallel.settings import ParallelSettings


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "scaling.py"
    spec = importlib.util.spec_from_file_location("scaling_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_numbers_that_differ_are_red_and_without_time(scaling):
    truth = {"loss": 2.0, "grad_norm": 1.0, "max_vio": 3.0}
    for wrong in ({"loss": 2.1}, {"loss": float("nan")}, {"grad_norm": float("nan")}):
        apart = scaling.agreement(truth | wrong, truth)
        row = scaling.summary("tp 2", apart, [[1.0, 1.0]], [[1.0, 1.0]])
        assert "red" in row and "wall_s" not in row and "speedup" not in row
    assert scaling.agreement(truth | {"loss": 2.0 + 1e-6}, truth) < scaling.AGREE


def test_speedup_is_over_one_process_and_overhead_counts_all_of_them(scaling):
    row = scaling.summary("fsdp 2", 0.0, [[0.6, 1.2], [0.5, 1.2], [9.0, 1.2]], [[0.9, 1.0]] * 3)
    assert row["speedup"] == 1.5 and row["overhead"] == 0.2 and row["repeats"] == 3


def test_every_layout_is_of_its_size_and_fits_the_model(scaling):
    for size, layouts in scaling.LAYOUTS.items():
        for layout in layouts:
            settings = ParallelSettings(**layout)
            assert settings.world == size
            assert scaling.ROWS % (settings.rows * (settings.micro_batches or 1)) == 0
            assert scaling.MODEL.n_groups % settings.tp == 0 and scaling.LENGTH % (settings.cp * settings.tp) == 0


def test_less_is_kept_where_blocks_are_recomputed(scaling):
    config = scaling.MODEL.replace(vocab_size=64, hidden_size=48)
    rows = scaling.recomputing(config, scaling.batch_of(64, 2, 16), 1)
    assert [row["case"] for row in rows] == [f"recompute {letters}" for letters in scaling.LETTERS]
    assert all(row["kept"] < 1 and "red" not in row for row in rows)
