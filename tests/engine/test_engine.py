"""The engine says what plain generation says, whatever shares the pass."""

import random

import pytest
import torch

from tests.engine.workloads import at_rest, compare, oracle, requests, settings, small, squeezed
from tests.models import KINDS, tiny
from trimaran.engine.engine import Engine
from trimaran.engine.plain import generate
from trimaran.engine.request import EngineSettings, Request
from trimaran.engine.sampler import Sampling
from trimaran.errors import Refusal

GREEDY = Sampling(temperature=0, max_tokens=6, seed=1, ignore_eos=True)


@pytest.mark.parametrize("kind", KINDS)
def test_random_work_with_random_settings(kind):
    random_work(kind, random.Random(kind), most=7)


def random_work(kind: str, dice: random.Random, most: int) -> None:
    """Twice, the second time with what the first left in the cache."""
    model = small(kind, dice.choice([5, 7, 97]))
    asked = requests(dice, model.config.vocab_size, dice.randrange(1, most))
    expected = oracle(model, asked)
    engine = Engine(model, settings=settings(dice, model, asked))
    for _ in range(2):
        compare(engine.generate(asked), expected)
        assert not engine.faults()
    at_rest(engine)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(150))
def test_more_random_work(seed):
    dice = random.Random(seed)
    random_work(dice.choice(list(KINDS)), dice, most=14)


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_as_many_samples_begin_as_the_pass_has_tokens(samples):
    """All of them go on from their prompt's last token, also where another prompt's tokens make up their number."""
    model = small("dense", 97)
    sampling = Sampling(temperature=1.0, max_tokens=4, samples=samples, seed=1, ignore_eos=True)
    longer = Sampling(temperature=1.0, max_tokens=2, seed=2, ignore_eos=True)
    asked = [Request((3, 40, 7, 81, 22, 9, 64), sampling), Request(tuple(range(5, 35)), longer)]
    for tokens in range(1, 6):
        engine = Engine(model, settings=EngineSettings(rows=6, tokens_per_pass=tokens, prefix_cache=False))
        compare(engine.generate(asked), oracle(model, asked))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("drafter", ["none", "mtp", "lookup", "model"])
def test_every_drafter_with_memory_for_two_rows_of_four(drafter, cache):
    """Preempted rows are drafted for again when they come back, and say the same."""
    dice, model = random.Random(1), small("everything", 5)
    asked = [
        Request(
            tuple(dice.randrange(5) for _ in range(20 + 3 * number)),
            Sampling(temperature=[0, 0.8][number % 2], max_tokens=16, seed=number, ignore_eos=True),
        )
        for number in range(6)
    ]
    chosen = EngineSettings(rows=4, page=4, tokens_per_pass=24, drafter=drafter, prefix_cache=cache, snapshots=2)
    chosen = squeezed(chosen, model, 18)
    if drafter == "model":  # whose own memory counts too
        chosen = chosen.replace(memory_bytes=3 * chosen.memory_bytes)
    draft_model = tiny("mamba", vocab_size=5, seed=3) if drafter == "model" else None
    engine = Engine(model, settings=chosen, draft_model=draft_model)
    compare(engine.generate(asked), oracle(model, asked))
    stats = engine.stats()
    assert stats.preemptions > 0 or drafter == "model"
    assert (stats.accepted > 0) == (stats.drafted > 0) == (drafter != "none")
    if drafter == "model":
        assert engine.drafter.memory.free_slots == engine.drafter.memory.total_slots
        assert engine.drafter.memory.free_pages == engine.drafter.memory.total_pages
    at_rest(engine)


def test_drafts_spare_passes(copier, pattern_prompts):
    asked = [Request(tuple(prompt), Sampling(temperature=0, max_tokens=40, seed=1)) for prompt in pattern_prompts()]
    expected = oracle(copier, asked)
    passes = {}
    for drafter in ("none", "mtp", "lookup"):
        engine = Engine(copier, settings=EngineSettings(rows=8, drafter=drafter, draft=3))
        compare(engine.generate(asked), expected)
        passes[drafter] = engine.stats().passes
    assert passes["mtp"] < passes["none"] and passes["lookup"] < passes["none"]


@torch.no_grad()
@pytest.mark.parametrize("drafter", ["none", "mtp"])
def test_logprobs_in_fp32_are_those_of_one_forward(drafter):
    model = tiny("everything", torch.float32)
    dice = random.Random(5)
    asked = [
        Request(
            tuple(dice.randrange(97) for _ in range(n)), Sampling(max_tokens=12, seed=n, logprobs=True), top_logprobs=3
        )
        for n in (1, 9, 33, 70)
    ]
    engine = Engine(model, settings=EngineSettings(rows=4, page=4, tokens_per_pass=32, drafter=drafter))
    pieces = []
    for one in asked:
        engine.submit(one)
    while not engine.idle:
        pieces += engine.step()
    for one in asked:
        own = [piece for piece in pieces if piece.request == one.id]
        output = own[-1].output
        said = [token for piece in own for token in piece.tokens]
        assert said == output.tokens
        logits = model(torch.tensor([[*one.prompt, *said]]))[0, len(one.prompt) - 1 : -1].double().log_softmax(-1)
        expected = logits.gather(1, torch.tensor(said)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(output.logprobs).double(), expected, rtol=0, atol=1e-4)
        assert [value for piece in own for value in piece.logprobs] == output.logprobs
        top = [pairs for piece in own for pairs in piece.top]
        best = logits.topk(3)
        torch.testing.assert_close(torch.tensor([[v for _, v in pairs] for pairs in top]).double(), best.values,
                                   rtol=0, atol=1e-4)  # fmt: skip


