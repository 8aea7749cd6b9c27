"""The short convolution against torch's own, and its fused twin against the formula."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.agree import DTYPES, LENGTHS, agree, documents, drawn, near
from trimaran.ops import blocks, conv

CHANNELS, TAPS = 12, 4


def plain(x, weight, bias, tail, seg):
    return F.silu(conv.causal_conv(x, weight, bias, tail, seg))


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_torch_convolution(length):
    x, weight = (
        drawn(2, length, CHANNELS, dtype=torch.float64, seed=1),
        drawn(CHANNELS, TAPS, dtype=torch.float64, seed=2),
    )
    bias = drawn(CHANNELS, dtype=torch.float64, seed=3)

    def reference(x, weight, bias):
        padded = F.pad(x.transpose(1, 2), (TAPS - 1, 0))
        return F.conv1d(padded, weight[:, None], bias, groups=CHANNELS).transpose(1, 2)

    agree(conv.causal_conv, reference, x, weight, bias)


@pytest.mark.parametrize("piece", [40, 1 << 19], ids=["many blocks", "one block"])
@pytest.mark.parametrize("length", [1, 2, *LENGTHS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("borders", [False, True], ids=["whole", "documents"])
def test_fused_equals_formula(monkeypatch, piece, length, dtype, carried, borders):
    if length == 257 and piece == 40:
        pytest.skip("100 tokens make blocks enough")
    monkeypatch.setattr(blocks, "ELEMENTS", piece)
    agree(
        conv.causal_conv_silu,
        plain,
        drawn(2, length, CHANNELS, dtype=dtype, seed=1),
        drawn(CHANNELS, TAPS, dtype=dtype, seed=2),
        drawn(CHANNELS, dtype=dtype, seed=3) if not borders else None,
        drawn(2, TAPS - 1, CHANNELS, dtype=dtype, seed=4) if carried else None,
        documents(2, length) if borders else None,
    )


def test_narrow_inputs_may_be_a_slice_of_a_wider_projection():
    wide = drawn(2, 63, 3 * CHANNELS, dtype=torch.float32, seed=1)
    weight, bias = drawn(CHANNELS, TAPS, dtype=torch.float32, seed=2), drawn(CHANNELS, dtype=torch.float32, seed=3)
    part = wide[..., CHANNELS : 2 * CHANNELS]
    near(conv.causal_conv_silu(part, weight, bias), conv.causal_conv_silu(part.contiguous(), weight, bias), 1e-6)


@pytest.mark.parametrize("length", [1, 2, 3, 63])
@pytest.mark.parametrize("borders", [False, True], ids=["whole", "documents"])
def test_tail_carries_on(length, borders):
    """Whole = first part, then the rest with the tail of the first."""
    x = drawn(2, length + 20, CHANNELS, dtype=torch.float64, seed=1)
    weight = drawn(CHANNELS, TAPS, dtype=torch.float64, seed=2)
    seg = documents(2, length + 20) if borders else torch.zeros(2, length + 20, dtype=torch.long)
    whole = conv.causal_conv_silu(x, weight, None, None, seg)
    tail = conv.next_tail(x[:, :length], TAPS, None, seg[:, :length])
    after = seg[:, length:] - seg[:, length - 1 : length]
    near(conv.causal_conv_silu(x[:, length:], weight, None, tail, after), whole[:, length:], 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@torch.no_grad()
def test_few_tokens_and_the_tail_after_any_of_them(dtype, bias):
    x, tail = drawn(3, 6, CHANNELS, dtype=dtype, seed=1), drawn(3, TAPS - 1, CHANNELS, dtype=dtype, seed=2)
    weight = drawn(CHANNELS, TAPS, dtype=dtype, seed=3)
    bias_C = drawn(CHANNELS, dtype=dtype, seed=4) if bias else None
    y, window = conv.causal_conv_silu_few(x, weight, bias_C, tail)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 2e-2)
    near(y, conv.causal_conv_silu(x, weight, bias_C, tail), tolerance)
    for counts in ([0, 0, 0], [6, 6, 6], [0, 2, 6]):
        expected = conv.next_tail(x, TAPS, tail, None, torch.tensor(counts))
        assert torch.equal(conv.tail_after(window, TAPS, counts), expected)
