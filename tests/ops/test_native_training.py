"""The C++ kernels of training against the formulas in fp64: outputs and gradients, odd sizes, NaN all around."""

import pytest
import torch
from torch import nn

from tests.ops.agree import agree, drawn, near
from tests.ops.test_native import amid_nan
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import build
from trimaran.model.linear import Head
from trimaran.ops import backend, conv, native, native_training, ssd
from trimaran.ops.activation import relu2, relu2_reference
from trimaran.ops.attention import attention, attention_reference
from trimaran.ops.loss import cross_entropy, loss_and_gradient
from trimaran.ops.norm import gated_rms_norm_reference, rms_norm, rms_norm_reference

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason=str(native.missing())),
    pytest.mark.usefixtures("kernels"),
]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the largest reference value


def placed(*shape, dtype=torch.float32, seed=0, scale=1.0):
    """Numbers that want a gradient, with NaN before and behind them in memory."""
    return amid_nan(drawn(*shape, dtype=dtype, seed=seed, scale=scale).detach()).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 7), (5, 16), (4, 100), (33, 1025)])
@pytest.mark.parametrize("in_place", [False, True])
def test_loss(dtype, rows, vocab, in_place):
    logits = placed(rows, vocab, dtype=dtype, scale=5).detach()
    targets, weights = torch.arange(rows) * 37 % vocab, drawn(rows, dtype=torch.float32, seed=1).detach()
    assert native_training.takes_loss(logits)
    expected, gradient = loss_and_gradient(logits.double(), targets, weights.double())
    loss, found = native_training.loss_and_gradient(logits, targets, weights, in_place)
    assert (found.data_ptr() == logits.data_ptr()) == in_place and found.dtype == dtype
    near(loss, expected, 1e-5)
    near(found, gradient, TOLERANCE[dtype])


def test_loss_refuses_targets_outside_the_vocabulary():
    with pytest.raises(IndexError, match="target 7"):
        native_training.loss_and_gradient(torch.zeros(2, 7), torch.tensor([0, 7]), torch.ones(2))


def test_loss_of_infinite_and_nan_logits_is_torchs():
    logits = torch.tensor([[1.0, -torch.inf, 2.0], [torch.nan, 0.0, 1.0], [torch.inf, 0.0, 1.0]])
    weights, targets = torch.ones(1), torch.tensor([0])
    for row in logits[:, None]:
        for found, expected in zip(
            native_training.loss_and_gradient(row, targets, weights),
            loss_and_gradient(row, targets, weights),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_cross_entropy_through_heads(scaled, autocast):
    """With the kernel and without it, from a head that hands out its product and from one that does not."""
    head = Head(24, 50, scaled)
    nn.init.normal_(head.weight)
    if head.s_z is not None:
        nn.init.normal_(head.s_z.weight)
    hidden, targets = drawn(9, 24, dtype=torch.float32, seed=2), torch.arange(9)
    found = []
    for setting in ("auto", "-native"):
        with backend.using(setting), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = cross_entropy(hidden, head, targets, torch.ones(9), chunk=4)
        found.append([loss.detach(), *torch.autograd.grad(loss, [hidden, *head.parameters()])])
    for one, other in zip(*found, strict=True):
        near(one, other, 5e-3 if autocast else 1e-5)


@pytest.mark.parametrize(("wide", "narrow"), [(d, e) for d in DTYPES for e in DTYPES if d in (e, torch.float32)])
@pytest.mark.parametrize("shape", [(1, 16), (3, 37), (2, 5, 100), (7, 1), (3, 192)])
def test_norm(wide, narrow, shape):
    x, weight = placed(*shape, dtype=wide), placed(shape[-1], seed=1)
    assert native_training.takes_norm(x, weight, narrow)
    found = rms_norm(x, weight, 1e-5, narrow)
    assert found.dtype == narrow and "RMSNormBackward" in str(found.grad_fn)
    agree(
        lambda x, w: rms_norm(x, w, 1e-5, narrow),
        lambda x, w: rms_norm_reference(x, w, 1e-5),
        x, weight, tolerance=TOLERANCE[narrow],
    )  # fmt: skip


def test_norm_declines_what_it_does_not_know():
    x, weight = drawn(2, 16, dtype=torch.float32, seed=0), drawn(16, dtype=torch.float32, seed=1)
    assert native_training.takes_norm(x, weight, torch.bfloat16)
    assert not native_training.takes_norm(x.double(), weight, torch.float64)
    assert not native_training.takes_norm(x.bfloat16(), weight, torch.float32)
    assert not native_training.takes_norm(x[:0], weight, torch.float32)
    with backend.using("-native.norm"):
        assert not native_training.takes_norm(x, weight, torch.float32)
    with backend.using("reference"):
        assert not native_training.takes_loss(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width", "groups"), [(4, 16, 2), (3, 48, 1), (6, 32, 3)])
def test_gated_norm(dtype, heads, width, groups):
    inner = heads * width
    y, D = placed(2, 7, heads, width), placed(heads, seed=1)
    x = placed(2, 7, inner + 8, dtype=dtype, seed=2)
    gate, weight = placed(2, 7, inner + 3, dtype=dtype, seed=3), placed(inner, dtype=dtype, seed=4)

    def run(y, x, D, gate, weight):
        return native_training.GatedNorm.apply(y, x[..., :inner], D, gate[..., 3:], weight, groups, 1e-5)

    def reference(y, x, D, gate, weight):
        whole = y + D[:, None] * x[..., :inner].unflatten(-1, (heads, width))
        return gated_rms_norm_reference(whole.flatten(2), gate[..., 3:], weight, groups, 1e-5)

    assert native_training.takes_gated_norm(y, x[..., :inner], gate[..., 3:], groups)
    agree(run, reference, y, x, D, gate, weight, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 16, 100, 40_000])
def test_relu2(dtype, count):
    x = placed(count, dtype=dtype)
    assert native_training.runs("native.relu2", x)
    agree(relu2, relu2_reference, x, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 63, 100])
