"""Anisotropy-calibrated similarity: exact where the answer is known, and the sequences that it is measured on."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.models import KINDS, random_tokens, tiny
from trimaran.errors import Refusal
from trimaran.evals.representation import (
    Similarity,
    anisotropy,
    cosine,
    layer_names,
    measure,
    reordered,
    streams,
    unit,
)
from trimaran.evals.representation_texts import compressed_shares, compressibility, sequences, windows

VOCABULARY, WINDOW = 97, 16


def orthonormal(count, width=64, seed=0):
    drawn = torch.randn(width, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.T.contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_the_streams_are_what_the_model_computes(kind):
    model, tokens = tiny(kind), random_tokens(2, 33)
    found = streams(model, tokens, 5)
    assert found.shape == (len(model.config.pattern) + 1, 2, 5, 32) and len(layer_names(model)) == len(found)
    with torch.no_grad():
        assert torch.equal(model.backbone.norm_f(found[-1]), model.hidden(tokens)[:, -5:])
        assert torch.equal(found[0], model.backbone.embeddings(tokens)[:, -5:])
    assert not any(module._forward_hooks for module in model.modules())


def test_a_window_sees_exactly_as_far_as_its_layers_reach():
    model = tiny("window", pattern="WWW")
    reach = WINDOW - 1  # keys before a token's own, a layer
    found = measure(model, random_tokens(6, 100), [40], 60)
    for layer in range(4):
        self_NS = found.self_PNLS[0, :, layer]
        assert (self_NS[:, layer * reach :] == 1).all(), layer  # to the last bit: nothing changed
        if layer:
            assert (self_NS[:, : layer * reach] < 1).any(0).all(), layer  # and no earlier


@pytest.mark.parametrize("kind", KINDS)
def test_the_embedding_knows_nothing_and_what_looks_back_does(kind):
    found = measure(tiny(kind), random_tokens(4, 50), [8, 20], 6, shuffles=2)
    assert (found.self_PNLS[:, :, 0] == 1).all()
    assert (found.self_PNLS[:, :, -1] < 1).any()
    assert torch.equal(found.self_PNLS[0, :, 0], found.self_PNLS[1, :, 0])
    assert (found.self_PNLS <= 1 + 1e-12).all() and found.self_PNLS.shape == (2, 4, len(KINDS[kind]["pattern"]) + 1, 6)


def test_the_measure_cannot_see_a_mean_over_the_prefix():
    """Without queries one attention layer averages: an order leaves no trace in a mean."""
    model = tiny("attention", pattern="*")
    with torch.no_grad():
        model.backbone.layers[0].mixer.q_proj.weight.zero_()
    found = measure(model, random_tokens(4, 40), [30], 5)
    assert torch.allclose(found.self_PNLS, torch.ones_like(found.self_PNLS), atol=1e-12)
    found = measure(tiny("attention", pattern="*"), random_tokens(4, 40), [30], 5)
    assert torch.allclose(found.self_PNLS, torch.ones_like(found.self_PNLS), atol=1e-12)  # nor one without positions
    found = measure(tiny("rope", pattern="R"), random_tokens(4, 40), [30], 5)
    assert (found.self_PNLS[0, :, 1] < 1 - 1e-6).all()  # positions tell


@given(
    lean=st.floats(0, 30),
    kept=st.floats(-1, 1),
    count=st.integers(2, 6),
    tokens=st.integers(1, 4),
)
def test_a_constant_shift_has_a_closed_form(lean, kept, count, tokens):
    """Orthonormal vectors, each turned by a right angle's share: cosines are known with and without a common shift."""
    basis = orthonormal(2 * count * tokens + 1)
    here, away = basis[: count * tokens], basis[count * tokens : 2 * count * tokens]
    there = kept * here + (1 - kept**2) ** 0.5 * away
    shift = lean * basis[-1]
    here, there = (vectors + shift for vectors in (here, there))
    similar_NS = cosine(here, there).view(count, tokens)
    sums_ND = unit(here).view(count, tokens, -1).sum(1)
    found = Similarity((1,), similar_NS[None, :, None], anisotropy(sums_ND, tokens)[None, None])
    assert torch.allclose(similar_NS, torch.full_like(similar_NS, (kept + lean**2) / (1 + lean**2)))
    assert found.aniso_PL.item() == pytest.approx(lean**2 / (1 + lean**2), abs=1e-9)
    assert found.accs_PL.item() == pytest.approx(kept / (1 + lean**2), abs=1e-9)
    assert found.scaled_PL.item() == pytest.approx(kept, abs=1e-6)  # the shift is gone
    assert found.accs_PNL.mean().item() == pytest.approx(found.accs_PL.item())


