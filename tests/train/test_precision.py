"""Low precision through the loop: a recipe is obeyed, a killed run ends with the same bits, no stage is silent."""

import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.runs import MODEL, WORDS, command, environment, read_recipe, start, write_recipe
from trimaran import config
from trimaran.errors import Refusal
from trimaran.model import hub
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import build
from trimaran.quant.linear import NarrowLinear
from trimaran.report import read_metrics
from trimaran.text.tokenizer import Tokenizer
from trimaran.train import pretrain, sft
from trimaran.train.loop import Run
from trimaran.train.prepare import begin, objective_of, optimizer_of, prepare
from trimaran.train.sft_recipe import SftRecipe


def finished(path: Path) -> Path:
    process = start(path)
    process.join(120)
    assert process.exitcode == 0, path.with_suffix(".log").read_text()
    return path.parent / "run"


def test_killed_and_resumed_is_uninterrupted(tmp_path):
    chosen = {"precision": "nvfp4", "formats": {"last": 1, "mxfp8": ["out_proj"]}, "accumulate": 2}
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    for folder in (whole, killed):
        folder.mkdir()
        write_recipe(folder, **chosen)
    expected = finished(whole / "recipe.toml")
    process = start(killed / "recipe.toml")
    latest = killed / "run" / "checkpoints" / "LATEST"
    while process.is_alive() and not latest.is_file():
        time.sleep(0.001)
    process.kill()
    process.join()
    found = finished(killed / "recipe.toml")
    assert "going on after step" in (killed / "recipe.log").read_text()
    tensors, others = (load_file(run / "model.safetensors") for run in (found, expected))
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
    trained = [one["loss"] for one in read_metrics(expected / "metrics.jsonl")]
    assert trained[-1] < trained[0]


def test_the_first_step_is_in_narrow_numbers(tmp_path):
    losses = {}
    for precision in ("fp32", "bf16", "fp8", "nvfp4"):
        (tmp_path / precision).mkdir()
        recipe = read_recipe(tmp_path / precision, precision=precision, steps=1)
        assert pretrain.main(recipe) == 0
        losses[precision] = read_metrics(tmp_path / precision / "run" / "metrics.jsonl")[0]["loss"]
    off = {precision: abs(loss / losses["fp32"] - 1) for precision, loss in losses.items()}
    assert 0 < off["bf16"] < off["fp8"] < 0.02 and 0 < off["nvfp4"] < 0.05


def test_settings_reach_the_maps(tmp_path):
    recipe = read_recipe(tmp_path, 'train.formats.high=["experts"]', precision="fp8", formats={"scaling": "blocks"})
    assert config.load(type(recipe), tmp_path / "recipe.toml").train.formats.scaling == "blocks"
    run = begin(recipe, prepare(recipe))
    names = {name: module.manner.name for name, module in run.model.named_modules() if isinstance(module, NarrowLinear)}
    assert set(names.values()) == {"fp8 in blocks"} and not any(".experts." in name for name in names)
    assert run.draws is not None


def test_a_stage_that_does_not_know_it_refuses(tmp_path):
    recipe = read_recipe(tmp_path, precision="nvfp4")
    run = begin(recipe, prepare(recipe))
    model, settings = run.model, recipe.train
    with pytest.raises(Refusal, match=r"precision = 'nvfp4'.*pretraining"):
        Run(tmp_path, settings, model, objective_of(settings, model), optimizer_of(settings, model), run.loader)


def test_fine_tuning_knows_it_and_adapters_are_refused(tmp_path):
    tokenizer = Tokenizer.train([" ".join(WORDS * 20)], 320)
    tokenizer.save(tmp_path / "start")
    hub.save(build(ModelConfig(**{**MODEL, "vocab_size": tokenizer.vocab_size})), tmp_path / "start")
    echo = {"task": "tests.train.test_sft:Echo", "count": 40}
    given = {
        "start": str(tmp_path / "start"),
        "run": str(tmp_path / "run"),
        "data": {"sequence_length": 64, "tasks": {"echo": echo}, "held_out": 0.1},
        "train": {"steps": 2, "batch_size": 4, "lr": 1e-3, "precision": "fp8", "router_bias_rate": 0},
    }
    assert sft.begin(SftRecipe(**given)).draws is not None
    with pytest.raises(Refusal, match="adapters"):
        sft.begin(SftRecipe(**given, lora={"rank": 2}))


def test_a_table_that_nobody_reads_is_refused(tmp_path):
    with pytest.raises(Refusal, match="formats beside precision = 'bf16'"):
        read_recipe(tmp_path, precision="bf16", formats={"last": 1})
    with pytest.raises(Refusal, match="hadamrd"):
        read_recipe(tmp_path, precision="nvfp4", formats={"hadamrd": False})


@pytest.mark.slow
@pytest.mark.parametrize("spread", [{"fsdp": 2}, {"fsdp": 2, "ep": 2}, {"cp": 2}, {"pp": 2}, {"tp": 2}], ids=str)
def test_spread_over_processes(tmp_path, spread):
    """Blocks of a row know nothing of other rows, so the first loss is that of one process; gradients round apart."""
    losses = {}
    for name, sizes in {"one": {}, "two": spread}.items():
        (tmp_path / name).mkdir()
        path = write_recipe(tmp_path / name, precision="fp8", formats={"scaling": "blocks"}, steps=3, eval_every=0)
        words = command(path, *(f"parallel.{axis}={size}" for axis, size in sizes.items()))
        subprocess.run(words, env=environment(), check=True, capture_output=True, timeout=240)
        losses[name] = [one["loss"] for one in read_metrics(tmp_path / name / "run" / "metrics.jsonl")]
    # A map that tp has cut has blocks and sums of its own.
    assert losses["two"][0] == pytest.approx(losses["one"][0], rel=2e-3 if "tp" in spread else 1e-5)
    assert losses["two"] == pytest.approx(losses["one"], rel=2e-2)
