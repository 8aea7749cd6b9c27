"""The benchmark's own rules: no speed without agreement, ratios the right way round, rivals that compute the same."""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.models import random_tokens, tiny
from trimaran.errors import Refusal
from trimaran.model import hub
from trimaran.model.hybrid import build
from trimaran.text.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[2] / "benchmarks"
NAMES = ("cpu_sides", "llamacpp", "trial", "cpu_processes", "cpu")

# What llama-bench -o json (shortened) and llama-batched-bench --output-format jsonl print (llama-cpp-python 0.3.36).
LLAMA_BENCH = """[
  {
    "build_commit": "0c1e570", "model_type": "nemotron_h ?B BF16", "n_threads": 2, "n_prompt": 512, "n_gen": 0,
    "avg_ns": 479123456, "avg_ts": 1066.1, "stddev_ts": 88.0, "samples_ns": [ 470000000, 500000000, 480000000 ],
    "samples_ts": [ 1089.36, 1024.0, 1066.67 ]
  }
]
"""
BATCHED_BENCH = """
{"n_kv_max": 896, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, "n_gpu_layers": -1, \
"n_threads": 2, "n_threads_batch": 2, "pp": 64, "tg": 48, "pl": 8, "n_kv": 896, "t_pp": 0.470828, \
"speed_pp": 1087.445923, "t_tg": 1.182964, "speed_tg": 324.608368, "t": 1.653792, "speed": 541.785217}

"""


@pytest.fixture(scope="module")
def scripts():
    """The scripts of that folder, as they see each other."""
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    yield {name: importlib.import_module(name) for name in NAMES}
    sys.path[:] = before
    for name in NAMES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def cpu(scripts) -> ModuleType:
    return scripts["cpu"]


def side(cpu, values: float | list[float], seconds: float, spent=None):
    said = iter([values] * 100 if isinstance(values, float) else values)

    def turn():
        time.sleep(seconds)
        return torch.full((4,), next(said))

    return cpu.Side(turn, 100, spent)


@pytest.mark.parametrize("theirs", [1.1, float("nan"), [1.0, 1.0, 1.1]], ids=["other", "nan", "later"])
def test_outputs_that_differ_are_red_and_without_speed(cpu, theirs):
    sides = {"ours": side(cpu, 1.0, 0), "right": side(cpu, 1.0, 0), "wrong": side(cpu, theirs, 0)}
    found = cpu.row("case", "model", "fp32", sides, 2)
    assert "wrong" in found["red"] and "right" not in found["red"]
    assert "ours" not in found and "peers" not in found


def test_ratio_is_ours_over_the_peer(cpu):
    sides = {"ours": side(cpu, 1.0, 0.01), "peer": side(cpu, 1.0, 0.05), "far": side(cpu, 1.0, 0, lambda: (9.0, 8.0))}
    found = cpu.row("case", "model", "fp32", sides, 3)
    assert found["ours"] > found["peers"]["peer"]["speed"] and found["peers"]["peer"]["ratio"] > 2
    assert found["repeats"] == 3
    # a side in another process brings its own seconds
    assert found["peers"]["far"]["speed"] == 11.1 and found["peers"]["far"]["cpu_s"] == 8.0


def test_shapes_are_those_of_the_anchors(cpu):
    millions = {
        name: sum(p.numel() for p in build(config, device="meta").parameters()) / 1e6
        for name, config in {**cpu.MODELS, "tiny": cpu.TINY}.items()
    }
    assert {name: round(count, 2) for name, count in millions.items()} == {
        "dense": 111.59,
        "moe": 236.76,
        "moelat": 242.06,
        "tiny": 2.76,
    }


def test_the_trial_is_the_same_model(cpu, scripts):
    """Every weight is copied, and loss and gradients are ours."""
    trial = scripts["trial"]
    model = build(cpu.TINY)
    with torch.no_grad():  # far from the values at which a mistake would not show
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)), alpha=0.05)
    copy = trial.copied(model)
    assert sum(p.numel() for p in copy.parameters()) == sum(p.numel() for p in model.parameters())
    tokens = random_tokens(2, 258, cpu.TINY.vocab_size)
    inputs, one, two = (tokens[:, d : 256 + d] for d in range(3))
    theirs = copy.loss(inputs, one, two)
    hidden = model.hidden(inputs)
    losses = [
        torch.nn.functional.cross_entropy(model.head(x).flatten(0, 1), targets.flatten())
        for x, targets in ((hidden, one), (model.mtp(hidden, one), two))
    ]
    ours = losses[0] + 0.2 * losses[1]
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=0)
    ours.backward()
    theirs.backward()
    for mine, other in ((model.lm_head, copy.head), (model.backbone.embeddings, copy.embedding)):
        far = (other.weight.grad - mine.weight.grad).norm() / mine.weight.grad.norm()
        assert far < 1e-4


