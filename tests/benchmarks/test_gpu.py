"""The GPU benchmark without a GPU: its bounds are the published ones, files merge, and every case runs as a toy."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from trimaran.model.presets import nano_3, qwen3_30b_a3b

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """The benchmark's files by name; they find each other as they do when run."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def imported(name: str) -> ModuleType:
        return importlib.import_module(name)

    return imported


def test_bounds_are_those_of_an_h200_at_8k(load):
    """Tokens per second at 4.3 TB/s in bf16 with fp32 states; Qwen at 256 rows would not fit, but has a bound."""
    timing = load("gpu_timing")
    expected = {nano_3: [651, 1456, 3975, 10957], qwen3_30b_a3b: [624, 1066, 2478, 4129]}
    for preset, speeds in expected.items():
        found = [timing.step_bound(preset(), batch, 8192) for batch in (1, 8, 64, 256)]
        assert found == pytest.approx(speeds, rel=0.01)


def test_outputs_that_differ_have_no_speed(load):
    timing, kernels = load("gpu_timing"), load("gpu_kernels")
    scene = timing.Scene("cpu", torch.float32, True, 1, "auto")
    right = kernels.row(kernels.Kernel("right", lambda: torch.ones(3), 1.0), scene)
    assert right["share"] > 0 and "red" not in right
    values = iter(range(100))
    wrong = kernels.row(kernels.Kernel("wrong", lambda: torch.full((3,), float(next(values))), 1.0), scene)
    assert "red" in wrong and "us" not in wrong
    assert timing.apart(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


def test_cases_merge_and_the_ratio_waits_for_both(load, tmp_path):
    gpu, path = load("gpu"), tmp_path / "gpu.json"

    def case(speed: float, small: bool = False) -> dict[str, object]:
        return {"small": small, "rows": [{"work": "8k in, 16k out", "tokens_per_s": speed}]}

    assert gpu.merged(path, "nano", case(330.0))["nano_over_qwen"] is None
    assert gpu.merged(path, "qwen", case(100.0, small=True))["nano_over_qwen"] is None
    assert gpu.merged(path, "qwen", case(100.0))["nano_over_qwen"] == {"ours": 3.3, "published": 3.3}
    assert set(json.loads(path.read_text())["cases"]) == {"nano", "qwen"}


@pytest.mark.slow
def test_every_case_runs_as_a_toy(tmp_path):
    path = tmp_path / "gpu.json"
    command = [sys.executable, str(FOLDER / "gpu.py"), "--small", "--device", "cpu", "--repeat", "1"]
    cases = [("nano,qwen,transformers,train", "auto"), ("kernels", "triton")]  # whole models would take the interpreter
    for names, backend in cases:  # minutes
        done = subprocess.run(
            [*command, "--cases", names, "--backend", backend, "--output", str(path)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    held = json.loads(path.read_text())["cases"]
    assert set(held) == {"nano", "qwen", "transformers", "train", "kernels"}
    for case in held.values():
        assert case["small"] and case["rows"] and not [row for row in case["rows"] if "red" in row]
        assert case["environment"]["torch"] == torch.__version__


def test_a_toy_is_never_written_to_the_committed_file(load, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--device", "cpu"])
    with pytest.raises(SystemExit, match="--output"):
        load("gpu").main()
