"""Exact shares of environments, and prompts near the pass-rate aimed at."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimaran.errors import Refusal
from trimaran.rl.curriculum import Curriculum, apportioned
from trimaran.rl.recipe import CurriculumSettings, Environment
from trimaran.rl.rollout import Rollout

ONE = {"one": Environment(task="t")}


def curriculum(prompts: int = 16, steps: int = 11, environments: dict | None = None, **settings) -> Curriculum:
    return Curriculum(CurriculumSettings(**settings), environments or ONE, prompts, 0, steps)


def rollout(number: int, reward: float, sample: int = 0, group: int = 0) -> Rollout:
    return Rollout("one", group, sample, number, (1, 2), (1,), (0.0,), 0, "stop", {"reward": reward})


@pytest.mark.parametrize(
    ("shares", "total", "counts"),
    [([1, 1], 16, [8, 8]), ([1, 1, 1], 16, [6, 5, 5]), ([3, 1], 4, [3, 1]), ([100, 1, 1], 4, [2, 1, 1])],
)
def test_shares_become_counts(shares, total, counts):
    names = [str(place) for place in range(len(shares))]
    assert list(apportioned(dict(zip(names, shares)), total).values()) == counts


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(6, 200))
def test_counts_add_up_and_leave_nobody_out(shares, total):
    counts = apportioned({str(place): share for place, share in enumerate(shares)}, total)
    assert sum(counts.values()) == total and min(counts.values()) >= 1


def test_every_batch_has_the_same_mix():
    both = {"one": Environment(task="t", share=3), "two": Environment(task="t")}
    found = curriculum(8, environments=both, pool=20)
    for batch in range(5):
        names = [one.environment for one in found.ask(batch)]
        assert names == ["one"] * 6 + ["two"] * 2


def test_without_a_pool_every_prompt_is_new():
    found = curriculum(4)
    assert [one.number for batch in range(3) for one in found.ask(batch)] == list(range(12))


@pytest.mark.parametrize("batch", [0, 5, 10])
def test_the_pass_rates_of_a_batch_follow_the_aim(batch):
    found = curriculum(32, pool=2000, easy=0.8, hard=0.2, sigma=0.1)
    found.pools["one"].rates = {number: (number % 20) / 20 for number in range(2000)}
    numbers = [one.number for one in found.ask(batch)]
    rates = np.array([found.pools["one"].rates[number] for number in numbers])
    assert len(set(numbers)) == 32
    assert rates.mean() == pytest.approx(0.8 - 0.6 * batch / 10, abs=0.06)
    assert rates.std() == pytest.approx(0.1, abs=0.05)


def test_solved_prompts_are_dropped_and_the_pool_moves_on():
    found = curriculum(4, pool=6)
    found.learn([rollout(number, 1.0, group=number) for number in (0, 1)])
    assert {one.number for one in found.ask(0)} == {2, 3, 4, 5}
    found.learn([rollout(number, 1.0, group=number) for number in (2, 3)])
    assert {one.number for one in found.ask(1)} <= set(range(6, 12))


def test_a_pass_rate_is_that_of_a_group_without_its_failures():
    found = curriculum(4, pool=6)
    failed = Rollout("one", 0, 3, 1, (1, 2), (), (), 0, "error", {}, error="Traceback")
    found.learn([rollout(1, 1.0), rollout(1, 0.0, 1), failed])
    assert found.pools["one"].rates == {1: 0.5}


def test_position_is_kept():
    found, other = curriculum(4, pool=50), curriculum(4, pool=50)
    found.ask(0)
    found.learn([rollout(3, 0.25)])
    other.load(json.loads(json.dumps(found.state())))
    assert [found.ask(batch) for batch in (1, 2)] == [other.ask(batch) for batch in (1, 2)]


def test_profile_of_an_earlier_run(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    rows = [{"environment": "one", "number": 7, "reward": reward} for reward in (1, 0, 0, None)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = curriculum(4, pool=50, profile=str(path))
    assert found.pools["one"].rates == {7: pytest.approx(1 / 3)}
    with pytest.raises(Refusal, match="no rollouts of other"):
        curriculum(1, environments={"other": Environment(task="t")}, pool=50, profile=str(path))


def test_a_pool_smaller_than_a_batch_is_refused():
    with pytest.raises(Refusal, match=r"a pool of 3 prompts for one.*at least the 4"):
        curriculum(4, pool=3)


def test_the_pool_of_a_task_with_an_end_begins_again():
    found = Curriculum(CurriculumSettings(pool=100), ONE, 4, 0, 10, {"one": 6})
    found.learn([rollout(number, 1.0, group=number) for number in (0, 1, 2)])
    assert {one.number for one in found.ask(0)} <= set(range(6))
    assert found.pools["one"].rates == {}


def test_a_pool_moves_through_a_task_with_an_end_before_it_begins_again():
    found = Curriculum(CurriculumSettings(pool=4), ONE, 2, 0, 10, {"one": 10})
    for numbers in (range(4), range(4, 8), range(8, 10), range(4)):
        assert {one.number for batch in range(9) for one in found.ask(batch)} == set(numbers)
        found.learn([rollout(number, 1.0, group=number) for number in numbers])


def test_pools_that_a_profile_knows_to_be_solved_are_passed_by(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    rows = [{"environment": "one", "number": number, "reward": 1.0} for number in range(17)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {one.number for one in curriculum(2, pool=5, profile=str(path)).ask(0)} <= {17, 18, 19}
    with pytest.raises(Refusal, match=r"curriculum\.pool = 0"):
        CurriculumSettings(profile=str(path))
