"""Rewards for length: the published formulas at chosen lengths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimaran.rl.recipe import ShapingSettings
from trimaran.rl.rollout import Rollout
from trimaran.rl.shaping import effort, relative_lengths, shaped

ULTRA = ShapingSettings(effort=0.1, effort_tokens=15000, effort_penalty=1)


def rollout(length: int, thoughts: int = 0) -> Rollout:
    ids, said = tuple(range(length + 1)), tuple(range(1, length + 1))
    return Rollout("one", 0, 0, 0, ids, said, (0.0,) * length, thoughts, "stop", {"reward": 1.0})


@pytest.mark.parametrize(
    ("reward", "length", "expected"),
    [(1, 0, 1.1), (1, 7500, 1.05), (1, 15000, 1), (1, 30000, 0.9), (0, 0, 0), (0, 30000, -0.1), (0.5, 7500, 0.525)],
)
def test_effort(reward, length, expected):
    assert effort(reward, length, ULTRA) == pytest.approx(expected)


def test_effort_is_for_prompts_that_ask_for_it():
    group = [rollout(7500), rollout(30000)]
    assert shaped(group, [1.0, 1.0], True, ULTRA) == pytest.approx([1.05, 0.9])
    assert shaped(group, [1.0, 1.0], False, ULTRA) == [1, 1]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12))
def test_lengths_beside_one_another_add_up_to_nothing(lengths):
    found = relative_lengths(lengths)
    assert sum(found) == pytest.approx(0, abs=1e-9)
    assert found == [0] * len(lengths) if len(set(lengths)) == 1 else found[lengths.index(min(lengths))] > 0


def test_thoughts_and_answers_are_weighed_apart():
    group = [rollout(10, thoughts=8), rollout(10, thoughts=2)]
    assert shaped(group, [0.0, 0.0], False, ShapingSettings(thought_length=0.5)) == pytest.approx([-0.25, 0.25])
    assert shaped(group, [0.0, 0.0], False, ShapingSettings(answer_length=0.5)) == pytest.approx([0.25, -0.25])
    assert shaped(group, [0.0, 0.0], False, ShapingSettings(thought_length=0.5, answer_length=0.5)) == [0, 0]


def test_the_shortest_of_the_good_ones_has_a_bonus():
    group = [rollout(5), rollout(7), rollout(9)]
    assert shaped(group, [0.0, 1.0, 1.0], False, ShapingSettings(shortest=0.5)) == [0, 1.5, 1]


def test_who_has_no_reward_gets_none():
    settings = ShapingSettings(shortest=0.5, thought_length=0.5)
    assert shaped([rollout(5), rollout(7)], [None, 1.0], False, settings) == [None, 1.5]
    assert shaped([rollout(5)], [None], True, settings) == [None]
