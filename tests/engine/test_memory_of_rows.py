"""What a row remembers is what one pass over its text would: however it was read, forked, taken from the cache, taken
back after a draft, or read again."""

import random

import pytest
import torch

from tests.engine.workloads import requests, small, squeezed
from trimaran.engine.engine import Engine
from trimaran.engine.request import EngineSettings, Request
from trimaran.engine.sampler import Sampling, probabilities

NEAR = {"rtol": 1e-9, "atol": 1e-9}


@torch.no_grad()
def check_rows(engine: Engine) -> int:
    """Compares every running row's memory with a fresh state's; the number of rows that had any."""
    model, memory, drafting = engine.model, engine.memory, engine.settings.drafter == "mtp"
    checked = 0
    for job in engine.scheduler.running:
        if not job.length:
            continue
        checked += 1
        state = model.new_state(1)
        read = torch.tensor([job.text[: job.length + 1]])
        hidden = model.hidden(read[:, : job.length], state=state)
        pairs = min(job.length, read.shape[1] - 1)
        layers = [(place, layer, 0) for place, layer in enumerate(state.layers) if hasattr(layer, "k")]
        if drafting:
            told = job.sequence.mtp_length + engine.drafter.behind(job)
            assert told in (pairs, pairs - 1)  # one behind, where the cache was its last source
            if engine.drafter.behind(job):
                put_off = engine.drafter.waiting[job]
                assert put_off.following == job.text[job.sequence.mtp_length + 1 : told + 1]
                torch.testing.assert_close(torch.cat(put_off.hidden), hidden[0, job.sequence.mtp_length : told], **NEAR)
            model.mtp(hidden[:, :pairs], read[:, 1:], state=state.mtp)
            layers += [(place, layer, 1) for place, layer in enumerate(state.mtp.layers) if hasattr(layer, "k")]
            if told < pairs:
                torch.testing.assert_close(job.hidden, hidden[0, -1], **NEAR)
        places = torch.tensor([page * memory.page + row for page in job.sequence.pages for row in range(memory.page)])
        for number, (_, layer, shift) in enumerate(layers):
            length = job.sequence.mtp_length if shift else job.length
            for held, expected in zip(memory.flat_kv(number), (layer.k, layer.v), strict=True):
                torch.testing.assert_close(held[places[shift : shift + length]], expected[0, :length], **NEAR)
        for number, layer in enumerate(layer for layer in state.layers if hasattr(layer, "ssm")):
            torch.testing.assert_close(memory.tail[number, job.sequence.slot], layer.tail[0], **NEAR)
            torch.testing.assert_close(memory.ssm[number, job.sequence.slot], layer.ssm[0], **NEAR)
    return checked


@pytest.mark.parametrize("drafter", ["none", "mtp", "lookup"])
def test_rows_of_random_work(drafter):
    dice, model = random.Random(drafter), small("everything", 5)
    chosen = EngineSettings(
        rows=4,
        page=dice.choice([2, 4, 16]),
        tokens_per_pass=dice.choice([9, 20]),
        drafter=drafter,
        draft=3,
        snapshots=4,
        snapshot_every=8,
    )
    engine = Engine(model, settings=squeezed(chosen, model, 112 // chosen.page + 12))
    for one in requests(dice, 5, 8):
        engine.submit(one)
    checked = 0
    while not engine.idle:
        engine.step()
        if dice.random() < 0.3:
            checked += check_rows(engine)
    assert checked > 10


@pytest.mark.parametrize("drafter", ["mtp", "lookup"])
def test_drafts_after_a_hit_are_those_of_a_cold_start(copier, pattern_prompts, drafter):
    """A cache that kept a wrong state would not change a token, but the drafts would get worse."""
    engine = Engine(copier, settings=EngineSettings(rows=1, page=4, drafter=drafter, draft=3))
    for prompt in pattern_prompts()[::2]:
        one = Request(tuple(prompt), Sampling(temperature=0, max_tokens=30, seed=1, ignore_eos=True))
        cold, warm = next(iter(engine.generate([one]))), next(iter(engine.generate([one])))
        assert warm.cached == len(prompt) - 1 and warm.tokens == cold.tokens
        assert abs(warm.passes - cold.passes) <= 1 and abs(warm.accepted - cold.accepted) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
@pytest.mark.parametrize("drafter", ["mtp", "lookup"])
def test_the_joint_law_of_three_tokens(drafter, acceptance):
    """20,000 sampled sequences with drafts, against the exact law."""
    model, samples, said = small("latent", 4), 20_000, {}
    settings = EngineSettings(rows=250, tokens_per_pass=4000, drafter=drafter, draft=2, acceptance=acceptance)
    engine = Engine(model, settings=settings)
    sampling = Sampling(temperature=0.9, top_p=0.95, samples=250, max_tokens=3, ignore_eos=True)
    for seed in range(samples // 250):
        for output in engine.generate([Request((1, 2, 1, 2, 1, 2), sampling.replace(seed=seed))]):
            said[tuple(output.tokens)] = said.get(tuple(output.tokens), 0) + 1
    assert engine.stats().accepted > samples // 10
    law = exact_law(model, (1, 2, 1, 2, 1, 2), sampling)
    assert set(said) <= set(law)
    likely = {text: mass for text, mass in law.items() if mass * samples >= 5}
    observed = [said.get(text, 0) for text in likely] + [sum(n for text, n in said.items() if text not in likely)]
    expected = [mass * samples for mass in likely.values()]
    expected.append(samples - sum(expected))
    pairs = [(n, e) for n, e in zip(observed, expected, strict=True) if e >= 1]
    chi, freedom = sum((n - e) ** 2 / e for n, e in pairs), len(pairs) - 1
    assert abs(chi - freedom) / (2 * freedom) ** 0.5 < 4


@torch.no_grad()
def exact_law(model, prompt: tuple[int, ...], sampling: Sampling) -> dict[tuple[int, ...], float]:
    law = {(): 1.0}
    for _ in range(sampling.max_tokens):
        logits = model(torch.tensor([[*prompt, *text] for text in law]))[:, -1]
        rows = probabilities(logits, [sampling] * len(law)).tolist()
        law = {
            (*text, token): mass * p
            for (text, mass), row in zip(law.items(), rows, strict=True)
            for token, p in enumerate(row)
            if p
        }
    return law