def test_samples_read_their_prompt_once():
    model, prompt = small("dense", 97), tuple(range(50))
    one = Request(prompt, Sampling(samples=8, seed=3, max_tokens=5, ignore_eos=True))
    engine = Engine(model, settings=EngineSettings(rows=8, page=4, prefix_cache=False))
    compare(engine.generate([one]), oracle(model, [one]))
    assert engine.stats().prompt_tokens == 50
    few = Engine(model, settings=squeezed(EngineSettings(rows=3, page=4, snapshots=4), model, 30))
    outputs = list(few.generate([one]))  # more samples than rows: the rest take the prompt from the cache
    compare(iter(outputs), oracle(model, [one]))
    assert max(output.cached for output in outputs[3:]) == 49
    at_rest(few)


def test_nobody_is_put_off():
    """Behind long prompts in chunks, every row that decodes gets a token in every pass, and the prompts go on."""
    model, dice = small("dense", 97), random.Random(2)
    engine = Engine(model, settings=EngineSettings(rows=6, tokens_per_pass=16, page=4))
    for number in range(6):
        prompt = tuple(dice.randrange(97) for _ in range(3 if number < 3 else 120))
        engine.submit(Request(prompt, Sampling(max_tokens=32, seed=number, ignore_eos=True)))
    said: dict[str, int] = {}
    for _ in range(32):
        writing = {job.request.id for job in engine.scheduler.running if job.row.output.tokens}
        pieces = engine.step()
        assert writing <= {piece.request for piece in pieces}
        for piece in pieces:
            said[piece.request] = said.get(piece.request, 0) + len(piece.tokens)
    # 13 places per pass are left for 360 tokens of prompts
    assert len(said) == 6 and all(count >= 1 for count in said.values())


def test_priorities_go_first_and_make_lower_ones_wait():
    model = small("dense", 97)
    engine = Engine(model, settings=squeezed(EngineSettings(rows=2, page=4, snapshots=4), model, 16))
    slow = [Request(tuple(range(9)), Sampling(max_tokens=20, seed=n, ignore_eos=True), priority=5) for n in range(3)]
    for one in slow:
        engine.submit(one)
    for _ in range(4):
        engine.step()
    urgent = Request((4, 5, 6), Sampling(max_tokens=3, seed=9, ignore_eos=True), priority=-5)
    engine.submit(urgent)
    finished = []
    outputs = {}
    while not engine.idle:
        for piece in engine.step():
            if piece.output is not None:
                finished.append(piece.request)
                outputs[piece.request] = piece.output.tokens
    assert finished[0] == urgent.id and engine.stats().preemptions > 0
    expected = {one.id: output.tokens for one, output in zip([*slow, urgent], oracle(model, [*slow, urgent]))}
    assert outputs == expected
    at_rest(engine)


@pytest.mark.parametrize("where", ["stop string", "end token", "length"])
def test_an_end_inside_an_accepted_run(copier, tokenizer, pattern_prompts, where):
    prompts = pattern_prompts()
    whole = generate(copier, prompts, Sampling(temperature=0, max_tokens=20, ignore_eos=True), tokenizer=tokenizer)
    for place in range(0, 20, 7):
        each = []
        for output in whole:
            changes = {"max_tokens": place + 1}
            if where == "end token":
                changes = {"stop_ids": (output.tokens[place],)}
            elif where == "stop string" and output.text:
                start = place % len(output.text)
                changes = {"stop": (output.text[start : start + 2],)}
            each.append(Sampling(**{"temperature": 0, "max_tokens": 20, "ignore_eos": True, **changes}))
        expected = generate(copier, prompts, each, tokenizer=tokenizer)
        engine = Engine(copier, tokenizer, EngineSettings(rows=8, page=4, drafter="mtp", draft=4))
        outputs = list(engine.generate([Request(tuple(p), one) for p, one in zip(prompts, each, strict=True)]))
        for one, other in zip(outputs, expected, strict=True):
            assert (one.tokens, one.text, one.finish, one.stop) == (other.tokens, other.text, other.finish, other.stop)
        at_rest(engine)


