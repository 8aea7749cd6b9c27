"""Where a stack is cut into stages: as even as any cut, in whole layers."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models import KINDS, tiny_config
from trimaran.errors import Refusal
from trimaran.model.presets import preset
from trimaran.model.size import count
from trimaran.parallel.stages import balanced, costs, stages


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.data())
def test_no_cut_has_a_cheaper_slowest_part(work, data):
    number = data.draw(st.integers(1, len(work)))

    def weighed(borders):
        parts = [sum(work[start:stop]) for start, stop in pairwise(borders)]
        return max(parts), sum(part**2 for part in parts)

    found = balanced(work, number)
    assert found[0] == 0 and found[-1] == len(work) and len(found) == number + 1
    assert all(start < stop for start, stop in pairwise(found))
    every = ([0, *inner, len(work)] for inner in combinations(range(1, len(work)), number - 1))
    assert weighed(found) == min(map(weighed, every))


@pytest.mark.parametrize("context", [0, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_costs_add_up_to_the_model(kind, context):
    config = tiny_config(kind, mtp_pattern="")
    blocks, end = costs(config, context)
    assert sum(blocks) + end == count(config).flops_per_token(context)


def test_a_draft_block_weighs_on_the_last_stage():
    plain, drafting = (tiny_config("dense", mtp_pattern=mtp, mtp_depth=2) for mtp in ("", "*-"))
    (blocks, head), (same, end) = costs(plain, 10), costs(drafting, 10)
    width = plain.hidden_size
    assert blocks == same
    assert end == head + 2 * (blocks[3] + blocks[4] + 4 * width**2 + head)
    assert len(stages(drafting, 2, 10)[1]) < len(stages(plain, 2, 10)[1])


def test_a_large_preset_is_even():
    config = preset("super-3")
    cut = stages(config, 4, context=4096)
    assert [layer for part in cut for layer in part] == list(range(len(config.pattern)))
    blocks, end = costs(config, 4096)
    sums = [sum(blocks[layer] for layer in part) for part in cut]
    sums[-1] += end
    assert max(sums) < 1.15 * sum(sums) / 4


def test_more_stages_than_layers_are_refused():
    assert stages(tiny_config("mamba"), 2) == (range(1), range(1, 2))
    with pytest.raises(Refusal, match="at most 2 stages"):
        stages(tiny_config("mamba"), 3)
