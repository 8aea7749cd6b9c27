"""Single steps in slots: the recurrence, the rounding bit for bit, a whole mixer against its parts, trials."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.agree import near
from tests.ops.triton.operands import DEVICE, TOLERANCE, exact, given
from trimaran.ops import conv, norm, rounding, ssd, triton_step

HEADS, GROUPS, TAPS, LAYER = 3, 1, 4, 5


def operands(rows: int, tokens: int, width: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    x = given(rows, tokens, HEADS, width, dtype=dtype, seed=1).detach()
    dt = F.softplus(given(rows, tokens, HEADS, dtype=torch.float32, seed=2).detach() - 1)
    A = -given(HEADS, dtype=torch.float32, seed=3).detach().exp()
    B, C = (given(rows, tokens, GROUPS, size, dtype=dtype, seed=seed).detach() for seed in (4, 5))
    return [x, dt, A, B, C]


@pytest.mark.parametrize(("width", "size", "dtype"), [(20, 12, torch.float32), (4, 32, torch.bfloat16)])
def test_steps_equal_the_recurrence_in_slots(width, size, dtype):
    rows, tokens, slots = 2, 3, torch.tensor([4, 1], device=DEVICE)
    inputs = operands(rows, tokens, width, size, dtype)
    pool = given(6, HEADS, width, size, dtype=torch.float32, seed=6).detach()
    before = pool.clone()
    y, after = triton_step.step(*inputs, pool, slots, trial=True)
    expected, last = ssd.ssd_recurrence(*map(exact, inputs), before[slots].cpu().double())
    near(y.cpu(), expected, TOLERANCE[dtype])
    near(after[-1].cpu(), last, TOLERANCE[dtype])
    assert torch.equal(pool, before)
    assert torch.equal(triton_step.step(*inputs, pool, slots)[0], y)
    assert torch.equal(pool[slots], after[-1])
    others = [slot for slot in range(6) if slot not in (1, 4)]
    assert torch.equal(pool[others], before[others])


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_a_narrow_state_is_rounded_with_the_chances_of_the_reference(narrow):
    rows, width, size, counts = 2, 5, 12, [7, 2_000_003]
    x, dt, A, B, C = operands(rows, 1, width, size, torch.float32)
    pool = given(rows, HEADS, width, size, dtype=narrow, seed=6, scale=3e2).detach()
    pool[0, 0] *= 1e-6 if narrow == torch.float16 else 1.0  # below the smallest normal number
    wide = pool.float()
    triton_step.step(x, dt, A, B, C, wide)
    triton_step.step(x, dt, A, B, C, pool, counts_S=torch.tensor(counts, device=DEVICE), layer=LAYER)
    chance = rounding.chances([rounding.key_of(LAYER, count) for count in counts], wide[0].numel(), wide.device)
    assert torch.equal(pool, rounding.stochastic_round(wide, chance.view(wide.shape), narrow))


def test_numbers_beyond_the_largest_become_the_largest():
    x, dt, A, B, C = operands(1, 1, 4, 4, torch.float32)
    pool = torch.full((1, HEADS, 4, 4), 6.5e4, dtype=torch.float16, device=DEVICE)
    triton_step.step(x * 1e6, dt, A, B, C, pool, counts_S=torch.tensor([1], device=DEVICE))
    assert pool.isfinite().all() and pool.abs().max() == torch.finfo(torch.float16).max
    with pytest.raises(ValueError, match="counts_S"):
        triton_step.step(x, dt, A, B, C, pool)


def mixer(rows: int, tokens: int, width: int, size: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    inner = HEADS * width
    channels = inner + 2 * GROUPS * size
    shapes = {
        "projected": (rows, tokens, inner + channels + HEADS),
        "tail": (rows + 1, TAPS - 1, channels),
        "conv": (channels, TAPS),
        "bias": (channels,),
        "norm": (inner,),
    }
    drawn = {name: given(*shape, dtype=dtype, seed=n).detach() for n, (name, shape) in enumerate(shapes.items())}
    for n, name in enumerate(("A_log", "D", "dt_bias")):
        drawn[name] = given(HEADS, dtype=torch.float32, seed=20 + n).detach()
    return drawn | {"state": given(rows + 1, HEADS, width, size, dtype=torch.float32, seed=30).detach()}


def by_parts(t: dict[str, torch.Tensor], slots: list[int], groups: int) -> tuple[torch.Tensor, ...]:
    """The mixer in fp64 from the formulas: y, the tails and the states afterwards."""
    t = {name: exact(value) for name, value in t.items()}
    state, tail = t["state"][slots], t["tail"][slots]
    heads, width, size = state.shape[1:]
    z, inputs, dt = t["projected"].split([heads * width, tail.shape[2], heads], -1)
    mixed = F.silu(conv.causal_conv(inputs, t["conv"], t["bias"], tail))
    x, B, C = mixed.split([heads * width, groups * size, groups * size], -1)
    x, B, C = x.unflatten(-1, (heads, width)), B.unflatten(-1, (groups, size)), C.unflatten(-1, (groups, size))
    y, last = ssd.ssd_recurrence(x, F.softplus(dt + t["dt_bias"]), -t["A_log"].exp(), B, C, state)
    y = norm.gated_rms_norm_reference((y + x * t["D"][:, None]).flatten(2), z, t["norm"], groups, 1e-5)
    return y, conv.next_tail(inputs, TAPS, tail), last


@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.bfloat16), (3, torch.float32)])
def test_a_mixer_in_slots_equals_its_parts(tokens, dtype):
    slots = [2, 0]
    t = mixer(2, tokens, 20, 12, dtype)
    expected, tails, states = by_parts(t, slots, GROUPS)
    rest = [t[name] for name in ("conv", "bias", "A_log", "D", "dt_bias", "norm")]
    at, before = torch.tensor(slots, device=DEVICE), {name: t[name].clone() for name in ("tail", "state")}
    tried, after = triton_step.mamba(t["projected"], t["tail"], t["state"], at, GROUPS, *rest, 1e-5, trial=True)
    assert all(torch.equal(t[name], before[name]) for name in before)
    y, _ = triton_step.mamba(t["projected"], t["tail"], t["state"], at, GROUPS, *rest, 1e-5)
    assert torch.equal(tried, y) and torch.equal(after[-1], t["state"][slots])
    near(y.cpu(), expected, TOLERANCE[dtype])
    near(t["tail"][slots].cpu(), tails, 0)
    near(t["state"][slots].cpu(), states, TOLERANCE[dtype])
    assert torch.equal(t["tail"][1], before["tail"][1]) and torch.equal(t["state"][1], before["state"][1])


def test_small_steps_keep_their_digits():
    """log(1 + e^x) where e^x is far below 1."""
    x, _, A, B, C = operands(1, 1, 4, 4, torch.float32)
    raw = torch.tensor([-16.0, -9.0, 30.0], device=DEVICE).view(1, 1, HEADS)
    pools = [torch.zeros(1, HEADS, 4, 4, device=DEVICE) for _ in range(2)]
    triton_step.step(x, raw, A.abs().log(), B, C, pools[0], dt_bias_H=torch.zeros(HEADS, device=DEVICE))
    triton_step.step(x, F.softplus(raw.double()).float(), A, B, C, pools[1])
    torch.testing.assert_close(pools[0], pools[1], rtol=1e-6, atol=0)
