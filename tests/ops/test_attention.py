"""Attention and rotary positions against what they mean."""

import pytest
import torch

from tests.ops.agree import DTYPES, LENGTHS, agree, documents, drawn, near
from trimaran.ops import rope
from trimaran.ops.attention import attention, attention_reference

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
