import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trimaran.errors import Refusal
from trimaran.evals.interval import mean_interval, pass_at
from trimaran.evals.table import table
from trimaran.evals.tally import score_of, tally


def record(number, sample, reward, mode="sampled", **changes):
    base = {"mode": mode, "number": number, "sample": sample, "scores": {"reward": reward}, "finish": "stop"}
    base |= {"tokens": 4, "thought_tokens": 1, "prompt": [{"role": "user", "content": str(number)}], "tools": []}
    return {**base, "messages": [], "error": None, **changes}


def test_the_interval_is_scipys():
    values = np.random.default_rng(3).beta(0.5, 0.7, 150)
    ours = mean_interval(values)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=0).confidence_interval
    assert ours == pytest.approx([theirs.low, theirs.high], abs=0.003)
    assert ours == mean_interval(values) != mean_interval(values, seed=1)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    dice = np.random.default_rng(0)
    held = 0
    for trial in range(100):
        low, high = mean_interval(dice.random(120) < 0.3, seed=trial)
        held += low <= 0.3 <= high
    assert 88 <= held < 100  # 95, within three standard deviations


def test_an_interval_of_equal_values():
    assert mean_interval([0.25]) == pytest.approx((0.25 * 0.025, 0.25 + 0.75 * 0.975))
    for size in (1, 20, 200):
        exact = stats.binomtest(0, size).proportion_ci(0.95, "exact")
        assert mean_interval([0.0] * size) == pytest.approx((0.0, exact.high))
        assert mean_interval([1.0] * size) == pytest.approx((1 - exact.high, 1.0))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n), st.integers(0, n))))
def test_pass_at_counts_all_choices(case):
    from itertools import combinations

    k, samples, solved = case
    chosen = list(combinations([True] * solved + [False] * (samples - solved), k))
    assert pass_at(k, samples, solved) == pytest.approx(sum(any(one) for one in chosen) / len(chosen))


def test_figures_by_hand():
    rewards = {0: [1, 1], 1: [0, 1], 2: [0, 0], 3: [0.5, 0.5]}
    records = [record(number, place, value) for number, row in rewards.items() for place, value in enumerate(row)]
    records[0] |= {"finish": "length", "tokens": 12}
    records[1]["scores"]["calls"] = 3.0
    found = tally("boat", records, 0)
    assert (found.n, found.samples, found.failed) == (4, 2, 0)
    assert found.reward == pytest.approx(0.5) and found.low <= 0.5 <= found.high
    assert found.pass_at == {1: pytest.approx(3 / 8), 2: pytest.approx(2 / 4)}  # half right is not solved
    assert found.scores == {"calls": 3.0} and found.tokens == 5 and found.thought_tokens == 1
    assert found.finish == {"stop": 7 / 8, "length": 1 / 8}


def test_failures_are_counted_and_are_in_no_mean():
    records = [record(0, 0, 1.0), record(1, 0, 0, scores={}, finish=None, error="Traceback\nZeroDivisionError: hole")]
    found = tally("boat", records, 0)
    assert (found.reward, found.n, found.failed) == (1.0, 1, 1)
    with pytest.raises(Refusal, match=r"all 1 episodes failed.*ZeroDivisionError: hole"):
        tally("boat", records[1:], 0)


def test_the_table_shows_both_ways_and_failures_only_where_there_are_some():
    records = [record(0, 0, 1.0), record(0, 1, 0.0), record(0, 0, 1.0, "greedy"), record(1, 0, 0.0, "greedy")]
    score = score_of("boat", records, 0)
    assert score.distinct == 2 and score.greedy.reward == 0.5 and score.sampled.pass_at[2] == 1
    shown = table({"boat": score}).splitlines()
    assert [line.split()[:4] for line in shown[1:]] == [["boat", "greedy", "x", "1"], ["boat", "sampled", "x", "2"]]
    assert "failed" not in shown[0] and "100.0% (2)" in shown[2] and len({len(line) for line in shown}) == 1
    records.append(record(1, 0, 0, scores={}, error="Traceback"))
    assert "failed" in table({"boat": score_of("boat", records, 0)})
