"""Advantages of a group: hand-computed vectors, and what must hold for any rewards."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimaran.rl.advantage import leave_one_out

REWARDS = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=2, max_size=16)


def test_one_of_four():
    assert leave_one_out([1, 0, 0, 0]) == pytest.approx([1, -0.57735, -0.57735, -0.57735], abs=1e-5)


def test_a_group_of_two_is_a_difference():
    assert leave_one_out([1, 0]) == [1, -1]


def test_without_spread_among_the_others_nothing_is_divided():
    assert leave_one_out([0.3, 0.1, 0.1, 0.1])[0] == pytest.approx(0.2)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
def test_equal_rewards_teach_nothing(reward):
    assert leave_one_out([reward] * 7) == [0] * 7


def test_who_has_no_reward_is_nobodys_other():
    assert leave_one_out([1, None, 0, 0, None, 0]) == [
        None if reward is None else pytest.approx(reward, abs=1e-5)
        for reward in [1, None, -0.57735, -0.57735, None, -0.57735]
    ]
    assert leave_one_out([None, 1, None]) == [None, 0, None]
    assert leave_one_out([None, None]) == [None, None]


@given(REWARDS)
def test_plain_advantages_add_up_to_nothing(rewards):
    found = leave_one_out(rewards, normalise=False)
    assert sum(found) == pytest.approx(0, abs=1e-9)
    size = len(rewards)
    for one, reward in zip(found, rewards):
        assert one == pytest.approx((reward - statistics.fmean(rewards)) * size / (size - 1), abs=1e-9)


@given(st.lists(st.integers(0, 10), min_size=3, max_size=16), st.floats(-5, 5))
def test_a_shift_of_all_rewards_changes_nothing(rewards, shift):
    moved = leave_one_out([reward + shift for reward in rewards])
    for one, other in zip(leave_one_out(rewards), moved):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6) and math.isfinite(one)
