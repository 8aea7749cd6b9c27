"""Packing: whole rollouts, tight rows, every value in its place."""

import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimaran.rl.rollout import Rollout
from trimaran.rl.source import example, plain
from trimaran.rl.streams import Example, laid_out, pack, unpack


def drawn(count: int, longest: int = 40, seed: int = 0) -> list[Example]:
    """Examples of several answers each, with all streams."""
    dice = random.Random(seed)
    found = []
    for number in range(count):
        length = dice.randint(3, longest)
        said = tuple(sorted(dice.sample(range(1, length), dice.randint(1, length - 1))))
        logprobs = [tuple(-dice.random() for _ in said) for _ in range(4)]
        ids = tuple(dice.randrange(97) for _ in range(length))
        rollout = Rollout("one", number // 4, number % 4, number, ids, said, logprobs[0], 0, "stop", {"reward": 1.0})
        found.append(Example(rollout, dice.uniform(-1, 1), 1 / 64, *logprobs[1:]))
    return found


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_nothing_overlaps_and_little_is_left(lengths):
    places, (rows, width) = laid_out(lengths, 64)
    assert width == 64 or (rows == 1 and 0 <= width - sum(lengths) < 32)
    taken: dict[int, list[int]] = {}
    for (row, start), length in zip(places, lengths):
        taken.setdefault(row, []).extend(range(start, start + length))
    for cells in taken.values():
        assert len(cells) == len(set(cells)) and max(cells) < width
    assert sorted(taken) == list(range(rows))
    rooms = [width - len(cells) for cells in taken.values()]
    assert len(rooms) < 2 or sum(sorted(rooms)[-2:]) < width  # no two rows that would fit into one


def test_every_value_is_in_its_place():
    examples = drawn(20)
    streams = pack(examples, 64, pad_id=5)
    assert streams.tokens_BT.shape[1] == 64
    for number, one in enumerate(examples):
        here = streams.rollouts_BT == number
        assert streams.tokens_BT[here].tolist() == list(one.rollout.ids[: one.length])
        assert streams.targets_BT[here].tolist() == list(one.rollout.ids[1 : one.length + 1])
        assert len(streams.doc_ids_BT[here].unique()) == 1
        assert (here.nonzero()[:, 0]).unique().numel() == 1
        counts = streams.weights_BT[here] > 0
        assert (counts.nonzero()[:, 0] + 1).tolist() == list(one.rollout.said)
        assert streams.advantages_BT[here][counts].unique().tolist() == [pytest.approx(one.advantage)]
    padding = streams.rollouts_BT < 0
    assert (streams.doc_ids_BT[padding] == -1).all() and (streams.tokens_BT[padding] == 5).all()
    assert not streams.weights_BT[padding].any()
    assert streams.trained == pytest.approx(float(streams.weights_BT.sum()), rel=1e-6)


def test_streams_come_back_as_they_went_in():
    examples = drawn(20)
    streams = pack(examples, 64, pad_id=0)
    for name in ("proximal", "reference", "teacher"):
        for found, one in zip(unpack(getattr(streams, f"{name}_BT"), streams, examples), examples, strict=True):
            assert found == pytest.approx(getattr(one, name))
    for found, one in zip(unpack(streams.behaviour_BT, streams, examples), examples, strict=True):
        assert found == pytest.approx(one.rollout.logprobs)


def test_rows_hold_what_is_longer_and_one_row_no_more_than_needed():
    assert pack(drawn(20, longest=200), 32, 0).tokens_BT.shape[1] >= 160
    few = drawn(2, longest=20)
    assert pack(few, 512, 0).tokens_BT.shape == (1, 32 if sum(one.length for one in few) <= 32 else 64)


def test_parts_are_the_rows():
    streams = pack(drawn(20), 64, 0)
    halves = [streams.rows(0, 2), streams.rows(2, 100)]
    for name in ("tokens_BT", "weights_BT", "teacher_BT"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(streams, name))
    assert halves[0].trained == streams.trained


def test_examples_survive_json_to_the_bit():
    for one in drawn(5):
        assert example(json.loads(json.dumps(plain(one)))) == one