def test_what_can_never_fit_is_refused_with_the_arithmetic():
    model = small("attention", 97)
    engine = Engine(model, settings=squeezed(EngineSettings(rows=2, page=8), model, 10))
    pages = engine.stats().total_pages
    with pytest.raises(Refusal) as refusal:
        engine.submit(Request((1,) * 50, Sampling(max_tokens=pages * 8 - 49)))
    total = pages * 8 + 1
    assert str(refusal.value).startswith(f"50 prompt tokens + max_tokens = {total - 50} make {total}; allowed: what ")
    assert f"{pages} pages x 8 = {pages * 8} tokens" in str(refusal.value)
    assert engine.idle
    assert engine.submit(Request((1,) * 50, Sampling(max_tokens=pages * 8 - 50)))


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(()), "prompt 0 is empty"),
        (Request((3, 97)), "token id 97"),
        (Request((3,), Sampling(stop=("a",))), "stop = ['a'] without a tokenizer"),
        (Request((3,), turns=(2,)), "a turn that ends after 2 tokens; allowed: 1 to 1"),
        (Request((3,), top_logprobs=98), "top_logprobs = 98; allowed: 0 to 97"),
    ],
)
def test_refusals(request_, said):
    engine = Engine(small("dense", 97))
    with pytest.raises(Refusal) as refusal:
        engine.submit(request_)
    assert str(refusal.value).startswith(said) and engine.idle


def test_settings_that_cannot_be():
    with pytest.raises(Refusal, match="without a draft block"):
        Engine(small("dense"), settings=EngineSettings(drafter="mtp"))
    with pytest.raises(Refusal, match='drafter = "model" without a draft model'):
        Engine(small("dense"), settings=EngineSettings(drafter="model"))
    with pytest.raises(Refusal, match="a vocabulary of 9"):
        Engine(small("dense"), settings=EngineSettings(drafter="model"), draft_model=small("dense", 9))
    with pytest.raises(Refusal, match="a memory of 100 B"):
        Engine(small("dense"), settings=EngineSettings(memory_bytes=100))
    assert not Engine(small("dense")).warnings
    assert "never hit" in Engine(small("dense"), settings=EngineSettings(snapshots=0)).warnings[0]
    assert not Engine(small("rope"), settings=EngineSettings(snapshots=0)).warnings


def test_new_weights_drop_the_cache_and_stop_what_runs():
    model = small("dense", 97)
    engine = Engine(model)
    one = Request(tuple(range(20)), GREEDY)
    before = [output.tokens for output in engine.generate([one])]
    with torch.no_grad():
        model.backbone.layers[0].mixer.out_proj.weight.neg_()
    model.version += 1
    after = list(engine.generate([one]))
    assert after[0].cached == 0 and [output.tokens for output in after] != before
    compare(iter(after), oracle(model, [one]))
    engine.submit(one)
    engine.step()
    model.version += 1
    with pytest.raises(RuntimeError, match="the weights changed from version 1 to 2 under 1 texts"):
        engine.step()
    assert engine.recover() == [one.id]
    compare(engine.generate([one]), oracle(model, [one]))


def test_a_model_of_no_numbers_fails_the_request_and_not_the_engine():
    model = small("dense", 97)
    engine = Engine(model)
    with torch.no_grad():
        kept = model.backbone.norm_f.weight.clone()
        model.backbone.norm_f.weight[3] = torch.nan
        with pytest.raises(Refusal, match=r"^logits that are no numbers; "):
            list(engine.generate([Request((3, 4), GREEDY)]))
        model.backbone.norm_f.weight.copy_(kept)
    compare(engine.generate([Request((3, 4), GREEDY)]), oracle(model, [Request((3, 4), GREEDY)]))
    at_rest(engine)


class Brittle:
    """A guide that breaks when it has been pushed `after` tokens."""

    ended = False

    def __init__(self, after: int):
        self.left = after

    def allowed(self) -> None:
        return None

    def push(self, token: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyError("broken")

    def fork(self) -> "Brittle":
        return Brittle(self.left)


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("drafter", ["none", "mtp"])
def test_a_guide_that_breaks_ends_its_own_request(drafter, after):
    model = small("latent", 5)
    engine = Engine(model, settings=EngineSettings(rows=4, page=4, drafter=drafter))
    good = [Request((1, 2, number), Sampling(max_tokens=9, seed=number, ignore_eos=True)) for number in range(3)]
    bad = Request((1, 2, 3), Sampling(max_tokens=9, seed=1, samples=2, ignore_eos=True), guide=lambda: Brittle(after))
    for one in (good[0], bad, *good[1:]):
        engine.submit(one)
    outputs, errors = {}, []
    while not engine.idle:
        for piece in engine.step():
            if piece.error is not None:
                errors.append((piece.request, piece.error))
            if piece.output is not None:
                outputs[piece.request] = piece.output.tokens
    assert errors[0][0] == bad.id and isinstance(errors[0][1], KeyError)
    assert [outputs[one.id] for one in good] == [output.tokens for output in oracle(model, good)]
    assert bad.id not in outputs
    at_rest(engine)
