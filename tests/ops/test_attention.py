"""Attention and rotary positions against what they mean."""

import pytest
import torch

from tests.ops.agree import DTYPES, LENGTHS, TOLERANCE, agree, documents, drawn, near
from trimaran.ops import rope
from trimaran.ops.attention import (
    attention,
    attention_of_last,
    attention_reference,
    merge,
    partial_attention,
    worth_sharing,
)

BATCH, HEADS, GROUPS, WIDTH = 2, 4, 2, 16


def operands(length: int, keys: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [
        drawn(BATCH, length, HEADS, WIDTH, dtype=dtype, seed=1),
        drawn(BATCH, keys, GROUPS, WIDTH, dtype=dtype, seed=2),
        drawn(BATCH, keys, GROUPS, WIDTH, dtype=dtype, seed=3),
    ]


def masks(length: int, keys: int) -> dict[str, tuple[torch.Tensor | None, bool]]:
    """Documents, a window, an offset causal triangle."""
    place, key = torch.arange(keys - length, keys)[:, None], torch.arange(keys)
    causal = key <= place
    ids = documents(BATCH, keys)
    same = ids[:, keys - length :, None] == ids[:, None, :]
    found = {"documents": (causal & same, False), "window": (causal & (key > place - 16), False)}
    found["offset"] = (causal, False)
    if length == keys:
        found["causal"] = (None, True)
    return found


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", [0, 37])
def test_attention_equals_reference(length, dtype, before):
    for mask, causal in masks(length, length + before).values():
        agree(
            lambda q, k, v, mask=mask, causal=causal: attention(q, k, v, mask, causal, 0.3),
            lambda q, k, v, mask=mask, causal=causal: attention_reference(q, k, v, mask, causal, 0.3),
            *operands(length, length + before, dtype),
        )


ON_GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", [0, 37])
def test_last_tokens_are_the_end_of_causal_attention(length, dtype, before, device):
    q, k, v = (t.detach().to(device).requires_grad_() for t in operands(length, length + before, dtype))
    mask = torch.ones(length, length + before, dtype=torch.bool, device=device).tril(before)
    agree(
        lambda q, k, v: attention_of_last(q, k, v, 0.3),
        lambda q, k, v: attention_reference(q, k, v, mask, False, 0.3),
        q,
        k,
        v,
    )


@pytest.mark.parametrize("length", [1, 5, 40, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 4])
@torch.no_grad()
def test_parts_merge_into_the_whole(length, dtype, groups):
    """Keys in any pieces, those that all rows share with a batch axis of 1 and the queries of all rows stacked."""
    shared, own, wide = 70, 33 + length, torch.promote_types(dtype, torch.float32)
    q = drawn(BATCH, length, HEADS, WIDTH, dtype=dtype, seed=1)
    k, v = (drawn(1, shared, groups, WIDTH, dtype=dtype, seed=seed, scale=2) for seed in (2, 3))
    k_own, v_own = (drawn(BATCH, own, groups, WIDTH, dtype=dtype, seed=seed, scale=2) for seed in (4, 5))
    place = torch.arange(33, own)[:, None]
    masks = [torch.arange(own) <= place, (torch.arange(own) <= place) & (torch.arange(own) > place - 9)]
    # rows of different length: the second row's last seven keys are padding
    masks.append(torch.stack([masks[0], masks[0] & (torch.arange(own) < max(1, own - 7))]))
    for mask in masks:
        parts = [partial_attention(q.flatten(0, 1)[None], k[:, i:j], v[:, i:j], None, False, 0.3) for i, j in CUTS]
        out, lse = parts[0]
        for part in parts[1:]:
            out, lse = merge(out, lse, *part)
        out, lse = out.view(q.shape), lse.view(q.shape[:3])
        out, lse = merge(out, lse, *partial_attention(q, k_own, v_own, mask, False, 0.3))
        assert out.dtype == lse.dtype == wide
        seen = torch.cat([torch.ones(BATCH, length, shared, dtype=torch.bool), mask.expand(BATCH, -1, -1)], 2)
        every_k, every_v = (torch.cat([s.expand(BATCH, -1, -1, -1), o], 1) for s, o in ((k, k_own), (v, v_own)))
        near(out, attention_reference(q.double(), every_k.double(), every_v.double(), seen, False, 0.3), BOUND[dtype])


CUTS = [(0, 1), (1, 40), (40, 70)]
BOUND = {**TOLERANCE, torch.float64: 1e-12}


@pytest.mark.parametrize("length", [1, 20, 60])
@torch.no_grad()
def test_a_part_may_be_causal_or_nothing(length):
    q, k, v = (t.detach() for t in operands(length, length, torch.float64))
    out, lse = partial_attention(q, k, v, None, True, 0.3)
    near(out, attention_reference(q, k, v, None, True, 0.3), 1e-12)
    nothing = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for one, other in ((nothing, (out, lse)), ((out, lse), nothing)):
        joined, total = merge(*one, *other)
        near(joined, out, 1e-15)
        near(total, lse, 1e-15)
    far = 1e4 * k  # scores of tens of thousands neither overflow nor turn to NaN
    near(partial_attention(q, far, v, None, True, 0.3)[0], attention_reference(q, far, v, None, True, 0.3), 1e-9)


def test_sharing_pays_for_many_rows_or_many_keys():
    assert not worth_sharing(1, 10**6, 100) and not worth_sharing(2, 100, 100)
    assert worth_sharing(2, 1000, 100) and worth_sharing(64, 32, 100)


@pytest.mark.parametrize("scaled", [False, True])
def test_rotation_equals_transformers(scaled):
    """The half-split layout and Llama-3.1's frequencies, as in transformers."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    kind = {"rope_type": "llama3", **scaling} if scaled else {"rope_type": "default"}
    config = LlamaConfig(
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        head_dim=WIDTH,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 5000.0, **kind},
    )
    positions = torch.arange(100)[None]
    q, k, _ = (t.detach() for t in operands(100, 100, torch.float32))
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, positions)
    expected = llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    frequencies = rope.rope_frequencies(WIDTH, 5000.0, q.device, scaling if scaled else None)
    table = rope.rotary_table(positions, frequencies, torch.float32)
    for one, other in zip((q, k), expected):
        near(rope.rotate(one, *table), other.transpose(1, 2), 1e-5)


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    q, k, _ = (t.detach() for t in operands(63, 63, torch.float64))
    frequencies = rope.rope_frequencies(WIDTH, 10000.0, q.device)
    scores = []
    for offset in (0, 1000):
        cos, sin = rope.rotary_table(torch.arange(63)[None] + offset, frequencies, torch.float64)
        rotated = rope.rotate(q, cos, sin)
        near(rotated.norm(dim=-1), q.norm(dim=-1), 1e-12)
        scores.append(torch.einsum("bthk,bsgk->bhgts", rotated, rope.rotate(k, cos, sin)))
    near(*scores, 1e-9)