def test_small_cases_run_from_end_to_end(cpu, tmp_path, monkeypatch):
    """transformers and ours in all three kinds, and the row of each."""
    model = tiny("dense", torch.float32)
    hub.save(model, tmp_path)
    monkeypatch.setitem(cpu.MODELS, "small", model.config)
    monkeypatch.setitem(cpu.CASES, "train", ("train 2x16",))
    monkeypatch.setitem(cpu.CASES, "prefill", ("prefill 40",))
    asked = argparse.Namespace(peers=["transformers"], repeat=1, threads=1)
    cases = ["train 2x16", "prefill 40", "decode b8"]
    found = list(cpu.Bench("small", "fp32", asked, None).rows(tmp_path, cases))
    assert [row["case"] for row in found] == ["prefill 40", "decode b8", "train 2x16"]
    for row in found:
        assert row["peers"]["transformers"]["apart"] < 1e-3 and row["ours"] > 0
        assert "transformers" in cpu.line(row)
    cpu.picture(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_memory_and_start_are_measured_in_processes_of_their_own(scripts, tmp_path):
    processes = scripts["cpu_processes"]
    tokenizer = Tokenizer.train([Path(__file__).read_text()], 300)
    hub.save(tiny("dense", torch.float32, vocab_size=tokenizer.vocab_size), tmp_path)
    tokenizer.save(tmp_path)
    asked = argparse.Namespace(threads=1, backend="auto")
    assert 50 < processes.peak("ours", "prefill", tmp_path, asked, 64) < 5000  # an interpreter with torch, in MiB
    # 1 attention layer x keys and values x 2 heads x 8 channels x 2 bytes
    assert processes.keys_and_values(hub.read_config(tmp_path)) == 64
    seconds, burnt = processes.first_token(tmp_path, 1)
    assert 0 < seconds < 300 and burnt > 0


def test_a_process_that_fails_is_a_red_row(scripts, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")  # and no model
    (row,) = scripts["cpu_processes"].rows("dense", tmp_path, ["start"], argparse.Namespace(repeat=1, threads=1))
    assert "ended with 2" in row["red"] and "seconds" not in row


def test_speeds_of_llama_cpps_own_tools_are_read(scripts):
    read = scripts["llamacpp"].tool_speed
    assert read(LLAMA_BENCH) == 1066.67  # the median of its samples
    assert read(BATCHED_BENCH) == 324.608368  # decoding, not the prompt


@pytest.mark.parametrize(
    ("line", "percent"),
    [("[36/143] Building CXX object", 25), ("[ 45%] Built target ggml", 45), ("warning: [1/2]", None), ("[x] y", None)],
)
def test_progress_of_a_build_is_read(scripts, line, percent):
    assert scripts["llamacpp"].progress(line) == percent


def test_a_machine_that_cannot_build_is_told_before_anything_is_fetched(scripts, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Refusal, match=r"cmake and a C\+\+ compiler"):
        scripts["llamacpp"].install(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


WIDE = {"hidden_size": 64, "head_dim": 32, "mamba_head_dim": 32, "ssm_state_size": 128, "n_groups": 2}
WIDE |= {"intermediate_size": 128, "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 96}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_llama_cpp_takes_turns_and_agrees(cpu, scripts, kind, tmp_path, monkeypatch):
    """With the build that the benchmark left in its cache: prefill and decoding, logits compared."""
    llamacpp = scripts["llamacpp"]
    built = llamacpp.installed()
    if built is None:
        pytest.skip(f"no llama.cpp in {llamacpp.CACHE}: python benchmarks/llamacpp.py builds it")
    model = tiny(kind, torch.float32, **WIDE, initializer_range=0.08, vocab_size=512)
    hub.save(model, tmp_path)
    monkeypatch.setitem(cpu.MODELS, "small", model.config)
    monkeypatch.setitem(cpu.CASES, "prefill", ("prefill 40",))
    asked = argparse.Namespace(peers=["llama.cpp"], repeat=2, threads=1)
    found = list(cpu.Bench("small", "bf16", asked, built).rows(tmp_path, ["prefill 40", "decode b8"]))
    for row in found:
        peer = row["peers"]["llama.cpp"]
        assert peer["apart"] < 5e-2 and peer["own_tool"] > 0 and peer["cpu_s"] > 0, json.dumps(row)
