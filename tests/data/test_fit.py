"""Best-fit packing: nothing cut, nothing lost, tight, and the same for the same order."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimaran.data.fit import best_fit


def naive(order, lengths, capacity):
    """Every row looked at for every example."""
    rows: list[list[int]] = []
    for example in sorted(order, key=lambda one: -lengths[one]):
        room = [capacity - sum(lengths[other] for other in row) for row in rows]
        fitting = [place for place in range(len(rows)) if room[place] >= lengths[example]]
        if fitting:
            rows[min(fitting, key=lambda place: room[place])].append(example)
        else:
            rows.append([example])
    return rows


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 90), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_every_example_is_in_one_row_and_rows_are_as_tight_as_a_search_makes_them(lengths, capacity, seed):
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    rows = best_fit(order, lengths, capacity).rows
    assert sorted(example for row in rows for example in row) == sorted(order)
    rooms = [capacity - sum(lengths[example] for example in row) for row in rows]
    assert all(room >= 0 for room in rooms)
    # rows with equal room are the same to best fit, so what the search leaves over agrees, not which row it is in
    assert Counter(rooms) == Counter(
        capacity - sum(lengths[one] for one in row) for row in naive(order, lengths, capacity)
    )


def test_order_decides_among_equals():
    lengths = [5] * 20
    assert best_fit(range(20), lengths, 10).rows != best_fit(range(19, -1, -1), lengths, 10).rows
    assert best_fit(range(20), lengths, 10).rows == best_fit(range(20), lengths, 10).rows


def test_a_row_takes_one_of_a_pair_of_twins():
    packed = best_fit(range(6), [3, 3, 3, 3, 2, 2], 8, names="aabcdd")
    assert packed.duplicates >= 1
    for row in packed.rows:
        assert len({"aabcdd"[example] for example in row}) == len(row)
    assert sum(map(len, packed.rows)) + packed.duplicates == 6
    assert best_fit(range(6), [3, 3, 3, 3, 2, 2], 8).duplicates == 0


def test_real_lengths_fill_their_rows():
    chance = random.Random(0)
    lengths = [min(500, int(chance.lognormvariate(4, 1)) + 2) for _ in range(5000)]
    rows = best_fit(range(5000), lengths, 512).rows
    assert sum(lengths) / (512 * len(rows)) > 0.99


@pytest.mark.parametrize("capacity", [10, 11])
def test_no_examples_give_no_rows(capacity):
    assert best_fit([], [], capacity).rows == []
