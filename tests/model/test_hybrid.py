"""What a model refuses to do with tokens, with a state, and in the wrong dtype."""

import copy
import math

import pytest
import torch

import trimaran
from tests.models import KINDS, random_tokens, tiny, tiny_config
from trimaran.errors import Refusal
from trimaran.model.hybrid import build
from trimaran.model.state import AttentionState
from trimaran.ops.numbers import FP32_PARAMETERS


@pytest.mark.parametrize("bad", [-1, 97, 1 << 40])
def test_ids_outside_the_vocabulary(bad):
    model, tokens = tiny("latent"), random_tokens(1, 5)
    tokens[0, 3] = bad
    with pytest.raises(Refusal, match=f"token id {bad}; allowed: 0 to 96"):
        model(tokens)
    hidden = model.hidden(random_tokens(1, 5))
    with pytest.raises(Refusal, match=f"token id {bad}; allowed: 0 to 96"):
        model.mtp(hidden, tokens)
    assert model(tokens, torch.tensor([[0, 0, 0, -1, 0]])).isfinite().all(), "padding may hold anything"


def test_memory_made_by_other_weights_is_refused():
    model, tokens = tiny("latent"), random_tokens(2, 5)
    state = model.new_state(batch=2)
    hidden = model.hidden(tokens, state=state)
    model.version += 1
    with pytest.raises(RuntimeError, match="make a new state"):
        model(tokens, state=state)
    with pytest.raises(RuntimeError, match="make a new state"):
        model.mtp(hidden, tokens, state=state.mtp)
    fresh = copy.deepcopy(model).new_state(batch=2)
    assert fresh.version == fresh.mtp.version == model.version == 1


def test_shapes_that_do_not_fit():
    model = tiny("dense")
    for tokens in (torch.zeros(5, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"give \[batch, length\]"):
            model(tokens)
    with pytest.raises(ValueError, match="the state holds 3 rows"):
        model(random_tokens(2, 4), state=model.new_state(batch=3))
    with pytest.raises(ValueError, match="make them equal"):
        model(random_tokens(2, 4), torch.zeros(2, 3))


def test_a_trial_is_opened_and_closed_once():
    state = tiny("dense").new_state(batch=1)
    with pytest.raises(RuntimeError, match="without a trial"):
        state.keep(0)
    state.mark()
    for twice in (state.mark, lambda: state.fork(torch.tensor([0]))):
        with pytest.raises(RuntimeError, match="during a trial"):
            twice()
    with pytest.raises(ValueError, match=r"made \[0\] tokens"):
        state.keep(1)
    state.keep(0)


# The spread of bf16's rounding (2^-8) through a few layers, beside the spread of the logits. Expert models get more: a
# rounding may change which expert is chosen.
BF16 = {"moe": 0.05, "grouped-moe": 0.05}


@pytest.mark.filterwarnings("ignore:no hub architecture")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_loaded_in_bf16(kind, tmp_path):
    """Prefill, decoding and a trial taken back agree in bf16, and what the number contract names stays in fp32."""
    tiny(kind, torch.float32, initializer_range=0.15).save(tmp_path)
    model, tokens = trimaran.load(tmp_path, dtype=torch.bfloat16), random_tokens(2, 63)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if name.split(".")[-1] in FP32_PARAMETERS else torch.bfloat16)
    whole, state = model(tokens), model.new_state(batch=2)
    steps = [model(tokens[:, t : t + 1], state=state) for t in range(40)]
    state.mark()
    model(random_tokens(2, 7, seed=1), state=state)
    state.keep(0)
    steps += [model(tokens[:, t : t + 1], state=state) for t in range(40, 63)]
    assert whole.dtype == steps[0].dtype == torch.float32, "logits are held in fp32"
    assert all(layer.ssm.dtype == torch.float32 for layer in state.layers if hasattr(layer, "ssm"))
    error = (torch.cat(steps, 1) - whole).square().mean().sqrt() / whole.std()
    assert error < BF16.get(kind, 0.02), float(error)
    precise = trimaran.load(tmp_path)(tokens)
    assert (whole - precise).abs().median() < 0.03 * precise.std()


def test_a_step_without_gradient_leaves_the_graph_whole():
    """State carried under autograd, then one step without: what the graph holds is not written over."""
    model, tokens = tiny("dense"), random_tokens(1, 9)
    state = model.new_state(batch=1)
    model(tokens, state=state)
    carried = state.layers[0].ssm
    before = carried.detach().clone()
    with torch.no_grad():
        model(tokens[:, :1], state=state)
    assert torch.equal(carried, before) and not state.layers[0].ssm.requires_grad


@torch.no_grad()
def test_steps_of_any_size_are_taken_as_they_are():
    """dt is softplus(raw + bias) and nothing else: 1e-9 and 40 go through prefill and decoding alike."""
    for bias, expected in ((-20.0, math.exp(-20)), (40.0, 40.0)):
        model = tiny("mamba", pattern="M")
        mixer = model.backbone.layers[0].mixer
        mixer.dt_bias.fill_(bias)
        mixer.in_proj.weight[-mixer.heads :] = 0
        tokens, state = random_tokens(1, 12), model.new_state(batch=1)
        seen = []
        scan = mixer.scan
        mixer.scan = lambda x, dt, *rest, scan=scan, seen=seen: seen.append(dt) or scan(x, dt, *rest)
        whole = model(tokens)
        steps = torch.cat([model(tokens[:, t : t + 1], state=state) for t in range(12)], 1)
        torch.testing.assert_close(steps, whole)
        assert len(seen) == 13
        for dt in seen:
            torch.testing.assert_close(dt, torch.full_like(dt, expected), rtol=1e-6, atol=0)


def test_load_draws_what_build_draws():
    """A size is drawn in the asked dtype, and the same twice."""
    one, two = trimaran.load("300k"), trimaran.load("300k")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert trimaran.load("300k", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert build(tiny_config("dense"), device="meta").device.type == "meta"


@torch.no_grad()
def test_a_state_with_room_is_never_copied():
    """Keys and values stay where they were put; a state that runs out of room goes on as one without."""
    model, tokens = tiny("latent"), random_tokens(2, 700)
    roomy, plain = model.new_state(2, room=600), model.new_state(2)
    seen = []
    for first, last in ((0, 300), (300, 600), (600, 700)):
        ours, theirs = (model.hidden(tokens[:, first:last], state=state) for state in (roomy, plain))
        torch.testing.assert_close(ours, theirs)
        seen.append([layer.k.data_ptr() for layer in roomy.layers if isinstance(layer, AttentionState)])
    assert seen[0] and seen[0] == seen[1]
    assert not set(seen[1]) & set(seen[2])
