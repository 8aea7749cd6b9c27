"""Sizes that do not fit are refused before any process is asked."""

import pytest
import torch

from trimaran.errors import Refusal
from trimaran.parallel.settings import ParallelSettings
from trimaran.parallel.world import join


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
