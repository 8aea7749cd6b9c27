"""The C++ kernels against the torch forms, at odd sizes, with NaN in all memory that nobody may read."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from tests.ops.agree import near
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import build
from trimaran.model.mamba import Mamba
from trimaran.model.moe import MoE
from trimaran.ops import backend, conv, native, ssd
from trimaran.ops.attention import attention_reference
from trimaran.ops.norm import gated_rms_norm_reference, rms_norm_reference

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason=str(native.missing())),
    pytest.mark.usefixtures("kernels"),
]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the largest reference value


@pytest.fixture(autouse=True)
def without_gradient():
    with torch.no_grad():
        yield


def numbers(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def amid_nan(x):
    """The same numbers with NaN before and behind them in memory."""
    whole = x.new_full((x.numel() + 64,), torch.nan)
    whole[32 : 32 + x.numel()] = x.flatten()
    return whole[32 : 32 + x.numel()].view(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 33, 64])
@pytest.mark.parametrize(("inner", "outputs"), [(64, 33), (100, 7), (37, 21), (96, 48)])
def test_linear(dtype, rows, inner, outputs):
    x, w = amid_nan(numbers(rows, inner, dtype=dtype)), amid_nan(numbers(outputs, inner, dtype=dtype, seed=1))
    assert native.takes_linear(x, w)
    near(native.linear(x, w), x.double() @ w.double().T, TOLERANCE[dtype])


def test_linear_declines_what_it_does_not_know():
    x, w = numbers(3, 16), numbers(8, 16)
    assert native.takes_linear(x, w)
    assert not native.takes_linear(x.double(), w.double())
    assert not native.takes_linear(x.half(), w.half())
    assert not native.takes_linear(x.bfloat16(), w)
    assert not native.takes_linear(x, numbers(16, 8).T)
    assert not native.takes_linear(numbers(native.ROWS + 1, 16), w)
    assert not native.takes_linear(x[:0], w)
    with torch.enable_grad():
        assert not native.takes_linear(x, w)
    with torch.autocast("cpu", torch.bfloat16):
        assert not native.takes_linear(x, w)
    with backend.using("-native.linear"):
        assert not native.takes_linear(x, w)


def test_linear_carries_what_is_not_finite():
    x, w = numbers(2, 32), numbers(4, 32, seed=1)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    found, expected = native.linear(x, w), F.linear(x, w)
    assert found[0].isnan().all() and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (3, 37), (2, 5, 100), (7, 1)])
def test_norm(dtype, shape):
    x, w = amid_nan(numbers(*shape, dtype=dtype)), amid_nan(numbers(shape[-1], dtype=dtype, seed=1))
    near(native.rms_norm(x, w, 1e-5), rms_norm_reference(x.double(), w.double(), 1e-5), TOLERANCE[dtype])


def mixer(dtype, heads, width, groups, size, taps, bias):
    config = ModelConfig(
        pattern="M", vocab_size=32, hidden_size=24, mamba_num_heads=heads, mamba_head_dim=width, n_groups=groups,
        ssm_state_size=size, conv_kernel=taps, use_conv_bias=bias, chunk_size=16,
    )  # fmt: skip
    found = build(config, dtype=dtype).backbone.layers[0].mixer
    assert isinstance(found, Mamba)
    for n, parameter in enumerate((found.norm.weight, found.conv1d.bias, found.D)):
        if parameter is not None:
            parameter.copy_(1 + numbers(*parameter.shape, seed=50 + n) / 4)
    return found


def in_torch(m, projected_SKC, tail_SWC, ssm_SHPN):
    """A mixer between its projections in the torch forms: y, the window behind the tail, the state after each token."""
    z, inputs, dt = projected_SKC.split([m.width, m.conv_width, m.heads], -1)
    mixed, window = m.conv1d.few(inputs, tail_SWC)
    x, B, C = mixed.split([m.width, m.groups * m.size, m.groups * m.size], -1)
    x, B, C = x.unflatten(-1, (m.heads, -1)), B.unflatten(-1, (m.groups, -1)), C.unflatten(-1, (m.groups, -1))
    y, states = ssd.ssd_steps(x, F.softplus(dt.float() + m.dt_bias), m.decay_rates(), B, C, ssm_SHPN)
    y = y + m.D[:, None] * x.float()
    return m.norm(y.flatten(2), z), window, states


SHAPES = [(4, 8, 2, 16, 4, True), (6, 5, 3, 32, 4, False), (3, 17, 1, 16, 2, True), (2, 64, 2, 128, 3, False)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("trial", [False, True])
def test_mamba(dtype, shape, tokens, trial):
    m = mixer(dtype, *shape)
    slots, S = torch.tensor([4, 0, 2]), 3
    tail = numbers(6, m.conv1d.taps - 1, m.conv_width, dtype=dtype, seed=2)
    ssm = numbers(6, m.heads, m.head_dim, m.size, seed=3)
    for unused in (1, 3, 5):
        tail[unused], ssm[unused] = torch.nan, torch.nan
    projected = amid_nan(numbers(S, tokens, m.in_proj.out_features, dtype=dtype, seed=4))
    assert m.takes(projected, tail, ssm)
    with backend.using("-native"):
        expected, window, states = in_torch(m, projected, tail[slots], ssm[slots])
    before = tail.clone(), ssm.clone()
    found, after = m.few(projected, tail, ssm, slots, trial)
    near(found, expected, TOLERANCE[dtype])
    if trial:
        near(after, states, TOLERANCE[dtype])
        assert all(torch.equal(one[slots], other[slots]) for one, other in zip((tail, ssm), before, strict=True))
    else:
        near(ssm[slots], states[-1], TOLERANCE[dtype])
        assert torch.equal(tail[slots], conv.tail_after(window, m.conv1d.taps, [tokens] * S))
    assert tail[[1, 3, 5]].isnan().all() and ssm[[1, 3, 5]].isnan().all()


def test_mamba_with_large_steps_stays_finite():
    m = mixer(torch.float32, 4, 8, 2, 16, 4, True)
    projected = numbers(1, 1, m.in_proj.out_features, scale=60.0)
    tail, ssm = torch.zeros(1, 3, m.conv_width), numbers(1, m.heads, m.head_dim, m.size)
    with backend.using("-native"):
        expected = in_torch(m, projected, tail.clone(), ssm.clone())[0]
    near(m.few(projected, tail, ssm)[0], expected, 1e-5)


@dataclass
class Pooled:
    """Queries of sequences whose keys lie in scattered pages; whatever is no key of theirs is NaN."""

    q: torch.Tensor
    pool: list[torch.Tensor]
    at: native.Table
    expected: torch.Tensor


def pooled(dtype, counts, before, window, shift, heads, groups, width):
    page = 16
    pool = [torch.full((2048, groups, width), torch.nan, dtype=dtype) for _ in range(2)]
    free = torch.randperm(128, generator=torch.Generator().manual_seed(3)).tolist()
    starts, expected = [], []
    q = amid_nan(numbers(sum(counts), heads, width, dtype=dtype, seed=5))
    for s, (count, past) in enumerate(zip(counts, before, strict=True)):
        keys = past + count
        starts.append([free.pop() * page for _ in range(-(-(keys + shift) // page))])
        places = torch.tensor([starts[s][(j + shift) // page] + (j + shift) % page for j in range(keys)])
        for n, tensor in enumerate(pool):
            tensor[places] = numbers(keys, groups, width, dtype=dtype, seed=10 * s + n)
        query, key = torch.arange(past, keys)[:, None], torch.arange(keys)
        mask = (key <= query) & (key > query - (window or 10_000))
        own = q[sum(counts[:s]) : sum(counts[: s + 1])]
        wide = (t[None].double() for t in (own, pool[0][places], pool[1][places]))
        expected.append(attention_reference(*wide, mask, False, 0.3)[0])
    return Pooled(q, pool, native.table(starts, counts, before, page, shift), torch.cat(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize(("heads", "groups", "width"), [(6, 2, 16), (3, 3, 48), (5, 1, 32)])
@pytest.mark.parametrize("shift", [0, 1])
def test_attention(dtype, window, heads, groups, width, shift):
    case = pooled(dtype, [1, 4, 2], [0, 37, 700], window, shift, heads, groups, width)
    assert native.takes_attention(case.q, *case.pool, case.at.most)
    near(native.attend(case.q, *case.pool, case.at, window, 0.3), case.expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 70, 250])
@pytest.mark.parametrize(("heads", "groups", "width"), [(6, 2, 16), (3, 3, 48), (9, 1, 32)])
@pytest.mark.parametrize("shift", [0, 1])
def test_attention_of_many_queries(dtype, window, heads, groups, width, shift):
    """One block of queries and part of another, tiles that a window leaves behind, more heads than fit a task."""
    case = pooled(dtype, [1, 130, 65, 450], [3, 0, 500, 1], window, shift, heads, groups, width)
    near(native.attend_long(case.q, *case.pool, case.at, window, 0.3), case.expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_many_queries_in_neighbouring_pages(dtype):
    """Keys that lie side by side are read where they lie, also where scores are far apart."""
    q, k, v = (numbers(n, h, 16, dtype=dtype, seed=h, scale=4.0) for n, h in ((300, 4), (700, 2), (700, 2)))
    at = native.table([[20]], [300], [380], 680)
    own = slice(20, 700)
    mask = torch.arange(680) <= torch.arange(380, 680)[:, None]
    expected = attention_reference(*(t[None].double() for t in (q, k[own], v[own])), mask, False, 0.3)[0]
    found = native.attend_long(q, k, v, at, None, 0.3)
    near(found, expected, TOLERANCE[dtype])
    assert torch.equal(found, native.attend_long(q, k, v, at, None, 0.3))


def test_attention_of_many_queries_carries_what_is_not_finite():
    """A NaN reaches those that see it, and a query of NaN itself alone."""
    q, k, v = numbers(200, 2, 16), numbers(200, 1, 16, seed=1), numbers(200, 1, 16, seed=2)
    q[3, 1], k[150] = torch.nan, torch.nan
    found = native.attend_long(q, k, v, native.table([[0]], [200], [0], 200), None, 0.3)
    assert found[3, 1].isnan().all() and found[150:].isnan().all()
    assert found[:150].isnan().any(-1).sum() == 1


def test_attention_in_pieces_is_the_same():
    """One sequence cut over several threads."""
    q, k, v = numbers(1, 2, 16), numbers(3000, 1, 16, seed=1), numbers(3000, 1, 16, seed=2)
    at = native.table([[0]], [1], [2999], 3000)
    expected = native.attend(q, k, v, at, None, 0.2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        near(native.attend(q, k, v, at, None, 0.2), expected, 1e-5)
    finally:
        torch.set_num_threads(threads)


def moe(dtype, **more):
    config = ModelConfig(
        pattern="E", vocab_size=32, hidden_size=40, n_routed_experts=8, num_experts_per_tok=3, moe_latent_size=24,
        moe_intermediate_size=20, moe_shared_expert_intermediate_size=36, routed_scaling_factor=2.5, **more,
    )  # fmt: skip
    found = build(config, dtype=dtype).backbone.layers[0].mixer
    assert isinstance(found, MoE)
    found.gate.weight.mul_(20)
    found.gate.e_score_correction_bias.copy_(numbers(8, seed=7) / 8)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 32])
@pytest.mark.parametrize("normalise", [True, False])
def test_router_and_experts(dtype, tokens, normalise):
    m = moe(dtype, norm_topk_prob=normalise)
    x = amid_nan(numbers(tokens, 40, dtype=dtype, seed=8))
    assert native.takes_router(x, m.gate.weight, m.gate.e_score_correction_bias)
    with backend.using("-native"):
        scores, ids, weights = m.gate(x)
        order = ids.argsort(1)
        latent = m.fc1_latent_proj(x)
        expected = m.experts(latent, ids, weights)
    found_scores, found_ids, found_weights = m.gate(x)
    again = found_ids.argsort(1)
    assert torch.equal(found_ids.gather(1, again), ids.gather(1, order))
    near(found_weights.gather(1, again), weights.gather(1, order), 1e-5)
    near(found_scores, scores, 1e-5)
    assert native.takes_experts(latent, ids, m.experts.up_proj.weight, m.experts.down_proj.weight)
    near(m.experts(latent, ids, weights), expected, TOLERANCE[dtype])


def test_router_of_nan_stays_in_range():
    m = moe(torch.float32)
    ids = m.gate(torch.full((2, 40), torch.nan))[1]
    assert ids.min() >= 0 and ids.max() < 8 and all(len(set(row.tolist())) == 3 for row in ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 63, 100])
@pytest.mark.parametrize("shape", [(4, 16, 2, 16), (3, 32, 1, 48), (6, 16, 6, 32)])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("chunk", [16, 24, 64])
def test_scan(dtype, length, shape, documents, chunk):
    """Forward against the recurrence, with carried state, document borders and views of one wider tensor."""
    (heads, width, groups, size), batch = shape, 2
    inner = heads * width
    mixed = amid_nan(numbers(batch, length, inner + 2 * groups * size, dtype=dtype, scale=0.5))
    x, B, C = mixed.split([inner, groups * size, groups * size], -1)
    x, B, C = x.unflatten(-1, (heads, width)), B.unflatten(-1, (groups, size)), C.unflatten(-1, (groups, size))
    dt, A = numbers(batch, length, heads, seed=1).abs(), -numbers(heads, seed=2).abs()
    state = numbers(batch, heads, width, size, seed=3)
    seg = (numbers(batch, length, seed=4) > 1.5).long().cumsum(1) if documents else None
    assert native.takes_scan(x, dt, B, C, chunk)
    wide = [t.double() for t in (x, dt, A, B, C, state)]
    y, last, before = native.scan(x, dt, A, B, C, state, seg, chunk, True)
    expected, final = ssd.ssd_recurrence(*wide, seg)
    near(y, expected, TOLERANCE[dtype])
    near(last, final, TOLERANCE[dtype])
    assert torch.equal(before[0], state)
    for z in range(1, len(before)):
        cut = slice(0, z * chunk)
        part = [t[:, cut] for t in (wide[0], wide[1], wide[3], wide[4])]
        after = ssd.ssd_recurrence(part[0], part[1], wide[2], *part[2:], wide[5], None if seg is None else seg[:, cut])
        near(before[z], after[1], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 63, 100])
@pytest.mark.parametrize(("channels", "taps"), [(16, 4), (37, 4), (48, 2), (5, 7)])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_conv(dtype, length, channels, taps, carried, documents):
    x = amid_nan(numbers(2, length, channels + 9, dtype=dtype))[..., 4 : 4 + channels]
    weight, bias = numbers(channels, taps, dtype=dtype, seed=1), numbers(channels, dtype=dtype, seed=2)
    tail = numbers(2, taps - 1, channels, dtype=dtype, seed=3) if carried else None
    seg = (numbers(2, length, seed=4) > 1).long().cumsum(1) if documents else None
    assert native.takes_conv(x, tail, taps)
    wide = (None if t is None else t.double() for t in (x, weight, bias, tail))
    expected = conv.causal_conv_silu_reference(*wide, seg)
    near(native.conv_silu(x, weight, bias, tail, seg), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width", "groups"), [(4, 16, 2), (3, 5, 1), (6, 17, 3)])
def test_gated_norm(dtype, heads, width, groups):
    inner = heads * width
    y, D = amid_nan(numbers(2, 7, heads, width)), numbers(heads, seed=1)
    x = numbers(2, 7, inner + 8, dtype=dtype, seed=2)[..., :inner]
    gate = numbers(2, 7, inner + 3, dtype=dtype, seed=3)[..., 3:]
    weight = numbers(inner, dtype=dtype, seed=4)
    assert native.takes_gated_norm(y, x, gate)
    whole = y.double() + D.double()[:, None] * x.double().unflatten(-1, (heads, width))
    expected = gated_rms_norm_reference(whole.flatten(2), gate.double(), weight.double(), groups, 1e-5)
    near(native.gated_norm(y, x, D, gate, weight, groups, 1e-5), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 16, 100, 40_000])
def test_relu2(dtype, count):
    x = amid_nan(numbers(count, dtype=dtype))
    x[0] = torch.nan
    found = native.relu2(x)
    assert found[0].isnan() and torch.equal(found[1:], F.relu(x[1:]).square())