@pytest.mark.parametrize("tokens", [1, 5])
def test_anisotropy_is_the_mean_over_all_pairs_of_different_sequences(tokens):
    h = torch.randn(100, tokens, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.4
    flat, owner = h.flatten(0, 1), torch.arange(100).repeat_interleave(tokens)
    apart = owner[:, None] != owner
    pairs = torch.nn.functional.cosine_similarity(flat[:, None], flat, dim=-1)
    assert anisotropy(unit(h).sum(1), tokens).item() == pytest.approx(pairs[apart].mean().item(), abs=1e-12)


def test_vectors_of_one_direction_have_no_room():
    found = Similarity((1,), torch.ones(1, 2, 1, 3, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    assert found.accs_PL.item() == 0 and found.scaled_PL.item() == 1


def test_only_the_prefix_is_shuffled_and_every_model_sees_the_same_orders():
    seen = []
    model = tiny("rope")
    model.backbone.embeddings.register_forward_hook(lambda module, given, output: seen.append(given[0].clone()))
    tokens = random_tokens(5, 30)
    first = measure(model, tokens, [10], 4, lead=[1, 2], shuffles=2, rows=2)
    whole, other, third = (torch.cat(seen[place::3]) for place in range(3))
    assert torch.equal(whole[:, 2:], tokens[:, 16:]) and whole[:, :2].tolist() == [[1, 2]] * 5
    for changed in (other, third):
        assert torch.equal(changed[:, 12:], whole[:, 12:]) and torch.equal(changed[:, :2], whole[:, :2])
        assert torch.equal(changed.sort(1).values, whole.sort(1).values) and not torch.equal(changed, whole)
    assert not torch.equal(other, third)
    again = measure(model, tokens, [10], 4, lead=[1, 2], shuffles=2, rows=5)
    assert torch.allclose(again.self_PNLS, first.self_PNLS, atol=1e-12)
    assert torch.allclose(again.aniso_PL, first.aniso_PL, atol=1e-12)
    different = measure(model, tokens, [10], 4, lead=[1, 2], shuffles=2, seed=1)
    assert not torch.allclose(different.self_PNLS, first.self_PNLS)


def test_reordering_takes_the_order_given():
    tokens = torch.arange(12).view(2, 6)
    found = reordered(tokens, 1, torch.tensor([[2, 0, 1], [1, 2, 0]]))
    assert found.tolist() == [[0, 3, 1, 2, 4, 5], [6, 8, 9, 7, 10, 11]]


@pytest.mark.parametrize("shape", [(1, 60), (4, 20)])
def test_too_few_or_too_short_sequences_are_refused(shape):
    with pytest.raises(Refusal, match=f"{shape[0]} sequences of {shape[1]} tokens"):
        measure(tiny("rope"), random_tokens(*shape), [20], 4)


WORDS = ["boat", "hull", "sail", "wind", "north", "tide", "rope", "mast", "keel", "deck"]


def stories(count, words, seed=0):
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(WORDS, k=words)) for _ in range(count)]


def test_windows_come_from_different_documents_while_there_are_enough(tokenizer):
    texts = [f"{number} " * 200 for number in range(8)]
    found = windows(texts, tokenizer, 8, 40, seed=0)
    assert found.shape == (8, 40) and found.dtype == np.int64
    digits = [set(tokenizer.decode(row.tolist())) - {" "} for row in found]
    assert sorted(map(sorted, digits)) == [[str(number)] for number in range(8)]
    assert np.array_equal(found, windows(texts, tokenizer, 8, 40, seed=0))
    assert not np.array_equal(found, windows(texts, tokenizer, 8, 40, seed=1))
    more = windows(texts, tokenizer, 20, 40, seed=0)
    assert np.array_equal(more[:8], found) and len(more) == 20


def test_windows_of_one_document_do_not_overlap(tokenizer):
    text = stories(1, 400)[0]
    found = windows([text], tokenizer, 6, 50, seed=0)
    starts = {text.find(tokenizer.decode(row.tolist())) // 10 for row in found}
    assert len(starts) == 6 and -1 not in starts
    with pytest.raises(Refusal, match=r"pieces of 5000 tokens in the texts; allowed: 2"):
        windows([text], tokenizer, 2, 5000, seed=0)


def test_sources_differ_in_order_and_compress_accordingly(tokenizer):
    text_NT = windows(stories(12, 300), tokenizer, 12, 216, seed=0)
    made = {source: sequences(source, text_NT, 20, 0) for source in ("text", "periodic", "noise")}
    assert made["text"] is text_NT and all(found.shape == text_NT.shape for found in made.values())
    assert set(made["noise"].ravel()) <= set(text_NT.ravel())
    assert np.array_equal(made["periodic"][:, 20:], made["periodic"][:, :-20])
    shares = {source: np.mean(compressed_shares(tokenizer, found, 200, 16)) for source, found in made.items()}
    assert shares["periodic"] < shares["text"] < shares["noise"]


def test_compressibility_of_what_is_known():
    noise = random.Random(0).randbytes(4000)
    assert compressibility(bytes(4000)) < 0.02 and 1 < compressibility(noise) < 1.01
