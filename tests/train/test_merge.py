"""Merged checkpoints: the identity they rest on, the coefficients, the command, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import trimaran
from tests.models import tiny
from tests.train.runs import read_recipe
from trimaran import cli
from trimaran.errors import Refusal
from trimaran.model.hybrid import HybridModel
from trimaran.text.tokenizer import Tokenizer
from trimaran.train import checkpoint, merge
from trimaran.train.loop import Run, fit
from trimaran.train.merge import coefficients, decay_weights, shares_of
from trimaran.train.prepare import begin, prepare

PROFILES = ("minus_sqrt", "linear", "cosine", "exponential", "uniform")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["wind sail rope mast"] * 4, 300)


def drift(model: HybridModel, seed: int) -> None:
    """What a stretch of training does, as far as merging can tell: all of the state moves, buffers too."""
    chance = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        tensor.add_(torch.randn(tensor.shape, generator=chance).to(tensor), alpha=0.1)


def save(folder: Path, step: int, model: HybridModel, tokenizer: Tokenizer) -> Path:
    return checkpoint.save(folder, step, model, torch.optim.SGD(model.parameters()), {}, keep=99, tokenizer=tokenizer)


@pytest.fixture
def states(tmp_path, tokenizer) -> tuple[list[Path], list[dict[str, torch.Tensor]]]:
    """Five checkpoints in fp64 of a model with a draft block and balancing biases, and what they hold."""
    model, folders, held = tiny("latent", torch.float64), [], []
    for step in range(5):
        drift(model, step)
        folders.append(save(tmp_path / "run" / "checkpoints", 10 * step, model, tokenizer))
        held.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return folders, held


@pytest.mark.parametrize("profile", PROFILES)
def test_a_merge_is_a_run_whose_updates_were_scaled(states, tmp_path, profile):
    folders, held = states
    merge.merge(folders, tmp_path / "merged", profile)
    found = trimaran.load(tmp_path / "merged", dtype=torch.float64).state_dict()
    weights = decay_weights(profile, 4)
    assert any(name.startswith("mtp.") for name in found) and any("correction_bias" in name for name in found)
    for name, tensor in found.items():
        expected = held[0][name].clone()
        for i, weight in enumerate(weights, 1):
            expected -= weight * (held[i - 1][name] - held[i][name])
        assert tensor.dtype == torch.float64
        assert (tensor - expected).abs().max() < 1e-12


def test_many_shards_hold_what_one_file_does(states, tmp_path):
    folders, _ = states
    merge.merge(folders, tmp_path / "one")
    merge.merge(folders, tmp_path / "many", shard_bytes=4096)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (trimaran.load(tmp_path / name, dtype=torch.float64).state_dict() for name in ("one", "many"))
    assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())


def test_halves_are_summed_above_their_own_precision(tmp_path, tokenizer):
    model = tiny("latent", torch.bfloat16)
    folders, held = [], []
    for step in (1, 2, 3):
        drift(model, step)
        folders.append(save(tmp_path, step, model, tokenizer))
        held.append({name: tensor.double() for name, tensor in model.state_dict().items()})
    merge.merge(folders, tmp_path / "merged", "uniform")
    for name, tensor in trimaran.load(tmp_path / "merged").state_dict().items():
        mean = sum(one[name] for one in held) / 3
        assert tensor.dtype == torch.float32 and (tensor - mean).abs().max() < 1e-7 * max(1, mean.abs().max())


def test_a_tied_model_is_merged(tmp_path, tokenizer):
    model, folders = tiny("mamba", torch.float32, tie_embeddings=True), []
    for step in (1, 2):
        drift(model, step)
        folders.append(save(tmp_path, step, model, tokenizer))
    merge.merge(folders, tmp_path / "merged", "uniform")
    merged = trimaran.load(tmp_path / "merged")
    pair = [trimaran.load(folder).backbone.embeddings.weight for folder in folders]
    torch.testing.assert_close(merged.backbone.embeddings.weight, (pair[0] + pair[1]) / 2)


# coefficients


GOLDEN = {
    ("uniform", 4): [0.25, 0.25, 0.25, 0.25],
    ("linear", 4): [0.25, 0.25, 0.25, 0.25],
    ("minus_sqrt", 4): [0.5, math.sqrt(0.5) - 0.5, math.sqrt(0.75) - math.sqrt(0.5), 1 - math.sqrt(0.75)],
    ("cosine", 3): [0.25, 0.5, 0.25],
    ("exponential", 2): [2 - math.sqrt(2), math.sqrt(2) - 1],
}


@pytest.mark.parametrize(("profile", "count"), GOLDEN)
def test_golden_coefficients(profile, count):
    assert coefficients(profile, count) == pytest.approx(GOLDEN[profile, count], abs=1e-15)


@given(st.sampled_from(PROFILES), st.integers(2, 200))
def test_coefficients_are_shares(profile, count):
    found = coefficients(profile, count)
    assert len(found) == count and min(found) > 0 and math.isclose(sum(found), 1, abs_tol=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_shares_are_the_inverse_of_tail_sums(drawn):
    weights = sorted(drawn, reverse=True)
    found = shares_of(weights)
    assert min(found) >= 0 and sum(found) == pytest.approx(1)
    assert [sum(found[i:]) for i in range(1, len(found))] == pytest.approx(weights, abs=1e-12)


# the command, on a real run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Twelve steps at a constant learning rate, a checkpoint every second one, six of them kept."""
    folder = tmp_path_factory.mktemp("constant")
    recipe = read_recipe(folder, warmup=0.0, decay=0.0, checkpoint_every=2, keep=6)
    done = begin(recipe, prepare(recipe))
    assert fit(done) == 0
    return done


