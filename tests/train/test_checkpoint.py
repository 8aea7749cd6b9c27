"""Checkpoints that were damaged, are of another model, or no longer fit on the disk."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trimaran
from tests.models import tiny
from tests.train.runs import environment, read_recipe, write_recipe
from trimaran.errors import Refusal
from trimaran.train import checkpoint
from trimaran.train.loop import Run, fit
from trimaran.train.prepare import begin, prepare


def new_run(folder: Path, *overrides: str, **train: object) -> Run:
    recipe = read_recipe(folder, *overrides, **train)
    return begin(recipe, prepare(recipe))


def weights(run: Run) -> list[torch.Tensor]:
    return list(run.model.state_dict().values())


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, list[torch.Tensor]]:
    """A folder with a finished run whose checkpoints are all kept, and its final weights."""
    folder = tmp_path_factory.mktemp("done")
    run = new_run(folder, keep=9)
    assert fit(run) == 0
    return folder, weights(run)


@pytest.fixture
def copied(done, tmp_path) -> Path:
    shutil.copytree(done[0], tmp_path / "copy")
    return tmp_path / "copy"


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        os.truncate(path, path.stat().st_size - 7)
    elif how == "flipped":
        data = bytearray(path.read_bytes())
        data[-5] ^= 16
        path.write_bytes(data)
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


NAMES = ("model.safetensors", "training.safetensors", "checkpoint.json")
DAMAGE = [(name, how) for name in NAMES for how in ("truncated", "flipped", "empty", "missing")]
DAMAGE.remove(("checkpoint.json", "flipped"))  # it holds the checksums of the others and has none itself


@pytest.mark.parametrize(("name", "how"), DAMAGE)
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_taken(copied, done, name, how, capsys):
    damage(copied / "run" / "checkpoints" / "step-12" / name, how)
    run = new_run(copied, keep=9)
    assert fit(run) == 0
    out = capsys.readouterr().out
    assert f"step-12 is damaged: {name}" in out and "going on after step 8 of 12" in out
    assert all(torch.equal(one, other) for one, other in zip(weights(run), done[1], strict=True))
    assert checkpoint.check(copied / "run" / "checkpoints" / "step-12")[1] == ""


def test_all_damaged_is_refused_and_not_begun_anew(copied):
    for step in (4, 8, 12):
        damage(copied / "run" / "checkpoints" / f"step-{step}" / "model.safetensors", "truncated")
    with pytest.raises(Refusal, match=r"no usable checkpoint .*step-12 is damaged.*bytes instead of"):
        fit(new_run(copied, keep=9))


def test_a_model_whose_head_is_its_embedding_comes_back(tmp_path):
    """Its checkpoint repeats the embedding as the head, for transformers."""
    kept, other = (tiny("mamba", torch.float32, seed=seed, tie_embeddings=True) for seed in (0, 1))
    optimizers = [torch.optim.SGD(model.parameters()) for model in (kept, other)]
    checkpoint.save(tmp_path, 3, kept, optimizers[0], {"place": 7}, keep=1)
    assert checkpoint.restore(tmp_path, other, optimizers[1], print) == checkpoint.Saved(3, {"place": 7})
    pairs = zip(kept.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_latest_rolls_a_run_back(copied, done, capsys):
    (copied / "run" / "checkpoints" / "LATEST").write_text("step-4\n")
    run = new_run(copied, keep=9)
    assert fit(run) == 0
    assert "going on after step 4 of 12" in capsys.readouterr().out
    assert run.model.version == 1 + 8, "loading changes the weights too"
    assert all(torch.equal(one, other) for one, other in zip(weights(run), done[1], strict=True))


@pytest.mark.parametrize("text", ["", "step-", "nonsense"])
def test_without_a_pointer_the_highest_step_counts(copied, text):
    (copied / "run" / "checkpoints" / "LATEST").write_text(text)
    assert checkpoint.candidates(copied / "run" / "checkpoints") == [12, 8, 4]
    (copied / "run" / "checkpoints" / "LATEST").unlink()
    assert checkpoint.candidates(copied / "run" / "checkpoints") == [12, 8, 4]


def test_the_checkpoint_of_another_model_is_refused(copied):
    with pytest.raises(Refusal, match=r"of a model with pattern = 'ME\*E'.*pattern = 'ME\*-'"):
        fit(new_run(copied, "model.pattern='ME*-'", "model.mtp_pattern='*E'", keep=9))


def test_the_loader_of_other_settings_is_refused(copied):
    with pytest.raises(Refusal, match="saved position has seed = 0"):
        fit(new_run(copied, "seed=5", keep=9))


def test_the_newest_are_kept_and_left_overs_removed(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for name in (".saving-step-4", ".discarded-step-2"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"half")
    assert fit(new_run(tmp_path, checkpoint_every=2, keep=3)) == 0
    assert sorted(os.listdir(folder)) == ["LATEST", "step-10", "step-12", "step-8"]
    assert (folder / "LATEST").read_text() == "step-12\n"


FULL = """
set -e
mount -t tmpfs -o size=1900k tmpfs "$1/disk"
set +e
"$2" -m trimaran train "$1/recipe.toml" run="$1/disk/run" train.keep=9
echo "exit $?"
ls -A "$1/disk/run/checkpoints"; cat "$1/disk/run/checkpoints/LATEST"
mount -o remount,size=30m "$1/disk"
"$2" -m trimaran train "$1/recipe.toml" run="$1/disk/run" train.keep=9
echo "exit $?"
mkdir "$1/saved"; cp "$1/disk/run/model.safetensors" "$1/disk/run/config.json" "$1/saved"
"""


def test_a_full_disk_costs_the_attempt_and_no_more(tmp_path, done):
    """On a real small disk, in a mount namespace of its own."""
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("this system does not let a process mount a disk of its own")
    write_recipe(tmp_path)
    (tmp_path / "disk").mkdir()
    words = ["unshare", "-rm", "sh", "-c", FULL, "sh", str(tmp_path), sys.executable]
    told = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=120)
    first, second = told.stdout.split("exit ")[1:]
    assert first.split()[:5] == ["2", "LATEST", "step-4", "step-8", "step-8"], told.stdout
    refusals = [line for line in told.stderr.splitlines() if line.startswith("trimaran: ")]
    assert len(refusals) == 1 and "cannot write" in refusals[0] and "Traceback" not in told.stderr, told.stderr
    assert second.split()[0] == "0", told.stderr
    saved = trimaran.load(tmp_path / "saved").state_dict().values()
    assert all(torch.equal(one, other) for one, other in zip(saved, done[1], strict=True))
