"""Generation against a loop that recomputes the whole text at every step, for every layer kind."""

import pytest
import torch

from tests.models import KINDS, tiny
from trimaran.engine.plain import BLOCK, LONG, block_of, generate, prefill
from trimaran.engine.sampler import Sampling, draw, key_of, probabilities, uniform
from trimaran.errors import Refusal

LENGTHS = (1, 5, 23, 41)
every_kind = pytest.mark.parametrize("kind", KINDS)


def random_prompts(lengths=LENGTHS, vocab: int = 97, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def naive(model, prompt: list[int], settings: Sampling, sample: int = 0) -> list[int]:
    """One prompt, one whole forward per token, nothing remembered."""
    tokens, said, key = list(prompt), [], key_of(settings.seed, sample, prompt)
    while len(said) < settings.max_tokens:
        logits = model(torch.tensor([tokens]))[:, -1]
        seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool)
        seen[0, tokens] = True
        law = probabilities(logits, [settings], seen)
        said.append(int(draw(law, [uniform(key, len(said))])))
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


@every_kind
def test_a_row_alone_equals_the_row_in_a_batch(kind):
    model, prompts = tiny(kind), random_prompts()
    batched = generate(model, prompts, SETTINGS)
    for prompt, settings, output in zip(prompts, SETTINGS, batched, strict=True):
        alone = generate(model, [prompt], settings)[0]
        assert (alone.tokens, alone.finish, alone.passes) == (output.tokens, output.finish, output.passes)


def test_samples_differ_and_a_seed_repeats_them():
    model, prompt = tiny("dense"), [3, 4, 5]
    one = Sampling(samples=4, seed=11, max_tokens=8, ignore_eos=True)
    outputs = generate(model, [prompt, [9]], [one, Sampling(max_tokens=2, seed=1)])
    assert [(output.prompt, output.sample) for output in outputs] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert len({tuple(output.tokens) for output in outputs[:4]}) == 4
    assert [o.tokens for o in outputs[:4]] == [naive(model, prompt, one, sample) for sample in range(4)]
    first = generate(model, [prompt], one.replace(seed=None))
    again = generate(model, [prompt], one.replace(seed=first[0].seed))
    assert [o.tokens for o in first] == [o.tokens for o in again]
    assert first[0].tokens != generate(model, [prompt], one.replace(seed=first[0].seed + 1))[0].tokens


@pytest.mark.parametrize("draft", [0, 2])
@torch.no_grad()
def test_logprobs_are_those_of_one_pass_over_the_text(draft):
    model, prompts = tiny("latent", vocab_size=7), random_prompts(vocab=7)
    one = Sampling(temperature=0.6, top_k=4, repetition_penalty=1.1, max_tokens=10, logprobs=True, seed=5)
    silent = Sampling(temperature=0, max_tokens=10)
    outputs = generate(model, prompts, [one, one, one, silent], draft=draft)
    assert outputs[3].logprobs is None and outputs[3].law_logprobs is None
    for prompt, output in zip(prompts[:3], outputs, strict=False):
        text = prompt + output.tokens
        logits = model(torch.tensor([text]))[0, len(prompt) - 1 : -1]
        chosen = torch.tensor(output.tokens)[:, None]
        expected = logits.log_softmax(-1).gather(1, chosen)[:, 0]
        torch.testing.assert_close(torch.tensor(output.logprobs).double(), expected, rtol=1e-6, atol=1e-6)
        for place, reported in enumerate(output.law_logprobs):
            seen = torch.zeros(1, 7, dtype=torch.bool)
            seen[0, text[: len(prompt) + place]] = True
            law = probabilities(logits[place : place + 1], [one], seen)[0, output.tokens[place]]
            assert reported == pytest.approx(float(law.log()), abs=1e-6)


@torch.no_grad()
def test_prefill_keeps_logits_and_activations_small():
    """However long the prompt: one place per row meets the head, and `block` tokens at a time meet the layers."""
    model, widths, heads = tiny("latent"), [], []
    model.backbone.embeddings.register_forward_hook(lambda module, given, out: widths.append(out.shape[1]))
    model.lm_head.register_forward_hook(lambda module, given, out: heads.append(tuple(out.shape)))
    generate(model, random_prompts((100, 3)), Sampling(max_tokens=2, ignore_eos=True), block=32)
    assert max(widths) == 32
    assert set(heads) == {(2, 1, 97)}


@torch.no_grad()
def test_a_long_prompt_is_read_in_smaller_blocks_on_a_cpu():
    model, widths = tiny("mamba"), []
    model.backbone.embeddings.register_forward_hook(lambda module, given, out: widths.append(out.shape[1]))
    for length, block in ((LONG, BLOCK), (LONG + 1, BLOCK // 2)):
        prompts = random_prompts((length,))
        widths.clear()
        _, hidden = prefill(model, prompts)
        assert set(widths) == {block} | ({length % block} - {0})
        torch.testing.assert_close(hidden, prefill(model, prompts, block=3000)[1], rtol=0, atol=1e-5)
    assert block_of(LONG + 1, torch.device("cuda")) == BLOCK


def test_end_tokens():
    model = tiny("dense", eos_token_id=None, stop_token_ids=(5, 6))
    said = generate(model, [[3]], Sampling(max_tokens=400, seed=1))[0]
    assert said.finish == "eos" and said.stop in (5, 6) and said.tokens[-1] == said.stop
    assert not {5, 6} & set(said.tokens[:-1])
    onward = generate(model, [[3]], Sampling(max_tokens=400, seed=1, ignore_eos=True))[0]
    assert onward.finish == "length" and onward.tokens[: len(said.tokens)] == said.tokens
    asked = generate(model, [[3]], Sampling(max_tokens=400, seed=1, ignore_eos=True, stop_ids=(said.tokens[0],)))[0]
    assert asked.tokens == said.tokens[:1] and asked.finish == "eos"


def test_no_prompts_give_no_outputs():
    assert generate(tiny("mamba"), []) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "said"),
    [
        ([[3], []], {}, "prompt 1 is empty; allowed: at least one token; next: begin it with the bos token, 1"),
        ([[3, 97]], {}, "token id 97 in prompt 0; allowed: 0 to 96; next: "),
        ([[-1]], {}, "token id -1 in prompt 0; allowed: 0 to 96; next: "),
        ([[3]], {"stop": ("a",)}, "stop = ['a'] without a tokenizer; allowed: stop_ids; next: "),
    ],
)
def test_refusals(prompts, settings, said):
    with pytest.raises(Refusal) as refusal:
        generate(tiny("mamba"), prompts, Sampling(**settings))
    assert str(refusal.value).startswith(said)


def test_a_broken_model_is_refused():
    model = tiny("dense")
    with torch.no_grad():
        model.backbone.norm_f.weight[3] = torch.nan
    with pytest.raises(Refusal, match=r"^logits that are no numbers; "):
        generate(model, [[3]], Sampling(temperature=0))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bf16(temperature):
    model, prompts = tiny("everything", torch.bfloat16), random_prompts()
    settings = Sampling(temperature=temperature, max_tokens=8, logprobs=True, seed=1, ignore_eos=True)
    for output in generate(model, prompts, settings, draft=2):
        assert len(output.tokens) == 8 and max(output.logprobs) <= 0
