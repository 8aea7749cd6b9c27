"""Constraints and budgets in the engine: the tokens of plain generation under the same rules, drafted for or not."""

import re
from collections.abc import Sequence

import pytest

from tests.engine.workloads import at_rest
from tests.models import tiny
from trimaran.engine.budget import Thinking
from trimaran.engine.constrain import Constraints
from trimaran.engine.engine import Engine
from trimaran.engine.guide import Guides
from trimaran.engine.plain import generate
from trimaran.engine.request import EngineSettings, Request
from trimaran.engine.sampler import Sampling
from trimaran.errors import Refusal

LOST = Refusal("a word that is not in the script", "the script", "keep to it")


@pytest.mark.parametrize(("drafter", "cache"), [("none", True), ("mtp", True), ("mtp", False), ("lookup", True)])
def test_rules_apply_inside_verification(tokenizer, drafter, cache):
    model, constraints = tiny("latent", vocab_size=330), Constraints(tokenizer)
    close = tokenizer.id_of("</think>")
    word = constraints.regex("[ab]{2,9}")

    def thinking(budget: int) -> Thinking:
        return Thinking(tokenizer, budget, opened=True)

    rules = [
        None,
        lambda: thinking(0),
        lambda: thinking(5),
        lambda: thinking(1),
        lambda: word.guide(),
        lambda: Guides(thinking(4), word.guide(opened=True)),
    ]
    prompts = [tokenizer.encode(f"the boat number {number}") for number in range(len(rules))]
    each = [
        Sampling(
            temperature=[0, 1.0][number % 2],
            max_tokens=24,
            seed=number,
            samples=1 + number % 3,
            stop_ids=tokenizer.stop_ids,
        )
        for number in range(len(rules))
    ]
    expected = generate(model, prompts, each, tokenizer=tokenizer, guides=rules)
    engine = Engine(
        model,
        tokenizer,
        EngineSettings(rows=3, page=4, tokens_per_pass=20, drafter=drafter, draft=3, prefix_cache=cache),
    )
    asked = [Request(tuple(p), one, guide=rule) for p, one, rule in zip(prompts, each, rules, strict=True)]
    for _ in range(2):
        outputs = list(engine.generate(asked))
        assert [(o.prompt, o.sample, o.tokens, o.text, o.finish) for o in outputs] == [
            (o.prompt, o.sample, o.tokens, o.text, o.finish) for o in expected
        ]
    for output in outputs:
        if output.prompt in (1, 2, 3):
            assert output.tokens.index(close) <= {1: 0, 2: 5, 3: 1}[output.prompt]
        if output.prompt == 4:
            assert re.fullmatch("[ab]{2,9}", output.text)
        if output.prompt == 5:
            assert re.fullmatch("[ab]{2,9}", output.text.split("</think>")[1].strip())
    at_rest(engine)


def test_rules_that_contradict_one_another_end_their_own_request(tokenizer):
    model, constraints = tiny("latent", vocab_size=330), Constraints(tokenizer)
    both = lambda: Guides(constraints.choice(["a"]).guide(), constraints.choice(["b"]).guide())  # noqa: E731
    engine = Engine(model, tokenizer, EngineSettings(rows=2, page=4))
    bad = Request((40, 41), Sampling(max_tokens=5, seed=1), guide=both)
    good = Request((40, 42), Sampling(max_tokens=5, seed=1))
    engine.submit(bad)
    engine.submit(good)
    pieces = []
    while not engine.idle:
        pieces += engine.step()
    problem = next(piece.error for piece in pieces if piece.request == bad.id)
    assert isinstance(problem, Refusal) and str(problem).startswith(
        "no token that the row's rules allow after 0 of its"
    )
    said = [piece.output.tokens for piece in pieces if piece.output is not None]
    assert said == [output.tokens for output in generate(model, [good.prompt], good.sampling, tokenizer=tokenizer)]
    at_rest(engine)


class Script:
    """A guide that cannot go on once it has been pushed a token that `said` does not hold at its place."""

    ended = False

    def __init__(self, said: Sequence[int], problem: Exception, silent: bool, read: int = 0):
        self.said, self.problem, self.silent, self.read = said, problem, silent, read

    def allowed(self) -> None:
        if self.read is None and self.silent:
            raise self.problem

    def push(self, token: int) -> None:
        right = self.read is not None and self.read < len(self.said) and self.said[self.read] == token
        self.read = self.read + 1 if right else None
        if not right and not self.silent:
            raise self.problem

    def fork(self) -> "Script":
        return Script(self.said, self.problem, self.silent, self.read)


@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
@pytest.mark.parametrize("drafter", ["mtp", "lookup"])
def test_what_a_guide_raises_along_a_draft_that_falls_never_happened(drafter, acceptance):
    model, prompt = tiny("latent", vocab_size=5), (1, 2, 3, 1, 2, 3, 1, 2)
    greedy = Sampling(temperature=0, max_tokens=12, seed=1, ignore_eos=True)
    said = generate(model, [prompt], greedy)[0].tokens
    engine = Engine(model, settings=EngineSettings(page=4, drafter=drafter, draft=3, acceptance=acceptance))
    for problem, silent in ((LOST, True), (LOST, False), (KeyError("lost"), True), (KeyError("lost"), False)):
        asked = Request(prompt, greedy, guide=lambda problem=problem, silent=silent: Script(said, problem, silent))
        (output,) = engine.generate([asked])
        assert output.tokens == said and output.drafted > output.accepted
        # the same, where the row itself comes to the place
        strayed = [*said[:4], (said[4] + 1) % 5]
        asked = Request(prompt, greedy, guide=lambda p=problem, silent=silent, s=strayed: Script(s, p, silent))
        with pytest.raises(type(problem)) as raised:
            list(engine.generate([asked]))
        assert raised.value is problem
        at_rest(engine)


@pytest.mark.parametrize("drafter", ["none", "mtp", "lookup"])
def test_a_guide_that_cannot_go_on_past_the_end_of_a_text_is_not_asked(copier, pattern_prompts, tokenizer, drafter):
    """The end lies among drafts that stand, some of them behind it."""
    greedy = Sampling(temperature=0, max_tokens=20, seed=1, ignore_eos=True)
    prompt = pattern_prompts()[0]
    text = generate(copier, [prompt], greedy, tokenizer=tokenizer)[0].text
    stopping = greedy.replace(stop=(text[5:8],))
    expected = generate(copier, [prompt], stopping, tokenizer=tokenizer)[0]
    assert expected.finish == "stop"
    engine = Engine(copier, tokenizer, EngineSettings(page=4, drafter=drafter, draft=12))
    guide = lambda: Script(expected.tokens, LOST, True)  # noqa: E731
    (output,) = engine.generate([Request(tuple(prompt), stopping, guide=guide)])
    assert (output.tokens, output.text, output.finish) == (expected.tokens, expected.text, "stop")
    assert output.tokens == generate(copier, [prompt], stopping, tokenizer=tokenizer, guides=[guide])[0].tokens
    at_rest(engine)
