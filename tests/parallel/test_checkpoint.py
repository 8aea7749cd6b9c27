"""A run that changes its number of processes on the way ends where one that did not ends."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import trimaran
from tests.parallel.spread import check_near, finish
from tests.train.runs import write_recipe
from trimaran import cli
from trimaran.errors import Refusal
from trimaran.train import checkpoint

# 12 rows: to be dealt out to 1, 2, 3 and 4. Adam's first steps divide by gradients that are rounding alone: eps.
STEPS = {"steps": 6, "checkpoint_every": 3, "keep": 9, "batch_size": 12, "eps": 1e-5, "lr": 1e-3}
NEAR = 1e-5


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Processes -> the folder of a recipe that they carried out."""
    folders = {}
    for size in (1, 4):
        folders[size] = tmp_path_factory.mktemp(f"on-{size}")
        finish(write_recipe(folders[size], **STEPS), size)
    return folders


def taken_back(source: Path, folder: Path) -> Path:
    """A copy of a finished run that has only come to step 3; the path of its recipe."""
    path = write_recipe(folder, **STEPS)
    shutil.copytree(source / "run", folder / "run")
    for name in ("result.json", "model.safetensors", "recipe.toml"):
        (folder / "run" / name).unlink()
    shutil.copy(path, folder / "run" / "recipe.toml")
    checkpoint.point(folder / "run" / "checkpoints", "step-3")
    return path


@pytest.mark.parametrize(("saved", "read"), [(4, 1), (4, 2), (4, 3), (1, 2)])
def test_saved_on_some_and_read_on_others(whole_runs: dict[int, Path], tmp_path: Path, saved: int, read: int) -> None:
    run = finish(taken_back(whole_runs[saved], tmp_path), read)
    assert "going on after step 3" in "".join(log.read_text() for log in tmp_path.glob("*.log"))
    check_near(run, whole_runs[1] / "run", NEAR)
    manifest = json.loads((run / "checkpoints" / "step-6" / "checkpoint.json").read_text())
    assert manifest["format"] == (checkpoint.FORMAT if read == 1 else checkpoint.SHARDED)


def test_four_processes_end_where_one_does(whole_runs: dict[int, Path]) -> None:
    check_near(whole_runs[4] / "run", whole_runs[1] / "run", NEAR)


def test_a_checkpoint_in_pieces_is_exported(whole_runs: dict[int, Path], tmp_path: Path) -> None:
    run, out = whole_runs[4] / "run", tmp_path / "out"
    with pytest.raises(Refusal, match=r"in pieces.*convert --export"):
        trimaran.load(run / "checkpoints" / "step-6")
    for source in (run, run / "checkpoints" / "step-3"):
        assert cli.convert(str(source), ["shard_bytes=100000"], str(out), export=True, merge=False) == 0
        assert len(list(out.glob("model-*.safetensors"))) > 1
        ours, theirs = trimaran.load(out).state_dict(), trimaran.load(run).state_dict()
        equal = all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert equal == (source == run)
        assert trimaran.load_tokenizer(out).vocab_size == 320
        shutil.rmtree(out)
    with pytest.raises(Refusal, match="has no checkpoint"):
        cli.convert(str(tmp_path), [], str(out), export=True, merge=False)


def test_nothing_in_a_checkpoint_is_a_pickle(whole_runs: dict[int, Path]) -> None:
    files = [path.name for path in (whole_runs[4] / "run" / "checkpoints" / "step-3").iterdir()]
    assert {path.rpartition(".")[2] for path in files} == {"json", "safetensors", "jinja"}, files
