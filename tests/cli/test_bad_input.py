"""Bad input at the real command line: one line that says what was found, what is allowed and what to do next; exit
code 2; nothing half-written."""

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.test_cli import run_main
from tests.models import tiny
from tests.train.runs import write_recipe
from trimaran.model import hub
from trimaran.text.tokenizer import Tokenizer


def refused(capsys, *words: object) -> str:
    """The one line with which the command line refuses `words`."""
    code, _, err = run_main(capsys, *map(str, words))
    assert code == 2, err
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("trimaran: "), err
    assert 0 < lines[0].index("; allowed: ") < lines[0].index("; next: "), err
    return lines[0]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.pattern=MEQ", ["'Q' at place 2", "M (Mamba-2)", "model"]),
        ("model.mtp_pattern=M", ["mtp_pattern has 'M'"]),
        ("model.num_key_value_heads=3", ["num_attention_heads = 4", "a multiple of num_key_value_heads = 3"]),
        ("model.n_groups=3", ["mamba_num_heads = 4", "a multiple of n_groups = 3"]),
        ("model.num_experts_per_tok=9", ["num_experts_per_tok = 9", "1 to 8"]),
        ("train.stepz=3", ["unknown key 'train.stepz'", "did you mean train.steps?"]),
        ("trian.steps=3", ["unknown key 'trian'", "did you mean train?"]),
        ("train.steps=many", ["train.steps = 'many'", "an integer"]),
        ('model.hidden_size="32"', ["model.hidden_size = '32'", "an integer"]),
        ("train.batch_size=true", ["train.batch_size = True", "an integer"]),
        ("data.path=nowhere.txt", ["no such file or folder", "nowhere.txt"]),
        ("data.path={empty}", ["empty", "UTF-8 text"]),
        ("data.path={binary}", ["NUL bytes", "UTF-8 text"]),
        ("data.path={hollow}", ["nothing to read in 'hollow'", "UTF-8 text"]),
        ("train.batch_size=400", ["shorter than one batch", "batch_size 400"]),
    ],
)
def test_training(override, named, capsys, tmp_path):
    recipe = write_recipe(tmp_path)
    places = {name: tmp_path / name for name in ("empty", "binary", "hollow")}
    places["empty"].touch()
    places["binary"].write_bytes(b"\x7fELF\0\0\xff")
    places["hollow"].mkdir()
    before = sorted(tmp_path.rglob("*"))
    line = refused(capsys, "train", recipe, override.format(**places))
    assert all(text in line for text in named), line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder that generate opens."""
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = Tokenizer.train(["a hull, a mast and a sail"] * 3, vocab_size=300)
    tokenizer.save(folder)
    hub.save(tiny("latent", torch.float32, vocab_size=tokenizer.vocab_size), folder)
    return folder


def no_config(folder):
    (folder / "config.json").unlink()


def truncated(folder):
    weights = (folder / hub.WEIGHTS).read_bytes()
    (folder / hub.WEIGHTS).write_bytes(weights[: len(weights) // 2])


def corrupt(folder):
    weights = (folder / hub.WEIGHTS).read_bytes()
    (folder / hub.WEIGHTS).write_bytes(weights[:20] + bytes(20) + weights[40:])


def another_architecture(folder):
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def another_width(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mamba_head_dim": 16}))


def another_letter(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layers_block_type": ["mamba", "conv", "moe", "moe"]}))


def a_tensor_too_many(folder):
    tensors = load_file(folder / hub.WEIGHTS)
    save_file({**tensors, "backbone.layers.0.mixer.spare": torch.zeros(3)}, folder / hub.WEIGHTS)


def a_larger_vocabulary(folder):
    Tokenizer.train(["ab abc abcd abcde"] * 9, vocab_size=400).save(folder)
    hub.save(tiny("latent", torch.float32, vocab_size=200), folder)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (no_config, ["no config.json in", "a folder with config.json and safetensors"]),
        (truncated, ["model.safetensors is truncated or corrupt", "whole safetensors"]),
        (corrupt, ["model.safetensors is truncated or corrupt", "whole safetensors"]),
        (another_architecture, ["model_type 'gpt2'", "nemotron_h"]),
        (another_width, ["tensors misshapen", "in_proj.weight is ["]),
        (another_letter, ["layers_block_type names 'conv'", "mamba"]),
        (a_tensor_too_many, ["1 tensors unexpected: backbone.layers.0.mixer.spare"]),
        (a_larger_vocabulary, ["token id 2", "0 to 199", "this model's own tokenizer"]),
    ],
)
def test_folders(spoil, named, capsys, tmp_path, whole):
    folder = tmp_path / "folder"
    shutil.copytree(whole, folder)
    spoil(folder)
    line = refused(capsys, "generate", folder, "a sail", "max_tokens=2")
    assert all(text in line for text in named), line
    assert run_main(capsys, "generate", str(whole), "a sail", "max_tokens=2")[0] == 0


def test_a_real_process(tmp_path):
    """The same from outside: an exit code, one line on stderr, nothing on stdout."""
    command = [sys.executable, "-m", "trimaran", "show", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == (
        f"trimaran: no config.json in {tmp_path}; allowed: a folder with config.json and safetensors; "
        "next: check the path\n"
    )


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))


def test_a_disk_that_fills_up(tmp_path):
    """A limit on file sizes stands in for the disk; tests/train has a real one."""
    recipe = write_recipe(tmp_path, steps=4)
    command = [sys.executable, "-m", "trimaran", "train", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=limit_files)
    line = ran.stderr.splitlines()[-1]
    assert ran.returncode == 2 and line.startswith("trimaran: cannot write "), ran.stderr
    assert "; allowed: " in line and "; next: free some space" in line
    assert not list((tmp_path / "run" / "checkpoints").glob("*step*"))
