"""The law against transformers' own processors, and draws that follow it."""

import itertools
import math

import pytest
import torch
from scipy import stats
from transformers.generation import logits_process as oracle

from tests.models import tiny
from trimaran.engine.plain import generate
from trimaran.engine.sampler import Sampling, draw, key_of, probabilities, uniform
from trimaran.errors import Refusal

GRID = {
    "temperature": [0.3, 1.0, 1.7],
    "top_k": [0, 1, 5, 500],
    "top_p": [0.05, 0.8, 1.0],
    "min_p": [0.0, 0.1, 1.0],
    "repetition_penalty": [0.7, 1.0, 1.4],
}
EVERY_LAW = [Sampling(**dict(zip(GRID, values, strict=True))) for values in itertools.product(*GRID.values())]


def theirs(logits: torch.Tensor, one: Sampling, seen: list[int]) -> torch.Tensor:
    """One row through transformers' processors in the order in which its `generate` builds them."""
    ids, scores = torch.tensor([seen]), logits[None]
    steps = []
    if one.repetition_penalty != 1:
        steps.append(oracle.RepetitionPenaltyLogitsProcessor(one.repetition_penalty))
    if one.temperature != 1:
        steps.append(oracle.TemperatureLogitsWarper(one.temperature))
    if one.top_k:
        steps.append(oracle.TopKLogitsWarper(one.top_k))
    if one.top_p < 1:
        steps.append(oracle.TopPLogitsWarper(one.top_p))
    if one.min_p:
        steps.append(oracle.MinPLogitsWarper(one.min_p))
    for step in steps:
        scores = step(ids, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_law_is_that_of_transformers_alone_and_in_a_batch(dtype):
    vocab, generator = 61, torch.Generator().manual_seed(0)
    logits = torch.randn(len(EVERY_LAW), vocab, generator=generator).to(dtype) * 3
    logits[::2, 7] = logits[::2, 9]  # ties
    seen = torch.rand(logits.shape, generator=generator) < 0.3
    batched = probabilities(logits, EVERY_LAW, seen)
    for row, one in enumerate(EVERY_LAW):
        expected = theirs(logits[row], one, seen[row].nonzero()[:, 0].tolist())
        torch.testing.assert_close(batched[row], expected, rtol=1e-5, atol=1e-7)
        alone = probabilities(logits[row : row + 1], [one], seen[row : row + 1])
        torch.testing.assert_close(alone[0], batched[row], rtol=0, atol=0)


def test_greedy_is_the_likeliest_after_the_penalty_whatever_else_is_set():
    logits = torch.tensor([[3.0, 2.9, -1.0]])
    seen = torch.tensor([[True, False, False]])
    for others in ({}, {"top_k": 2, "top_p": 0.3, "min_p": 0.5}):
        one = Sampling(temperature=0, repetition_penalty=1.2, **others)
        assert probabilities(logits, [one], seen).tolist() == [[0, 1, 0]]
        mixed = probabilities(logits.repeat(2, 1), [one, Sampling()], seen.repeat(2, 1))
        assert mixed[0].tolist() == [0, 1, 0]
        torch.testing.assert_close(mixed[1], logits[0].softmax(-1))


def test_the_law_is_in_fp32_where_the_model_is_in_bf16():
    logits = torch.randn(2, 50).bfloat16()
    law = probabilities(logits, [Sampling(temperature=0.9, top_p=0.9)] * 2)
    assert law.dtype == torch.float32
    torch.testing.assert_close(law, probabilities(logits.float(), [Sampling(temperature=0.9, top_p=0.9)] * 2))


def test_uniform_numbers_are_uniform_and_independent():
    keys = [key_of(seed, sample, [prompt]) for seed in range(20) for sample in range(5) for prompt in (1, 2)]
    numbers = [uniform(key, place) for key in keys for place in range(50)]
    assert stats.kstest(numbers, "uniform").pvalue > 0.01
    for apart in (1, 50, 100):  # neighbours in place, prompt and sample
        assert abs(stats.pearsonr(numbers[apart:], numbers[:-apart]).statistic) < 0.03
    assert len(set(numbers)) == len(numbers)
    assert uniform(key_of(1, 2, [3, 4]), 5) == 0.681120505203326, "a seed means the same in every version"


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-300])
def test_a_temperature_next_to_0_is_greedy(temperature):
    logits = torch.tensor([[300.0, 301.0, -500.0]])
    assert probabilities(logits, [Sampling(temperature=temperature)]).tolist() == [[0, 1, 0]]


