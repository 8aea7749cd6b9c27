import json
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimaran.data.corpora import Document
from trimaran.data.evaluation import Windows
from trimaran.data.loader import Loader
from trimaran.data.mixture import Length, Mixture, Phase, furthest_behind
from trimaran.data.packing import Epoch
from trimaran.data.shards import write
from trimaran.data.split import Listed
from trimaran.errors import Refusal

quick = settings(max_examples=25, deadline=None)


def pairs_of(tokens, targets, weights):
    return Counter((int(a), int(b)) for a, b, w in zip(tokens, targets, weights, strict=True) if w)


def all_pairs(shards):
    return Counter(pair for place in range(len(shards)) for pair in pairwise(shards.document(place).tolist()))


@given(sequence_length=st.integers(1, 200), seed=st.integers(0, 2**32), number=st.integers(0, 5))
@quick
def test_an_epoch_holds_every_token_and_every_target_once(shards, sequence_length, seed, number):
    epoch = Epoch(shards, sequence_length, 0, (seed,), number)
    rows = [epoch.row(place) for place in range(len(epoch))]
    real = Counter(int(token) for row in rows for token in row.tokens_T[row.doc_ids_T >= 0])
    assert real == Counter(shards.tokens(0, shards.total_tokens).tolist())
    assert sum((pairs_of(r.tokens_T, r.targets_T, r.weights_T) for r in rows), Counter()) == all_pairs(shards)
    assert sum(bool((row.doc_ids_T < 0).any()) for row in rows) <= 1  # only the last row of the stream is padded


@given(sequence_length=st.integers(2, 100), seed=st.integers(0, 9))
@quick
def test_rows_are_stretches_of_documents_and_ids_mark_the_borders(shards, tokenizer, sequence_length, seed):
    epoch = Epoch(shards, sequence_length, 0, (seed,), 0)
    for place in range(len(epoch)):
        row = epoch.row(place)
        for t in range(1, sequence_length):
            goes_on = row.doc_ids_T[t] == row.doc_ids_T[t - 1]
            if row.doc_ids_T[t] >= 0:
                assert goes_on == (row.tokens_T[t - 1] != tokenizer.eos_id)
                assert not goes_on or row.targets_T[t - 1] == row.tokens_T[t]
        scored = row.weights_T > 0
        assert (scored == ((row.doc_ids_T >= 0) & (row.tokens_T != tokenizer.eos_id))).all()


def alike(left, right):
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in vars(left))


PHASES = Mixture(
    weights={"a": 3, "b": 1},
    phases=(
        Phase(until=0.4),
        Phase(
            weights={"a": 0.2, "b": 0.8},
            lengths=(Length(sequence_length=64, share=0.75), Length(sequence_length=16, share=0.25, weights={"b": 1})),
        ),
    ),
)


def loader(shards, tokenizer, tmp_path, seed=0, mixture=PHASES, steps=40):
    other = write(Listed([Document("b", "sail " * 400)]), tokenizer, tmp_path / "b")
    sources = {"a": shards, "b": other}
    return Loader(sources, sequence_length=32, batch_size=4, seed=seed, mixture=mixture, steps=steps)


@pytest.mark.parametrize("stop", [0, 1, 7, 16, 17, 29, 39])
def test_resuming_anywhere_equals_going_on(shards, tokenizer, tmp_path, stop):
    whole = loader(shards, tokenizer, tmp_path)
    expected = [next(whole) for _ in range(60)]
    first, second = loader(shards, tokenizer, tmp_path), loader(shards, tokenizer, tmp_path)
    for _ in range(stop):
        next(first)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert all(alike(next(second), batch) for batch in expected[stop:])
    assert second.state_dict() == whole.state_dict()


def test_mixture_gives_each_source_its_share_and_each_step_its_tokens(shards, tokenizer, tmp_path):
    batches = loader(shards, tokenizer, tmp_path)
    for _ in range(16):
        assert next(batches).tokens_BT.shape == (4, 32)
    assert batches.drawn == {"a@32": 48, "b@32": 16}
    shapes = Counter(tuple(next(batches).tokens_BT.shape) for _ in range(24))
    assert shapes == {(2, 64): 18, (8, 16): 6}
    assert batches.drawn["b@16"] == 48 and batches.drawn["a@64"] == round(36 * 0.2)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(1, 200))
