"""The equalities that carry the promise, for every layer kind: how a sequence is cut, batched, padded, packed, cached
or rolled back never changes its numbers."""

import itertools

import pytest
import torch

from tests.models import KINDS, random_documents, random_tokens, tiny

LENGTHS = [1, 63, 100, 257]
DTYPES = [torch.float64, torch.float32]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}

every_kind = pytest.mark.parametrize("kind", KINDS)
every_length = pytest.mark.parametrize("length", LENGTHS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32"])


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=TOLERANCE[a.dtype], atol=TOLERANCE[a.dtype])


def same_memory(a, b) -> None:
    """Two states stand at the same place and hold the same memory (valid keys only)."""
    assert a.lengths_B.tolist() == b.lengths_B.tolist()
    for one, other in zip(a.layers, b.layers, strict=True):
        if hasattr(one, "ssm"):
            close(one.ssm, other.ssm)
            close(one.tail, other.tail)
        elif one is not None:
            for row, length in enumerate(a.lengths_B.tolist()):
                close(one.k[row, :length], other.k[row, :length])
                close(one.v[row, :length], other.v[row, :length])


@every_kind
@every_length
@every_dtype
@torch.no_grad()
def test_prefill_equals_decode(kind, length, dtype):
    model, tokens = tiny(kind, dtype), random_tokens(2, length)
    state = model.new_state(batch=2)
    steps = [model(tokens[:, t : t + 1], state=state) for t in range(length)]
    whole_state = model.new_state(batch=2)
    close(torch.cat(steps, 1), model(tokens, state=whole_state))
    same_memory(state, whole_state)