@pytest.mark.parametrize(("channels", "taps"), [(16, 4), (48, 2), (32, 7)])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_conv(dtype, length, channels, taps, carried, documents):
    x = placed(2, length, channels + 9, dtype=dtype)
    weight, bias = placed(channels, taps, seed=1), placed(channels, seed=2)
    tail = placed(2, taps - 1, channels, dtype=dtype, seed=3) if carried else None
    seg = (drawn(2, length, dtype=torch.float32, seed=4) > 1).long().cumsum(1) if documents else None
    own = x[..., 4 : 4 + channels]
    assert native_training.takes_conv_backward(own, torch.empty_like(own), tail, taps)
    agree(
        lambda x, *rest: conv.causal_conv_silu(x[..., 4 : 4 + channels], *rest),
        lambda x, *rest: conv.causal_conv_silu_reference(x[..., 4 : 4 + channels], *rest),
        x, weight, bias, tail, seg, tolerance=TOLERANCE[dtype],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "chunk"), [(1, 16), (7, 16), (64, 64), (100, 32), (130, 50)])
@pytest.mark.parametrize(("heads", "width", "groups", "size"), [(4, 16, 2, 16), (3, 48, 1, 32), (2, 32, 2, 48)])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_scan(dtype, length, chunk, heads, width, groups, size, carried, documents, monkeypatch):
    """Slices of wider rows, as a mixer hands them over; the last state wants its gradient too."""
    rows = placed(2, length, heads * width + 2 * groups * size, dtype=dtype, scale=0.5)
    dt, A = placed(2, length, heads, seed=1), placed(heads, seed=2)
    state = placed(2, heads, width, size, seed=3, scale=0.5) if carried else None
    seg = (drawn(2, length, dtype=torch.float32, seed=4) > 1).long().cumsum(1) if documents else None
    calls, backward = [], native_training.scan_backward
    monkeypatch.setattr(native_training, "scan_backward", lambda *given: calls.append(1) or backward(*given))

    def through(scan):
        def run(rows, dt, A, state, seg):
            x, B, C = rows.split([heads * width, groups * size, groups * size], -1)
            x, B, C = x.unflatten(-1, (heads, width)), *(t.unflatten(-1, (groups, size)) for t in (B, C))
            return scan(x, torch.nn.functional.softplus(dt), -A.exp(), B, C, state, seg)

        return run

    agree(
        through(lambda *given: ssd.ssd(*given, chunk)), through(lambda *given: ssd.ssd_recurrence(*given)),
        rows, dt, A, state, seg, tolerance=TOLERANCE[dtype] * (1 if dtype == torch.bfloat16 else 10),
    )  # fmt: skip
    assert calls


def losses(setting, steps):
    config = ModelConfig(
        pattern="ME*-", vocab_size=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16, n_groups=2, chunk_size=16, intermediate_size=48,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, moe_shared_expert_intermediate_size=32,
    )  # fmt: skip
    model, tokens = build(config), torch.randint(64, (3, 41), generator=torch.Generator().manual_seed(0))
    optimizer, weights = torch.optim.AdamW(model.parameters(), 3e-3), torch.full((120,), 1 / 120)
    found = []
    with backend.using(setting):
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
                loss = cross_entropy(hidden, model.head, tokens[:, 1:].flatten(), weights)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
    return torch.stack(found)


def test_twenty_steps_lose_what_they_lose_without_kernels():
    found, expected = losses("auto", 20), losses("-native", 20)
    assert expected[-1] < expected[0] - 0.3
    near(found, expected, 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 63, 100, 257])
@pytest.mark.parametrize(("heads", "groups", "width"), [(6, 2, 16), (3, 3, 48), (4, 1, 32)])
@pytest.mark.parametrize("seen", ["causal", "documents", "window"])
def test_attention(dtype, length, heads, groups, width, seen):
    """Queries that see everything before them, their own document, or a window; some see nothing at all."""
    projected, batch = placed(2, length, (heads + 2 * groups) * width, dtype=dtype, scale=2.0), 2
    query, key, mask = torch.arange(length)[:, None], torch.arange(length), None
    if seen == "window":
        mask = (key <= query) & (key > query - 7)
    elif seen == "documents":
        number_BT = (drawn(batch, length, dtype=torch.float32, seed=4) > 1.5).long().cumsum(1)
        mask = (number_BT[:, :, None] == number_BT[:, None]) & (key <= query)
        mask[:, 1:2] = False

    def split(whole):
        parts = whole.split([heads * width, groups * width, groups * width], -1)
        return [part.unflatten(-1, (-1, width)) for part in parts]

    assert native_training.takes_attention(*split(projected))
    found = attention(*split(projected), mask, mask is None, 0.3)
    assert "AttentionBackward" in str(found.grad_fn)
    agree(
        lambda whole: attention(*split(whole), mask, mask is None, 0.3),
        lambda whole: attention_reference(*split(whole), mask, mask is None, 0.3),
        projected, tolerance=TOLERANCE[dtype],
    )  # fmt: skip
