"""Rows of whole conversations: what stands in them, in which order, and from where they go on."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from trimaran.data.examples import gathered
from trimaran.data.packs import Answers, Packs, row_of
from trimaran.errors import Refusal


def some(count: int = 60, seed: int = 0, vocab: int = 97):
    """Examples of 3 to 30 tokens; the first two thirds of each only read."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = random.integers(0, vocab, random.integers(3, 31)).astype(np.int32)
        made.append((ids, np.arange(len(ids)) >= len(ids) * 2 // 3))
    return gathered(made)


def packs(examples=None, **changes):
    given = {"sequence_length": 64, "batch_size": 3, "pad_id": 0, "seed": 1} | changes
    return Packs(some() if examples is None else examples, **given)


def pieces(batch):
    """(tokens and last target, weights) of every example in a batch."""
    found = []
    for tokens, targets, ids, weights in zip(batch.tokens_BT, batch.targets_BT, batch.doc_ids_BT, batch.weights_BT):
        for document in ids[ids >= 0].unique():
            here = ids == document
            assert torch.equal(targets[here][:-1], tokens[here][1:])
            found.append(((*tokens[here].tolist(), int(targets[here][-1])), tuple(weights[here].tolist())))
        assert not weights[ids < 0].any() and not tokens[ids < 0].any()
    return found


def test_an_epoch_gives_every_example_once_and_none_is_cut():
    examples, loader = some(), packs(batch_size=1)
    found = [piece for _ in range(len(loader.packed.rows)) for piece in pieces(next(loader))]
    expected = [
        (tuple(ids.tolist()), tuple(learnt[1:].astype(float).tolist()))
        for ids, learnt in map(examples.__getitem__, range(60))
    ]
    assert Counter(found) == Counter(expected)


def test_order_follows_seed_and_epoch():
    def orders(**changes):
        loader = packs(batch_size=1, **changes)
        return [[loader.pack(epoch).rows for epoch in (0, 1)]]

    (first,) = orders()
    assert [first] == orders() and first[0] != first[1] and [first] != orders(seed=2)


@pytest.mark.parametrize("stop", [0, 1, 5, 6, 7, 20])
def test_resuming_anywhere_equals_going_on(stop):
    whole, first, second = packs(), packs(), packs()
    expected = [next(whole) for _ in range(24)]
    for _ in range(stop):
        next(first)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch in expected[stop:]:
        again = next(second)
        assert all(torch.equal(getattr(again, name), getattr(batch, name)) for name in vars(batch))
    assert second.state_dict() == whole.state_dict() and second.observed() == whole.observed()
    assert whole.observed()["epochs"] > 2


def test_a_conversation_may_weigh_as_much_as_any_other():
    long, short = np.arange(150, dtype=np.int32) % 97, np.arange(5, dtype=np.int32)
    examples = gathered([(long, np.arange(150) >= 50), (short, np.arange(5) >= 3)])
    for weighting, sums in (("tokens", [100, 2]), ("conversations", [1, 1])):
        row = row_of(examples, [0, 1], 160, 0, weighting)
        assert [row.weights_T[row.doc_ids_T == n].sum() for n in (0, 1)] == pytest.approx(sums, rel=1e-6)
        assert len(set(row.weights_T[row.weights_T > 0].tolist())) == (1 if weighting == "tokens" else 2)


def test_twins_share_no_row():
    one = some(10)
    examples = gathered([one[number % 10] for number in range(40)])
    dropped, kept = packs(examples, batch_size=1), packs(examples, batch_size=1, duplicates="keep")
    assert dropped.packed.duplicates > 0 == kept.packed.duplicates
    for _ in range(len(dropped.packed.rows)):
        found = pieces(next(dropped))
        assert len(set(found)) == len(found)
    assert f"{dropped.packed.duplicates} twins left out" in str(dropped)


def test_other_conversations_and_too_few_are_refused():
    saved = packs().state_dict()
    for name, other in {
        "conversations": packs(some(seed=1)),
        "seed": packs(seed=5),
        "weighting": packs(weighting="conversations"),
    }.items():
        with pytest.raises(Refusal, match=f"saved position has {name}"):
            other.load_state_dict(saved)
    with pytest.raises(Refusal, match=r"fill \d+ rows, fewer than one batch"):
        packs(batch_size=200)


def test_held_out_answers_are_all_scored_and_know_their_bytes():
    examples, sizes = some(), np.arange(97)
    answers = Answers(examples, sizes, sequence_length=64, batch_size=2)
    batches = list(answers)
    assert len(batches) == len(answers)
    assert sum(float(batch.weights_BT.sum()) for batch in batches) == answers.tokens == examples.learnt_N.sum()
    targets = torch.cat([batch.targets_BT[batch.weights_BT > 0] for batch in batches])
    assert answers.bytes == int(targets.sum()) > 0
    with pytest.raises(Refusal, match="without a byte"):
        Answers(examples, np.zeros(97, np.int64), sequence_length=64, batch_size=2)
