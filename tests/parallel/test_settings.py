"""Sizes that do not fit are refused before any process is asked."""

from pathlib import Path

import pytest
import torch

from tests.train.runs import read_recipe
from trimaran.errors import Refusal
from trimaran.parallel.settings import ParallelSettings
from trimaran.parallel.world import join
from trimaran.train.sft_recipe import SftRecipe


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ({"ep": 3, "fsdp": 2}, "parallel.ep = 3"),
        ({"ep": 2}, "parallel.ep = 2"),
        ({"micro_batches": 4}, "without a pipeline"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], found: str) -> None:
    with pytest.raises(Refusal, match=found):
        ParallelSettings(**sizes)


def test_experts_are_dealt_out_over_all_shards() -> None:
    settings = ParallelSettings(fsdp=2, cp=2, tp=3, ep=6, pp=2, replicate=5)
    assert (settings.world, settings.shards, settings.rows) == (120, 12, 10)


def test_one_process_needs_no_group() -> None:
    world = join(ParallelSettings(), torch.device("cpu"))
    assert world.alone and world.first and world.place["row"] == 0


def test_the_number_of_processes_is_the_layouts() -> None:
    with pytest.raises(Refusal, match="1 processes for pp 1 x replicate 1 x fsdp 2 x cp 1 x tp 1"):
        join(ParallelSettings(fsdp=2), torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"parallel.fsdp": "3"}, "4 rows of 32 in a step"),
        ({"parallel.pp": "3"}, "4 rows of 32 in a step; allowed: a multiple of replicate x fsdp x micro_batches = 6"),
        ({"parallel.tp": "3"}, "rows of 32; allowed: a multiple of cp x tp = 3"),
        ({"parallel.fsdp": "2", "data.mixture.phases": "[{lengths = [{sequence_length = 128}]}]"}, "1 rows of 128"),
        ({"parallel.tp": "2", "train.optimizer": "'muon'"}, "muon"),
    ],
)
def test_recipes_that_cannot_be_spread(changes: dict[str, str], found: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=found):
        read_recipe(tmp_path, *(f"{key}={value}" for key, value in changes.items()))


def test_other_stages_have_no_such_table() -> None:
    given = {"run": "runs/x", "start": "runs/y", "data": {"path": "a.jsonl"}, "train": {"steps": 1, "lr": 1e-3}}
    with pytest.raises(Refusal, match=r"unknown key .parallel."):
        SftRecipe(**given, parallel={"fsdp": 2})