@quick
def test_no_entry_runs_more_than_one_draw_ahead_of_its_share(shares, count):
    drawn = [0] * len(shares)
    for _ in range(count):
        drawn[furthest_behind(shares, drawn)] += 1
        due = [share / sum(shares) * sum(drawn) for share in shares]
        assert all(have < want + 1 for have, want in zip(drawn, due, strict=True))


def test_order_follows_the_seed_and_epochs_differ(shards):
    def some(seed, count):
        batches = Loader(shards, sequence_length=32, batch_size=1, seed=seed)
        return [next(batches) for _ in range(count)]

    rows = -(-shards.total_tokens // 32)
    first = some(0, 2 * rows)
    assert all(alike(*pair) for pair in zip(first, some(0, 2 * rows), strict=True))
    assert not all(alike(*pair) for pair in zip(first, some(1, 2 * rows), strict=True))
    assert not all(alike(*pair) for pair in zip(first[:rows], first[rows:], strict=True))


def test_loader_refusals(shards, tokenizer, tmp_path):
    with pytest.raises(Refusal, match=r"shorter than one batch; allowed: at least batch_size 64 x sequence_length 512"):
        Loader(shards, sequence_length=512, batch_size=64)
    with pytest.raises(Refusal, match="sequence_length 48 does not divide a step of 128"):
        loader(shards, tokenizer, tmp_path, mixture=Mixture(phases=(Phase(lengths=(Length(sequence_length=48),)),)))
    with pytest.raises(Refusal, match=r"unknown source 'c'; allowed: "):
        loader(shards, tokenizer, tmp_path, mixture=Mixture(weights={"c": 1}))
    with pytest.raises(Refusal, match="at least one above 0"):
        loader(shards, tokenizer, tmp_path, mixture=Mixture(weights={"a": 0}))
    with pytest.raises(Refusal, match="phases without a number of steps"):
        loader(shards, tokenizer, tmp_path, steps=None)
    with pytest.raises(Refusal, match=r"phases end at \[0.5\]"):
        Mixture(phases=(Phase(until=0.5),))
    saved = loader(shards, tokenizer, tmp_path).state_dict()
    with pytest.raises(Refusal, match="saved position has seed = 0"):
        loader(shards, tokenizer, tmp_path, seed=1).load_state_dict(saved)


@given(sequence_length=st.integers(1, 90), batch_size=st.integers(1, 7))
@quick
def test_windows_score_every_token_once(shards, tokenizer, sequence_length, batch_size):
    windows = Windows(shards, sequence_length=sequence_length, batch_size=batch_size)
    batches = list(windows)
    assert len(batches) == len(windows)
    flat = [(batch.tokens_BT.flatten(), batch.targets_BT.flatten(), batch.weights_BT.flatten()) for batch in batches]
    assert sum((pairs_of(*streams) for streams in flat), Counter()) == all_pairs(shards)
    assert sum(int(weights.sum()) for _, _, weights in flat) == windows.tokens
    targets = torch.cat([targets[weights > 0] for _, targets, weights in flat])
    assert tokenizer.bytes_of(targets.tolist()) == windows.bytes == shards.total_bytes


def test_bytes_of_an_unscored_first_token_do_not_count(documents, tokenizer, tmp_path, monkeypatch):
    """A hub tokenizer may have no bos: then nothing predicts a document's first token."""
    monkeypatch.setattr(tokenizer, "bos_id", None)
    shards = write(Listed(documents), tokenizer, tmp_path / "text")
    windows = Windows(shards, sequence_length=16, batch_size=4)
    scored = [batch.targets_BT[batch.weights_BT > 0] for batch in windows]
    assert (
        tokenizer.bytes_of(torch.cat(scored).tolist()) == windows.bytes < sum(len(d.text.encode()) for d in documents)
    )


def test_batches_move_and_slice(shards):
    batch = next(Loader(shards, sequence_length=16, batch_size=4))
    dtypes = (torch.int64, torch.int64, torch.int32, torch.float32)
    assert tuple(stream.dtype for stream in vars(batch).values()) == dtypes
    assert alike(batch.to("cpu"), batch) and batch.rows(1, 3).tokens_BT.shape == (2, 16)
