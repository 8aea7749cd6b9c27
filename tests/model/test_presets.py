"""Published sizes, to the unit where a source gives the unit."""

import pytest

from trimaran.errors import Refusal
from trimaran.model.config import ModelConfig
from trimaran.model.presets import PRESETS, SIZE, UNITS, preset, sized
from trimaran.model.size import ShapeOnly, count

# Parameters with the draft block. Checkpoint cards and hub pages; the Nemotron-H and v2 rows round to their reports'.
TOTALS = {
    "nemotron-h-8b": 8_100_852_736,
    "nemotron-h-47b": 46_791_554_816,
    "nemotron-h-56b": 56_324_350_464,
    "nano-12b-v2": 12_310_001_152,
    "nano-9b-v2": 8_888_227_328,
    "nano-3": 31_577_940_288,
    "super-3": 123_611_033_088,
    "ultra-3": 560_524_603_904,
    "lightning-3.5": 32_913_266_240,
    "qwen3-30b-a3b": 30_532_122_624,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "deepseek-v3": 682_636_487_424,
    "kimi-k2": 1_026_408_232_448,
}
# name -> (billions reported, is the input table counted?)
ACTIVE = {
    "nano-3": (3.6, True),
    "super-3": (12.8, True),
    "qwen3-30b-a3b": (3.3, True),
    "gpt-oss-20b": (3.61, False),
    "gpt-oss-120b": (5.13, False),
    "deepseek-v3": (37, False),
    "kimi-k2": (32, False),
}


def test_every_preset_is_here():
    assert set(TOTALS) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_totals(name):
    assert count(preset(name)).total == TOTALS[name]


def test_checkpoint_tensors():
    names = ("super-3", "lightning-3.5", "llama3-8b", "qwen3-30b-a3b", "gpt-oss-20b")
    assert [count(preset(name)).tensors for name in names] == [42683, 6513, 291, 18867, 411]


def test_trunk_without_draft_block():
    assert count(preset("super-3")).main == 120_668_707_840
    assert count(preset("deepseek-v3")).main == 671_026_419_200
    assert count(preset("lightning-3.5")).main == TOTALS["nano-3"]


@pytest.mark.parametrize("name", ACTIVE)
def test_active(name):
    sizes, (reported, with_table) = count(preset(name)), ACTIVE[name]
    active = sizes.active if with_table else sizes.active - sizes.embedding
    assert active / 1e9 == pytest.approx(reported, rel=0.02)


def test_names():
    assert isinstance(preset("nano-3"), ModelConfig) and isinstance(preset("kimi-k2"), ShapeOnly)
    assert preset("trimaran.model.presets:nano_3") == preset("nano-3")
    assert preset("2m") == sized("2m")[0]
    with pytest.raises(Refusal, match="nano-3"):
        preset("nano3")
    with pytest.raises(Refusal, match="dict"):
        preset("trimaran.model.presets:UNITS")
    with pytest.raises(Refusal, match="no_such"):
        preset("trimaran.model.presets:no_such")


@pytest.mark.parametrize("size", ["300k", "500k", "1m", "2m", "4m", "20m", "100m", "300m", "1b", "1.5b", "8b", "30b"])
def test_the_dial(size):
    config, arithmetic = sized(size)
    match = SIZE.fullmatch(size)
    assert match is not None
    total = count(config).total
    assert total / (float(match[1]) * UNITS[match[2]]) == pytest.approx(1, abs=0.3)
    assert f"{total:,}" in arithmetic and f"D = {config.hidden_size}" in arithmetic
    for place, letter in enumerate(config.pattern):  # the family's rules of construction
        if letter == "*":
            assert config.pattern[place - 1] == "M" and config.pattern[place + 1] == "E"
    assert config.pattern[0] == "M" and config.pattern[-1] == "E" and config.moe_latent_size


@pytest.mark.parametrize("size", ["2", "m", "2 m", "1k", "900000b", "-2m"])
def test_the_dial_refuses(size):
    with pytest.raises(Refusal):
        sized(size)


def test_a_large_vocabulary_leaves_less_for_the_rest():
    assert sized("20m", vocab_size=32768)[0].hidden_size < sized("20m")[0].hidden_size