def test_a_token_without_mass_is_never_drawn():
    law = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]] * 4)
    assert draw(law, [0.0, 0.4999, 0.5, 1 - 2.0**-52]).tolist() == [1, 1, 3, 3]
    for size in (3, 1000, 50000):  # totals that rounding has moved off 1
        law = torch.rand(1, size, generator=torch.Generator().manual_seed(size)).softmax(-1)
        law[:, -1] = 0
        assert draw(law, [1 - 2.0**-52]).item() < size - 1


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 5e-324},
        {"temperature": 1e300},
        {"top_p": 5e-324},
        {"min_p": 5e-324},
        {"repetition_penalty": 0.01, "temperature": 1e-38},
        {"repetition_penalty": 100.0, "temperature": 1e-38},
    ],
)
def test_extreme_settings_choose_tokens_that_exist(extreme):
    model = tiny("latent", torch.float32, vocab_size=7)
    one = Sampling(max_tokens=6, logprobs=True, ignore_eos=True, seed=1, **extreme)
    (output,) = generate(model, [[3, 4, 5]], one)
    assert len(output.tokens) == 6 and all(0 <= token < 7 for token in output.tokens)
    assert all(math.isfinite(value) for value in output.logprobs)


@pytest.mark.parametrize("penalty", [5e-324, 0.001, 1e4, 1e308, math.inf, math.nan])
def test_a_penalty_that_overflows_is_refused(penalty):
    with pytest.raises(Refusal, match="repetition_penalty"):
        Sampling(repetition_penalty=penalty)


def test_samples_follow_the_joint_law_of_two_tokens():
    """Drawn with drafting, which gives the very tokens of plain sampling; the second may be a draft."""
    model, prompt, count, vocab = tiny("latent", vocab_size=7), [3, 4, 5, 3], 2000, 7
    one = Sampling(
        temperature=0.8,
        top_k=6,
        min_p=0.01,
        repetition_penalty=1.2,
        max_tokens=3,
        samples=count,
        ignore_eos=True,
        seed=9,
    )
    outputs = generate(model, [prompt], one, draft=2)
    assert 0 < sum(output.accepted for output in outputs) < count
    counts = torch.zeros(vocab, vocab, dtype=torch.float64)
    for output in outputs:
        counts[output.tokens[0], output.tokens[1]] += 1
    law = next_law(model, prompt, one)[:, None] * torch.stack(
        [next_law(model, [*prompt, token], one) for token in range(vocab)]
    )
    assert counts[law == 0].sum() == 0
    enough = law * count >= 5
    rest = counts[~enough].sum(), law[~enough].sum() * count
    observed, expected = [*counts[enough].tolist(), float(rest[0])], [*(law[enough] * count).tolist(), float(rest[1])]
    assert stats.chisquare(observed, expected).pvalue > 0.01
    assert len({tuple(output.tokens) for output in outputs}) > 20


@torch.no_grad()
def next_law(model, tokens: list[int], one: Sampling) -> torch.Tensor:
    seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool)
    seen[0, tokens] = True
    return probabilities(model(torch.tensor([tokens]))[:, -1], [one], seen)[0]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"temperature": -0.1}, "temperature = -0.1; allowed: a number >= 0"),
        ({"temperature": float("nan")}, "temperature = nan; allowed: a number >= 0"),
        ({"top_p": 0.0}, "top_p = 0.0; allowed: a number > 0 and <= 1"),
        ({"top_k": -1}, "top_k = -1; allowed: an integer >= 0"),
        ({"max_tokens": 0}, "max_tokens = 0; allowed: an integer >= 1"),
        ({"temperatur": 1}, "unknown key 'temperatur'; allowed: temperature, "),
        ({"stop": ("",)}, "stop"),
        ({"stop": 3}, "stop = 3; allowed: a list of strings"),
        ({"seed": -1}, "seed = -1; allowed: an integer >= 0"),
    ],
)
def test_settings_refuse(setting, said):
    with pytest.raises(Refusal) as refusal:
        Sampling(**setting)
    assert str(refusal.value).startswith(said)


def test_one_stop_string_may_stand_alone():
    assert Sampling(stop="END").stop == ("END",)
