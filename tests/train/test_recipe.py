"""Recipes of pretraining: the short ways to a model, and what is refused."""

import pytest

from tests.train.runs import MODEL
from trimaran import config
from trimaran.errors import Refusal
from trimaran.model.presets import preset, sized
from trimaran.train.recipe import PretrainRecipe

PLAIN = {
    "run": "runs/x",
    "model": MODEL,
    "data": {"path": "notes"},
    "train": {"steps": 10, "lr": 1e-3},
}


def recipe(*overrides: str, **tables: object) -> PretrainRecipe:
    return PretrainRecipe(**config.override({**PLAIN, **tables}, overrides))


def test_a_size_is_spelt_out():
    made = recipe("tokenizer.vocab_size=512", model={"size": "200k"})
    assert made.model.model() == sized("200k", 512)[0] and made.model.size is None
    assert recipe(model={"size": "200k", "mtp_pattern": ""}).model.mtp_pattern == ""


def test_a_preset_is_spelt_out_with_the_tokenizers_vocabulary():
    made = recipe(model={"preset": "nano-3", "mtp_pattern": "*E"})
    assert made.model.model() == preset("nano-3").replace(vocab_size=2048, mtp_pattern="*E")


def test_the_resolved_recipe_reads_the_same(tmp_path):
    made = recipe("data.sources.a=b", "train.clip=none", model={"size": "200k"}, data={})
    config.write(made, tmp_path / "recipe.toml")
    assert config.load(PretrainRecipe, tmp_path / "recipe.toml") == made


def test_the_schedule_comes_in_steps():
    schedule = recipe("train.steps=1000", "train.warmup=0.03", "train.decay=0.2").train.schedule()
    assert (schedule.warmup, schedule.decay, schedule.steps) == (30, 200, 1000)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.stepz=3"], ["unknown key 'train.stepz'", "did you mean train.steps?"]),
        (["model.sise=2m"], ["unknown key 'model.sise'", "did you mean model.size?"]),
        (["model.size=2m"], ["model: size = '2m' beside hidden_size", "remove hidden_size"]),
        (["model.pattern=MQ"], ["'Q' at place 1"]),
        (["model.vocab_size=99"], ["model.vocab_size = 99", "tokenizer.vocab_size = 2048"]),
        (["data.path=none"], ["no text to learn from", "data.path=FILE_OR_FOLDER"]),
        (["data.sources.a=b"], ["both path and sources"]),
        (["data.source=stdlib"], ["path beside source"]),
        (["data.held_out=1"], ["data.held_out = 1", "< 1"]),
        (["train.warmup=0.9", "train.decay=0.2"], ["warmup 0.9 + decay 0.2", "at most 1"]),
        (["train.accumulate=9"], ["accumulate = 9", "batch_size = 8"]),
        (["train.min_lr=1"], ["min_lr = 1.0", "lr = 0.001"]),
        (["train.steps=0"], ["train.steps = 0", "> 0"]),
        (["train.precision=fp16"], ["'bf16' or 'fp8' or 'fp32' or 'nvfp4'"]),
        (["train.decay_shape=sqrt"], ["'minus_sqrt'"]),
    ],
)
def test_mistakes_are_named(overrides, words):
    with pytest.raises(Refusal) as problem:
        recipe(*overrides)
    assert all(word in str(problem.value) for word in words), str(problem.value)


def test_both_short_ways_or_a_model_without_layers_are_refused():
    with pytest.raises(Refusal, match="beside preset"):
        recipe(model={"size": "2m", "preset": "nano-3"})
    with pytest.raises(Refusal, match="shape-only"):
        recipe(model={"preset": "deepseek-v3"})
    with pytest.raises(Refusal, match=r"unknown model.*nano-3"):
        recipe(model={"preset": "nano3"})
    with pytest.raises(Refusal, match=r"model\.pattern"):
        recipe(model={"hidden_size": 32})
