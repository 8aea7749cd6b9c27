"""The pruned search finds exactly what trying everything finds, and says why the rest fell out."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan.small import job, machine
from trimaran.errors import Refusal
from trimaran.plan.costs import Costs
from trimaran.plan.hardware import Reach
from trimaran.plan.memory import Room
from trimaran.plan.practice import Practice
from trimaran.plan.search import DOMINATED, NEED, SLOW, Found, everything, recomputations, search, spaces

PATTERNS = ("M*", "ME*E", "*-*-", "ME", "R-R-R-")


@st.composite
def small_jobs(draw):
    """Jobs whose spaces are small, with memory from far too little to plenty, and links from slow to fast."""
    pattern = draw(st.sampled_from(PATTERNS))
    reach = Reach(
        launch=draw(st.sampled_from([0.0, 1e-6, 1e-4])),
        step=0.0,
        tile=draw(st.sampled_from([1, 16])),
        slowed_compute=draw(st.sampled_from([1.0, 1.3])),
        slowed_link=draw(st.sampled_from([1.0, 1.5])),
    )
    hardware = machine(
        memory=draw(st.sampled_from([4e5, 1e6, 2e6, 4e6, 1e7, 1e9])),
        link=draw(st.sampled_from([1e8, 4e9])),
        network=draw(st.sampled_from([5e7, 1e9])),
        domain=draw(st.sampled_from([1, 2, 8])),
        reach=reach,
    )
    practice = Practice(
        shards_weights=draw(st.booleans()),
        hides_data=draw(st.booleans()),
        hides_tensor=draw(st.booleans()),
        hides_experts=draw(st.booleans()),
        hides_pipeline=draw(st.booleans()),
        sequence_parallel=draw(st.booleans()),
    )
    mtp = draw(st.sampled_from(["", "*", "*E"] if "E" in pattern else [""]))
    rows = draw(st.sampled_from([1, 2, 4]))
    return job(pattern, rows=rows, sequence=draw(st.sampled_from([16, 48])), practice=practice, hardware=hardware,
               mtp_pattern=mtp), draw(st.sampled_from([1, 2, 3, 4, 6]))  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True)
@given(small_jobs(), st.integers(1, 4))
def test_the_search_finds_what_trying_everything_finds(case, keep):
    asked, gpus = case
    wanted = everything(asked, gpus, keep)
    if not wanted:
        with pytest.raises(Refusal):
            search(asked, gpus, keep)
        return
    found = search(asked, gpus, keep)
    assert [plan.key for plan in found.plans] == [plan.key for plan in wanted]


def test_every_layout_is_accounted_for():
    """What was looked at and what fell out add up to the space."""
    asked = job(rows=8, hardware=machine(memory=2e6))
    found = search(asked, 8)
    legal = list(spaces(asked, 8, Found()))
    variants = sum(len(batches) for _, batches in legal) * len(recomputations(asked.config.pattern))
    dropped = sum(found.fell[reason] for reason in (NEED, SLOW, DOMINATED))
    assert found.looked_at + dropped == variants
    assert found.looked_at < variants / 2
    assert set(found.examples) == set(found.fell)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_memory_grows_with_the_batch_and_shrinks_with_recomputation(pattern):
    asked = job(pattern, rows=24, mtp_pattern="*")
    room = Room(Costs(asked))
    for layout, batches in spaces(asked, 8, Found()):
        sizes = [room.needed(replace(layout, micro_batch=batch)).total for batch in batches]
        assert sizes[:-1] == sorted(sizes[:-1])  # with one micro-batch alone, gradients need not lie whole
        for letters in recomputations(pattern):
            for more in recomputations(pattern):
                if set(letters) < set(more):
                    less = room.needed(replace(layout, recompute=more)).total
                    assert less <= room.needed(replace(layout, recompute=letters)).total


def test_bounds_are_below_the_time():
    for pattern in PATTERNS:
        asked = job(pattern, rows=12)
        costs = Costs(asked)
        for layout, batches in spaces(asked, 6, Found()):
            for batch in batches:
                one = replace(layout, micro_batch=batch, recompute=pattern[0])
                assert costs.computing(layout) <= costs.bound(replace(one, recompute="")) * (1 + 1e-9)
                assert costs.bound(one) <= costs.step(one).total * (1 + 1e-9)


def test_a_model_that_fits_nowhere_says_by_how_much_and_what_helps():
    with pytest.raises(Refusal) as refused:
        search(job(hardware=machine(memory=1e5)), 4)
    assert "no layout fits on 4 x small: the closest, " in refused.value.found
    assert "GB a device too large" in refused.value.found
    assert "--gpus" in refused.value.next_step and "--hardware" in refused.value.next_step


def test_a_number_of_devices_that_nothing_divides():
    with pytest.raises(Refusal, match="no legal layout for 7 devices"):
        search(job("*", rows=1, sequence=16), 7)
