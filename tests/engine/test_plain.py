"""Generation against a loop that recomputes the whole text at every step, for every layer kind."""

import pytest
import torch

from tests.models import KINDS, tiny
from trimaran.engine.plain import generate
from trimaran.engine.sampler import Sampling, draw, probabilities, uniform

LENGTHS = (1, 5, 23, 41)
every_kind = pytest.mark.parametrize("kind", KINDS)
drafting_kinds = pytest.mark.parametrize("kind", [k for k, v in KINDS.items() if "mtp_pattern" in v])


def random_prompts(lengths=LENGTHS, vocab: int = 97, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def naive(model, prompt: list[int], settings: Sampling, sample: int = 0) -> list[int]:
    """One prompt, one whole forward per token, nothing remembered."""
    tokens, said = list(prompt), []
    while len(said) < settings.max_tokens:
        logits = model(torch.tensor([tokens]))[:, -1]
        seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool)
        seen[0, tokens] = True
        law = probabilities(logits, [settings], seen)
        said.append(int(draw(law, [uniform(settings.seed, sample, len(said))])))
        tokens.append(said[-1])
        if said[-1] == model.config.eos_token_id and not settings.ignore_eos:
            break
    return said


SETTINGS = [
    Sampling(temperature=0, max_tokens=12, seed=1),
    Sampling(max_tokens=9, seed=2),
    Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3, max_tokens=15, seed=3),
    Sampling(temperature=0, repetition_penalty=1.5, max_tokens=1, seed=4),
]


@every_kind
@pytest.mark.parametrize("block", [2048, 7])
def test_a_batch_of_mixed_rows_equals_the_naive_loop(kind, block):
    model, prompts = tiny(kind), random_prompts()
    outputs = generate(model, prompts, SETTINGS, block=block)
    for prompt, settings, output in zip(prompts, SETTINGS, outputs, strict=True):
        assert output.tokens == naive(model, prompt, settings)
        assert output.finish == ("eos" if output.tokens[-1] == 2 else "length")
