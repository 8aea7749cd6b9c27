"""Drafting changes how many tokens a pass gives and never which."""

import pytest
import torch

from tests.models import KINDS, tiny
from trimaran.engine.plain import Batch, generate, prefill
from trimaran.engine.row import open_rows
from trimaran.engine.sampler import Sampling
from trimaran.errors import Refusal

every_draft = pytest.mark.parametrize("draft", [1, 2, 3, 4, 5])
drafting_kinds = pytest.mark.parametrize("kind", [kind for kind, sizes in KINDS.items() if "mtp_pattern" in sizes])


def compare(model, prompts, settings, draft: int, tokenizer=None) -> list:
    """Outputs with drafting, after comparing them with those without."""
    plain = generate(model, prompts, settings, tokenizer=tokenizer)
    drafted = generate(model, prompts, settings, tokenizer=tokenizer, draft=draft)
    for one, other in zip(plain, drafted, strict=True):
        assert one.tokens == other.tokens
        assert (one.text, one.finish, one.stop) == (other.text, other.finish, other.stop)
        assert (one.drafted, one.accepted, one.passes) == (0, 0, len(one.tokens))
        assert 0 <= other.accepted <= other.drafted
        # every pass adds the sampler's own token to what it accepted, unless the row ended within the drafts
        assert other.passes <= len(other.tokens) - other.accepted + 1
    return drafted


@every_draft
@drafting_kinds
def test_random_weights(kind, draft):
    """A vocabulary of 5, so that random drafts are right now and then, and end tokens are met everywhere."""
    model = tiny(kind, vocab_size=5)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, (n,), generator=generator).tolist() for n in (1, 2, 17, 30, 9, 4)]
    settings = [
        Sampling(temperature=0, max_tokens=14, ignore_eos=True),
        Sampling(temperature=0, max_tokens=1),
        Sampling(temperature=0, max_tokens=16, repetition_penalty=1.2),
        Sampling(temperature=1.0, max_tokens=12, seed=3),
        Sampling(temperature=0.8, top_k=3, top_p=0.9, max_tokens=18, seed=4, ignore_eos=True, samples=2),
        Sampling(temperature=0, max_tokens=18, stop_ids=(3,), ignore_eos=True),
    ]
    outputs = compare(model, prompts, settings, draft)
    assert sum(output.accepted for output in outputs) > 0
    assert sum(output.accepted for output in outputs) < sum(output.drafted for output in outputs)


@every_draft
@pytest.mark.parametrize("penalty", [1.0, 1.1])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_model_that_has_half_learnt_to_copy(copier, tokenizer, pattern_prompts, temperature, penalty, draft):
    settings = [
        Sampling(temperature=temperature, repetition_penalty=penalty, max_tokens=10 + 6 * i, seed=i) for i in range(6)
    ]
    outputs = compare(copier, pattern_prompts(), settings, draft, tokenizer)
    if penalty == 1:
        share = sum(output.accepted for output in outputs) / sum(output.drafted for output in outputs)
        assert 0.05 < share < 0.95
        assert any(output.passes < len(output.tokens) for output in outputs)


@every_draft
def test_an_end_token_inside_an_accepted_run(copier, pattern_prompts, draft):
    """Every token of a continuation in turn is made the end token."""
    prompts = pattern_prompts()
    whole = generate(copier, prompts, Sampling(temperature=0, max_tokens=20))
    for place in range(0, 20, 3):
        ends = [output.tokens[min(place, len(output.tokens) - 1)] for output in whole]
        settings = [Sampling(temperature=0, max_tokens=20, stop_ids=(end,)) for end in ends]
        for output, end in zip(compare(copier, prompts, settings, draft), ends, strict=True):
            assert output.finish == "eos" and output.stop == end and output.tokens.count(end) == 1


@pytest.mark.parametrize("draft", [2, 5])
def test_fp32_differs_only_where_two_tokens_are_as_likely(copier, pattern_prompts, draft):
    model, prompts = tiny("latent", torch.float32, vocab_size=copier.config.vocab_size), pattern_prompts()
    model.load_state_dict(copier.state_dict())
    greedy = Sampling(temperature=0, max_tokens=40)
    for prompt, one, other in zip(
        prompts, generate(model, prompts, greedy), generate(model, prompts, greedy, draft=draft), strict=True
    ):
        if one.tokens != other.tokens:
            same = next(i for i, pair in enumerate(zip(one.tokens, other.tokens)) if pair[0] != pair[1])
            top = model(torch.tensor([prompt + one.tokens[:same]]))[0, -1].topk(2).values
            assert top[0] - top[1] <= 1e-4


@torch.no_grad()
def test_the_draft_block_remembers_what_the_whole_model_said(copier, pattern_prompts):
    """After any run of accepted and refused drafts its memory is that of one pass over the text, no draft in it."""
    prompts = pattern_prompts()
    rows = open_rows(copier.config, prompts, [Sampling(temperature=0, max_tokens=100, ignore_eos=True)] * 6, None)
    state, hidden = prefill(copier, prompts, block=16, drafting=True)
    batch = Batch(copier, rows, state, None, prompts)
    batch.take(hidden, batch.nothing_drafted())
    for k in (3, 1, 5, 2):
        drafts = batch.draft(k)
        batch.state.mark()
        batch.take(copier.hidden(torch.cat([batch.newest_B1, drafts], 1), state=batch.state), drafts)
    batch.draft(1)  # reads the last accepted run
    for place, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        text = torch.tensor([prompt + row.output.tokens])
        fresh = copier.new_state(1)
        copier.mtp(copier.hidden(text[:, :-1], state=fresh), text[:, 1:], state=fresh.mtp)
        for memory, expected in ((batch.state, fresh), (batch.state.mtp, fresh.mtp)):
            length = int(expected.lengths_B)
            assert int(memory.lengths_B[place]) == length
            for one, other in zip(memory.layers, expected.layers, strict=True):
                if hasattr(one, "ssm"):
                    torch.testing.assert_close(one.ssm[place], other.ssm[0], rtol=1e-9, atol=1e-9)
                    torch.testing.assert_close(one.tail[place], other.tail[0], rtol=1e-9, atol=1e-9)
                elif one is not None:
                    torch.testing.assert_close(one.k[place, :length], other.k[0, :length], rtol=1e-9, atol=1e-9)
                    torch.testing.assert_close(one.v[place, :length], other.v[0, :length], rtol=1e-9, atol=1e-9)


def test_a_model_without_a_draft_block_refuses():
    with pytest.raises(Refusal, match=r"^draft = 3; allowed: 0, for this model has no draft block \(MTP\); next: "):
        generate(tiny("mamba"), [[3]], Sampling(), draft=3)
    with pytest.raises(Refusal, match=r"^draft = -1; allowed: "):
        generate(tiny("latent"), [[3]], Sampling(), draft=-1)
