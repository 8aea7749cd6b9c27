"""The loss of a policy: planted ratios, REINFORCE's gradient, packing and parts that change nothing."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tests.models import KINDS
from tests.rl import toys
from tests.rl.test_streams import drawn
from trimaran.errors import Refusal
from trimaran.model.moe import Router
from trimaran.ops.logprobs import token_laws_reference
from trimaran.rl.objective import Chosen, PolicyGradient, importance, over_rollouts, policy_loss
from trimaran.rl.recipe import PolicySettings
from trimaran.rl.source import logprobs, with_logprobs
from trimaran.rl.streams import Example, pack

PLAIN = PolicySettings(importance="none", gate=None, gap_limit=None)
VALUES = [0.1, 0.4, 0.6, 1.0, 1.9, 4.0, 6.0]


def chosen(ratios: list[float], advantages: list[float] | None = None, **streams: torch.Tensor) -> Chosen:
    """Tokens whose probability in the trainer is `ratios` times the sampler's, each a rollout of its own."""
    count = len(ratios)
    behaviour_M = torch.full((count,), -2.0, dtype=torch.float64)
    fields = {
        "weights_M": torch.full((count,), 1 / count, dtype=torch.float64),
        "advantages_M": torch.tensor(advantages or [1.0] * count, dtype=torch.float64),
        "behaviour_M": behaviour_M,
        "rollouts_M": torch.arange(count),
        "proximal_M": behaviour_M + torch.tensor(ratios, dtype=torch.float64).log(),
    }
    return Chosen(**{**fields, **streams})


@pytest.mark.parametrize(
    ("rule", "bounds", "expected"),
    [
        ("none", None, [1] * 7),
        ("tis", None, [0.1, 0.4, 0.6, 1.0, 1.9, 4.0, 5.0]),
        ("tis", (0.2, 5.0), [0.2, 0.4, 0.6, 1.0, 1.9, 4.0, 5.0]),
        ("icepop", None, [0, 0, 0.6, 1.0, 1.9, 4.0, 0]),
        ("seq-mask-tis", None, [0, 0, 0, 1.0, 0, 0, 0]),
    ],
)
def test_importance_rules_on_planted_ratios(rule, bounds, expected):
    settings = PolicySettings(importance=rule, importance_range=bounds, gate=None)
    assert importance(chosen(VALUES), settings).tolist() == pytest.approx(expected)


def test_a_sequence_mask_looks_at_the_geometric_mean():
    ratios = [2.0, 0.5, 1.0, 1.1]  # the first two undo one another, the last two do not
    found = importance(
        chosen(ratios, rollouts_M=torch.tensor([0, 0, 1, 1])), PolicySettings(importance="seq-mask-tis", gate=None)
    )
    assert found.tolist() == pytest.approx([2.0, 0.5, 0, 0])


def test_the_gate_drops_whole_rollouts():
    ratios = [4.0, 1.0, 0.2, 1.0]  # mean exp|Δ| of the rollouts: 2.5 and 3
    rollouts_M = torch.tensor([0, 0, 1, 1])
    settings = PolicySettings(importance="none", gate=2.7)
    assert importance(chosen(ratios, rollouts_M=rollouts_M), settings).tolist() == [1, 1, 0, 0]
    assert importance(chosen(ratios, rollouts_M=rollouts_M), settings.replace(gate=2.0)).tolist() == [0] * 4


def test_means_over_rollouts():
    found = over_rollouts(torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([7, 7, 2, 7]))
    assert found.tolist() == pytest.approx([8 / 3, 8 / 3, 3, 8 / 3])


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.27, 1, True), (1.29, 1, False), (0.5, 1, True), (0.81, -1, True), (0.79, -1, False), (1.5, -1, True)],
)
def test_the_clip_is_higher_than_it_is_low(ratio, advantage, moves):
    tokens = chosen([1.0], [advantage])
    logp_M = (tokens.proximal_M + math.log(ratio)).requires_grad_()
    loss, reported = policy_loss(logp_M, tokens, PLAIN)
    loss.backward()
    assert bool(logp_M.grad.any()) == moves
    assert reported["clipped"] == (0 if moves else 1)


def test_advantages_are_clipped():
    tokens = chosen([1.0, 1.0], [50.0, -50.0])
    logp_M = tokens.proximal_M.clone().requires_grad_()
    policy_loss(logp_M, tokens, PLAIN.replace(advantage_clip=20))[0].backward()
    assert logp_M.grad.tolist() == pytest.approx([-10, 10])


def test_the_divergence_from_the_reference():
    tokens = chosen([1.0], [0.0], reference_M=torch.tensor([-1.0], dtype=torch.float64))
    logp_M = tokens.proximal_M.clone().requires_grad_()
    loss, reported = policy_loss(logp_M, tokens, PLAIN.replace(kl=0.1))
    loss.backward()
    k3 = math.exp(1) - 1 - 1  # the reference is e times as likely
    assert reported["kl"] == pytest.approx(k3) and loss.item() == pytest.approx(0.1 * k3)
    assert logp_M.grad.item() == pytest.approx(0.1 * (1 - math.exp(1)))


# on models


def batch(model, count: int = 12, row: int = 64):
    """Packed random rollouts whose behaviour is what `model` itself gives their tokens."""
    examples = drawn(count)
    counted = [replace(one, proximal=None, reference=None, teacher=None, weight=1 / size(examples)) for one in examples]
    sampled = with_logprobs(model, counted, "proximal", row, 0, 1.0)
    return [
        replace(one, rollout=replace(one.rollout, logprobs=one.proximal), proximal=None)  # type: ignore[arg-type]
        for one in sampled
    ]