def convert(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(["convert", *words])
    return int(left.value.code or 0)


def test_the_command_merges_the_last_checkpoints(run, tmp_path, capsys):
    out = tmp_path / "merged"
    assert convert("--merge", str(run.folder), str(out), "last=3", "profile=cosine") == 0
    told = capsys.readouterr().out
    assert "0.50000  " in told and "step-8" in told and "the learning rate fell" not in told
    record = json.loads((out / "merge.json").read_text())
    assert [Path(name).name for name in record["checkpoints"]] == ["step-8", "step-10", "step-12"]
    assert list(record["checkpoints"].values()) == coefficients("cosine", 3)
    pieces = [trimaran.load(folder).state_dict() for folder in record["checkpoints"]]
    for name, tensor in trimaran.load(out).state_dict().items():
        whole = sum(
            share * piece[name].double() for share, piece in zip(coefficients("cosine", 3), pieces, strict=True)
        )
        torch.testing.assert_close(tensor.double(), whole, rtol=1e-6, atol=1e-8)
    text = "sea hull mast"
    assert trimaran.load_tokenizer(out).encode(text) == run.tokenizer.encode(text)


def test_checkpoints_of_a_decay_are_said_to_be_that(tmp_path, capsys):
    recipe = read_recipe(tmp_path, decay=0.8, keep=6, steps=6, checkpoint_every=2)
    assert fit(begin(recipe, prepare(recipe))) == 0
    assert convert("--merge", recipe.run, str(tmp_path / "merged")) == 0
    assert "the learning rate fell from 1.7e-03 to 3.2e-04" in capsys.readouterr().out


def test_all_that_was_kept_is_merged_where_nothing_is_said(run, tmp_path):
    assert convert("--merge", str(run.folder), str(tmp_path / "merged")) == 0
    assert len(json.loads((tmp_path / "merged" / "merge.json").read_text())["checkpoints"]) == 6


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["steps=[4, 6, 13]"], ["no checkpoint of step 13", "2, 4, 6, 8, 10, 12", "train.keep"]),
        (["last=9"], ["6 checkpoints to merge", "at least 9", "train.keep=9"]),
        (["steps=[4]"], ["1 checkpoints to merge", "at least 2"]),
        (["last=1"], ["last = 1", ">= 2"]),
        (["steps=[2, 4, 12]"], ["at steps 2, 4, 12", "equal distances"]),
        (["steps=[8, 4]"], ["steps = [8, 4]", "rising"]),
        (["steps=[8, 10]", "last=2"], ["last beside steps"]),
        (["profile=sqrt"], ["profile = 'sqrt'", "'minus_sqrt'"]),
    ],
)
def test_what_cannot_be_merged_is_refused(run, tmp_path, capsys, words, told):
    assert convert("--merge", str(run.folder), str(tmp_path / "out"), *words) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in told), said
    assert not (tmp_path / "out").exists()


def test_uneven_checkpoints_have_a_mean(run, tmp_path):
    assert convert("--merge", str(run.folder), str(tmp_path / "out"), "steps=[2, 4, 12]", "profile=uniform") == 0


def test_no_run_no_place_and_no_switch_are_refused(run, tmp_path, capsys):
    assert convert("--merge", str(tmp_path), str(tmp_path / "out")) == 2
    assert convert("--merge", str(run.folder)) == 2
    assert convert(str(run.folder), str(tmp_path / "out")) == 2
    assert convert("--merge", str(run.folder), str(run.folder)) == 2
    told = capsys.readouterr().err.splitlines()
    for line, words in zip(told, ("0 checkpoints", "RUN OUT", "no switch", "holds something already"), strict=True):
        assert words in line


def test_other_architectures_adapters_and_damage_are_refused(run, tmp_path, tokenizer):
    folders = [Path(shutil.copytree(run.checkpoints / f"step-{step}", tmp_path / f"step-{step}")) for step in (2, 4, 6)]
    other = save(tmp_path / "other", 2, tiny("latent", torch.float32), tokenizer)
    with pytest.raises(Refusal, match="has vocab_size = 97; allowed: 320"):
        merge.merge([folders[0], other], tmp_path / "out")
    with pytest.raises(Refusal, match="at least 2"):
        merge.merge(folders[:1], tmp_path / "out")
    (folders[1] / "adapter_config.json").write_text("{}")
    with pytest.raises(Refusal, match="adapters alone"):
        merge.merge(folders[:2], tmp_path / "out")
    with (folders[2] / "model.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\xff\xff\xff")
    with pytest.raises(Refusal, match=r"damaged.*checksum"):
        merge.merge([folders[0], folders[2]], tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