@every_kind
@every_length
@every_dtype
@torch.no_grad()
def test_split_and_carry_equals_whole(kind, length, dtype):
    model, tokens, ids = tiny(kind, dtype), random_tokens(2, length), random_documents(2, length)
    whole = model(tokens, ids)
    for cuts in ([length // 3], [1, length // 2, length - 1]):
        state, pieces = model.new_state(batch=2), []
        bounds = sorted({0, *cuts, length})
        for start, end in itertools.pairwise(bounds):
            pieces.append(model(tokens[:, start:end], ids[:, start:end], state))
        close(torch.cat(pieces, 1), whole)


@every_kind
@every_length
@every_dtype
@torch.no_grad()
def test_packed_equals_separate(kind, length, dtype):
    model, tokens, ids = tiny(kind, dtype), random_tokens(2, length), random_documents(2, length)
    packed = model(tokens, ids)
    for row in range(2):
        starts = [0, *((ids[row, 1:] != ids[row, :-1]).nonzero()[:, 0] + 1).tolist(), length]
        for start, end in itertools.pairwise(starts):
            close(model(tokens[row : row + 1, start:end]), packed[row : row + 1, start:end])


@every_kind
@every_dtype
@torch.no_grad()
def test_padding_and_batch_composition_change_nothing(kind, dtype):
    """Rows of length 1, 63 and 100, padded on the left, on the right and in between, in one batch, then decoded on."""
    model = tiny(kind, dtype)
    lengths, width = [1, 63, 100], 120
    rows = [random_tokens(1, n + 3, seed=n) for n in lengths]
    generator = torch.Generator().manual_seed(0)
    for where in ("left", "right", "anywhere"):
        tokens, ids = torch.full((3, width), -7), torch.full((3, width), -1)
        places = []
        for row, n in enumerate(lengths):
            place = {"left": torch.arange(width - n, width), "right": torch.arange(n)}.get(where)
            if place is None:
                place = torch.randperm(width, generator=generator)[:n].sort().values
            tokens[row, place], ids[row, place] = rows[row][0, :n], 4
            places.append(place)
        state = model.new_state(batch=3)
        logits = model(tokens, ids, state)
        more = [
            model(torch.stack([r[0, n + i : n + i + 1] for r, n in zip(rows, lengths)]), state=state) for i in range(3)
        ]
        for row, n in enumerate(lengths):
            alone = model(rows[row])
            close(logits[row, places[row]], alone[0, :n])
            close(torch.cat(more, 1)[row], alone[0, n:])
        assert state.lengths_B.tolist() == [n + 3 for n in lengths]


@every_kind
@every_dtype
@torch.no_grad()
def test_a_row_that_is_all_padding_stands_still(kind, dtype):
    """A pass in which one row is padding only leaves that row as it was, and finite."""
    model, tokens, after = tiny(kind, dtype), random_tokens(2, 20), random_tokens(2, 6, seed=9)
    ids = torch.tensor([[0], [-1]]).expand(2, 20)
    for before in (False, True):
        state = model.new_state(batch=2)
        if before:
            model(tokens, state=state)
        model(tokens, ids, state)
        follow = model(after, state=state)
        seen = [tokens[0]] * (1 + before), [tokens[1]] * before
        for row in range(2):
            alone = torch.cat([*seen[row], after[row]])[None]
            close(follow[row], model(alone)[0, -6:])


@pytest.mark.parametrize("kind", ["mamba", "dense", "latent"])
@every_length
@every_dtype
@torch.no_grad()
def test_chunk_size_changes_nothing(kind, length, dtype):
    tokens, ids = random_tokens(2, length), random_documents(2, length)
    reference = tiny(kind, dtype, chunk_size=16)(tokens, ids)
    for chunk in (1, 7, 64, 300):
        close(tiny(kind, dtype, chunk_size=chunk)(tokens, ids), reference)


@every_kind
@every_dtype
@pytest.mark.parametrize("draft", [1, 3, 40])
@torch.no_grad()
def test_kept_equals_never_drafted(kind, dtype, draft):
    """After any accepted prefix, per row, memory and what follows are those of a state that never saw the rest."""
    model, batch = tiny(kind, dtype), 3
    prompt, trial, after = (
        random_tokens(batch, 21),
        random_tokens(batch, draft, seed=1),
        random_tokens(batch, 5, seed=2),
    )
    ids = random_documents(batch, draft, seed=5)
    for documents in (None, ids):
        for kept in ([0] * batch, [draft] * batch, [draft // 2, 0, draft]):
            state = model.new_state(batch)
            model(prompt, None if documents is None else torch.full_like(prompt, 5), state)
            state.mark()
            half = max(1, draft // 2)  # two passes in one trial
            for part in (slice(0, half), slice(half, draft)):
                if trial[:, part].shape[1]:
                    model(trial[:, part], None if documents is None else ids[:, part], state)
            state.keep(torch.tensor(kept))
            follow_ids = None if documents is None else torch.full_like(after, 6)
            follow = model(after, follow_ids, state)
            for row, n in enumerate(kept):
                tokens = torch.cat([prompt[row], trial[row, :n], after[row]])[None]
                if documents is not None:
                    row_ids = torch.cat([torch.full((21,), 5), ids[row, :n], torch.full((5,), 6)])[None]
                    close(follow[row], model(tokens, row_ids)[0, -5:])
                else:
                    close(follow[row], model(tokens)[0, -5:])


@every_kind
@every_dtype
@torch.no_grad()
def test_fork_repeats_and_reorders_rows(kind, dtype):
    model, tokens, after = tiny(kind, dtype), random_tokens(3, 33), random_tokens(4, 6, seed=9)
    state = model.new_state(batch=3)
    model(tokens, state=state)
    index = torch.tensor([2, 0, 0, 1])
    forked = state.fork(index)
    logits = model(after, state=forked)
    close(logits, model(torch.cat([tokens[index], after], 1))[:, 33:])
    again = model(after[:3], state=state)  # the original is untouched
    close(again, model(torch.cat([tokens, after[:3]], 1))[:, 33:])


@every_kind
@every_dtype
def test_gradients_do_not_depend_on_packing_or_state(kind, dtype):
    """A packed row's gradient is the sum of its documents', also when split and carried under autograd."""
    length = 63
    tokens, ids = random_tokens(1, length), random_documents(1, length)
    starts = [0, *((ids[0, 1:] != ids[0, :-1]).nonzero()[:, 0] + 1).tolist(), length]

    def gradients(run) -> dict[str, torch.Tensor]:
        model = tiny(kind, dtype)
        run(model).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1)[..., 0].sum() / length

    def split(model) -> torch.Tensor:
        state = model.new_state(batch=1)
        return loss(model(tokens[:, :20], ids[:, :20], state)) + loss(model(tokens[:, 20:], ids[:, 20:], state))

    packed = gradients(lambda m: loss(m(tokens, ids)))
    separate = gradients(lambda m: sum(loss(m(tokens[:, a:b])) for a, b in itertools.pairwise(starts)))
    carried = gradients(split)
    assert packed.keys() == separate.keys() == carried.keys()
    scale = max(g.abs().max() for g in packed.values())
    for name, grad in packed.items():
        torch.testing.assert_close(grad / scale, separate[name] / scale, rtol=0, atol=TOLERANCE[dtype])
        torch.testing.assert_close(grad / scale, carried[name] / scale, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["latent", "everything"])
@every_length
@every_dtype
@torch.no_grad()
def test_draft_block_prefill_equals_decode_and_keep(kind, length, dtype):
    """The draft block's own memory obeys the same protocol."""
    model, tokens = tiny(kind, dtype), random_tokens(2, length + 1)
    hidden = model.hidden(tokens[:, :-1])
    whole = model.mtp(hidden, tokens[:, 1:])
    state = model.new_state(batch=2).mtp
    steps = [model.mtp(hidden[:, t : t + 1], tokens[:, t + 1 : t + 2], state=state) for t in range(length)]
    close(torch.cat(steps, 1), whole)
    state.mark()
    for _ in range(2):
        model.mtp(hidden[:, :1], tokens[:, :1], state=state)
    state.keep(0)
    fresh = model.new_state(batch=2).mtp
    model.mtp(hidden, tokens[:, 1:], state=fresh)
    same_memory(state, fresh)


@torch.no_grad()
def test_draft_block_respects_documents_and_padding():
    model, tokens, ids = tiny("latent"), random_tokens(1, 64), random_documents(1, 64)
    ids[0, :5] = -1
    hidden = model.hidden(tokens, ids)
    packed = model.mtp(hidden, tokens.roll(-1, 1), ids)
    border = int((ids[0, 6:] != ids[0, 5:-1]).nonzero()[0, 0]) + 6
    alone = model.mtp(hidden[:, 5:border], tokens.roll(-1, 1)[:, 5:border])
    close(packed[:, 5:border], alone)