def size(examples: list[Example]) -> int:
    return sum(len(one.rollout.said) for one in examples)


def gradients(model, objective, parts) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total = 0.0
    for part in parts:
        loss, _ = objective.terms(part)
        loss.backward()
        total += loss.item()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": torch.tensor(total, dtype=torch.float64)}


def same(one: dict, other: dict, tolerance: float = 1e-9) -> None:
    assert one.keys() == other.keys()
    for name in one:
        scale = max(1e-3, float(other[name].abs().max()))
        assert float((one[name] - other[name]).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("kind", ["everything", "qwen", "ngpt"])
def test_on_policy_the_gradient_is_that_of_reinforce(kind):
    model, _ = toys.pair(kind, torch.float64)
    model.train()
    examples = batch(model)
    objective = PolicyGradient(model, PolicySettings())
    found = gradients(model, objective, [pack(examples, 64, 0)])
    model.zero_grad()
    total = size(examples)
    for one in examples:  # one text at a time, nothing packed, all logits at once
        ids = torch.tensor(one.rollout.ids)
        said = torch.tensor(one.rollout.said)
        hidden = model.hidden(ids[None])[0, said - 1]
        logp = token_laws_reference(hidden, model.head, ids[said])[0]
        (-one.advantage * logp.sum() / total).backward()
    reinforce = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    # the streams hold advantages and log-probabilities in fp32
    same({name: value for name, value in found.items() if name != "loss"}, reinforce, 1e-6)


@pytest.mark.parametrize("settings", [PLAIN, PolicySettings(kl=0.1, importance="tis")], ids=["plain", "kl"])
def test_parts_and_rows_change_nothing(settings):
    model, _ = toys.pair("everything", torch.float64)
    model.train()
    objective = PolicyGradient(model, settings)
    examples = [replace(one, teacher=None) for one in drawn(16)]
    if not settings.kl:
        examples = [replace(one, reference=None) for one in examples]
    whole = pack(examples, 64, 0)
    rows = len(whole.tokens_BT)
    assert rows >= 4
    expected = gradients(model, objective, [whole])
    for borders in ([0, rows // 2, rows], [0, 1, 2, 3, rows]):
        parts = [whole.rows(start, stop) for start, stop in pairwise(borders)]
        same(gradients(model, objective, parts), expected)
    alone = [pack([one], 1, 0) for one in examples]
    same(gradients(model, objective, [replace(one, trained=whole.trained) for one in alone]), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "E" in KINDS[kind]["pattern"] and kind != "qwen"])
def test_routers_stand_still_while_their_bias_follows_the_load(kind):
    model, _ = toys.pair(kind, torch.float32)
    model.train()
    objective = PolicyGradient(model, PLAIN, router_bias_rate=1e-3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    routers = [module for name, module in model.named_modules() if isinstance(module, Router) and "mtp" not in name]
    before = [(one.weight.clone(), one.e_score_correction_bias.clone()) for one in routers]
    objective.terms(pack(batch(model), 64, 0))[0].backward()
    assert objective.observed()["max_vio"] > 0
    optimizer.step()
    objective.after_step()
    for router, (weight, bias) in zip(routers, before, strict=True):
        assert torch.equal(router.weight, weight)
        assert ((router.e_score_correction_bias - bias).abs() - 1e-3).abs().max() < 1e-6


def test_the_draft_block_is_left_alone():
    model, _ = toys.pair("latent")
    PolicyGradient(model, PLAIN)
    assert not any(p.requires_grad for p in model.mtp.parameters())


def test_trainer_and_sampler_apart_stop_the_run():
    model, _ = toys.pair("mamba")
    examples = batch(model)
    moved = [replace(one.rollout, logprobs=tuple(x - 0.2 for x in one.rollout.logprobs)) for one in examples]
    streams = pack([replace(one, rollout=other) for one, other in zip(examples, moved)], 64, 0)
    objective = PolicyGradient(model, PolicySettings(gap_limit=1.1))
    objective.terms(streams)
    with pytest.raises(Refusal, match=r"mean exp\|Δ log p\| = 1\.22") as refused:
        objective.observed()
    assert "policy.gap_limit = 1.1" in str(refused.value)
    objective.terms(pack(examples, 64, 0))
    assert objective.observed()["gap"] == pytest.approx(1, abs=1e-5)


def test_a_teacher_who_is_the_student_teaches_nothing():
    model, _ = toys.pair("everything", torch.float64)
    examples = [replace(one, advantage=0.0) for one in batch(model)]
    taught = with_logprobs(model, examples, "teacher", 64, 0, 1.0)
    taught = with_logprobs(model, taught, "proximal", 64, 0, 1.0)
    found = gradients(model, PolicyGradient(model, PLAIN), [pack(taught, 64, 0)])
    assert all(float(value.abs().max()) < 1e-6 for value in found.values())


def test_entropy_and_log_probabilities_at_a_temperature():
    model, _ = toys.pair("attention", torch.float64)
    examples = batch(model)
    streams = pack(examples, 64, 0)
    entropies = [PolicyGradient(model, PLAIN, temperature=t).terms(streams)[1]["entropy"] for t in (0.5, 1.0)]
    assert entropies[0] < entropies[1]
    cold, warm = logprobs(model, streams, 0.5), logprobs(model, streams, 1.0)
    assert cold.dtype == torch.float64 and not torch.allclose(cold, warm)
