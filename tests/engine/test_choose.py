"""Acceptance rules against the exact joint law, and choices that guides narrow."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from trimaran.engine import choose as choosing
from trimaran.engine.choose import Ask, choose
from trimaran.engine.guide import Guides, only
from trimaran.engine.sampler import Sampling, key_of, probabilities

V, LENGTH, SEQUENCES = 5, 4, 20_000
START = (0, 1)


SEEN = torch.arange(1 << V)[:, None] >> torch.arange(V) & 1 == 1  # by the bits of a number
ALLOWED = ~torch.eye(V, dtype=torch.bool)
ALLOWED[1::2, 4] = False


class NoTwins:
    """Forbids the token just said, and id 4 after an odd one: a guide that remembers."""

    ended = False

    def __init__(self, last: int = START[-1]):
        self.last = last

    def allowed(self) -> torch.Tensor:
        return ALLOWED[self.last]

    def push(self, token: int) -> None:
        self.last = token

    def fork(self) -> "NoTwins":
        return NoTwins(self.last)


@dataclass
class Case:
    settings: Sampling
    guided: bool = False
    law: bool = True  # whether the drafter tells its law; without, its drafts are point masses


CASES = {
    "all rules": Case(Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.4), guided=True),
    "points": Case(Sampling(temperature=1.3, top_k=4), law=False),
}


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [V, V, V] of a target and of a draft model: Markov chains of order 2, alike but not the same."""
    generator = torch.Generator().manual_seed(4)
    target = torch.randn(V, V, V, generator=generator, dtype=torch.float64) * 1.2
    return target, target + torch.randn(V, V, V, generator=generator, dtype=torch.float64) * 0.8


def seen(tokens: list[int]) -> torch.Tensor:
    return SEEN[sum(1 << token for token in set(tokens))]


def guide_after(case: Case, said: list[int]) -> NoTwins | None:
    return NoTwins([*START, *said][-1]) if case.guided else None


def exact(case: Case, target: torch.Tensor) -> torch.Tensor:
    """The joint law of the first tokens [V] * LENGTH, one prefix at a time."""
    law = torch.ones([V] * LENGTH, dtype=torch.float64)
    for depth in range(LENGTH):
        for said in itertools.product(range(V), repeat=depth):
            text = [*START, *said]
            logits, guide = target[text[-2], text[-1]].clone(), guide_after(case, list(said))
            if guide is not None:
                logits[~guide.allowed()] = -torch.inf
            step = probabilities(logits[None], [case.settings], seen(text)[None])[0]
            law[said] *= step.reshape([V] + [1] * (LENGTH - depth - 1))
    return law


def ask_of(case: Case, key: bytes, said: list[int], drafts=(), law=None) -> Ask:
    return Ask(case.settings, key, len(said), seen([*START, *said]), guide_after(case, said), drafts, law)


def speculate(case: Case, acceptance: str, rows: int = SEQUENCES, longest: int = 3) -> tuple[list[list[int]], int]:
    """The first tokens of rows drafted with ragged lengths from 0 to `longest` and verified; and how many stood."""
    target, drafter = tables()
    keys = [key_of(1, sample, START) for sample in range(rows)]
    texts: list[list[int]] = [[] for _ in keys]
    accepted, passes = 0, 0
    while live := [row for row, said in enumerate(texts) if len(said) < LENGTH]:
        asked = [(row + passes) % (longest + 1) for row in live]
        drafts: list[list[int]] = [[] for _ in live]
        laws: list[list[torch.Tensor]] = [[] for _ in live]
        for depth in range(longest):
            at = [place for place, k in enumerate(asked) if k > depth]
            said = [texts[live[place]] + drafts[place] for place in at]
            asks = [ask_of(case, keys[live[place]], text) for place, text in zip(at, said, strict=True)]
            places = choosing.Places(logits_after(drafter, said), asks, None)
            for place, token, law in zip(at, places.draws(), places.law_NV, strict=True):
                drafts[place].append(token)
                laws[place].append(law)
        asks = [
            ask_of(case, keys[row], texts[row], tokens, torch.stack(law) if law and case.law else None)
            for row, tokens, law in zip(live, drafts, laws, strict=True)
        ]
        said = [
            texts[row] + tokens[:k] for row, tokens in zip(live, drafts, strict=True) for k in range(len(tokens) + 1)
        ]
        for row, choice in zip(live, choose(logits_after(target, said), asks, acceptance=acceptance), strict=True):
            texts[row] += choice.tokens
            accepted += choice.accepted
        passes += 1
    return [said[:LENGTH] for said in texts], accepted


def logits_after(table: torch.Tensor, texts: list[list[int]]) -> torch.Tensor:
    last = torch.tensor([[*START, *said][-2:] for said in texts]).reshape(-1, 2)
    return table[last[:, 0], last[:, 1]]


def z_score(texts: list[list[int]], law: torch.Tensor) -> float:
    """How many standard deviations the chi-square lies from what it is expected to be; rare cells are one cell."""
    counts = torch.zeros_like(law)
    counts.index_put_(tuple(torch.tensor(texts).T), torch.ones(1, dtype=law.dtype), accumulate=True)
    expected = law * counts.sum()
    assert counts[law == 0].sum() == 0
    often = expected >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None].clamp(min=1e-9)])
    freedom = len(observed) - 1
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("name", ["all rules", pytest.param("points", marks=pytest.mark.slow)])
def test_rejection_keeps_the_joint_law_of_four_tokens(name):
    texts, accepted = speculate(CASES[name], "rejection")
    assert accepted > SEQUENCES / 2
    assert abs(z_score(texts, exact(CASES[name], tables()[0]))) < 4


@pytest.mark.parametrize("name", CASES)
def test_coupled_drafts_change_no_token(name):
    texts, accepted = speculate(CASES[name], "coupled", 800)
    assert accepted > 400
    assert texts == speculate(CASES[name], "coupled", 800, longest=0)[0]
    assert texts == speculate(CASES[name], "rejection", 800, longest=0)[0]


MUTANTS = {
    "replaced from p": ("remainder", lambda p, q: p),
    "accepted with the draft's own number": ("ACCEPT", 0),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_rule_is_caught(monkeypatch, mutant):
    monkeypatch.setattr(choosing, *MUTANTS[mutant])
    texts, _ = speculate(CASES["all rules"], "rejection", 5000)
    assert abs(z_score(texts, exact(CASES["all rules"], tables()[0]))) > 8


def test_a_draft_law_that_is_the_target_law_always_stands():
    """Also where (p - q)+ is nothing but rounding."""
    target, _ = tables()
    for sample in range(50):
        ask = ask_of(CASES["all rules"], key_of(1, sample, START), [])
        places = choosing.Places(logits_after(target, [[]]), [ask], None)
        token, law = places.draws(), places.law_NV
        logits = logits_after(target, [[], token])
        choice = choose(logits, [replace(ask, drafts=token, law=law)], acceptance="rejection")[0]
        assert choice.accepted == 1 and choice.tokens[0] == token[0]
    p = torch.tensor([[0.5, 0.5, 0.0]])
    torch.testing.assert_close(choosing.remainder(p, p + torch.tensor([[1e-9, 0.0, 0.0]])), p)


class Script:
    """Allows what it is told, one mask after the other, then everything."""

    ended = False

    def __init__(self, *masks: torch.Tensor | None):
        self.masks, self.pushed = masks, 0

    def allowed(self) -> torch.Tensor | None:
        return self.masks[self.pushed] if self.pushed < len(self.masks) else None

    def push(self, token: int) -> None:
        self.pushed += 1

    def fork(self) -> "Script":
        twin = Script(*self.masks)
        twin.pushed = self.pushed
        return twin


GREEDY = Sampling(temperature=0)
LOGITS = torch.tensor([[0.0, 1, 2, 3, 4], [4.0, 3, 2, 1, 0], [0.0, 0, 9, 0, 0]])


@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_a_forced_token_cuts_the_draft_and_leaves_the_neighbour_alone(acceptance, temperature):
    """A draft right but for the forced place; in the same batch, the same row without a guide."""
    sampling, forced = Sampling(temperature=temperature), Script(None, only(3))
    asks = [Ask(sampling, b"k", 0, guide=guide, drafts=(4, 0)) for guide in (forced, None)]
    first, second = choose(LOGITS.repeat(2, 1), asks, acceptance=acceptance)
    assert (first.tokens, first.accepted) == ([4, 3], 1)
    assert (second.tokens, second.accepted) == ([4, 0, 2], 2)
    assert forced.pushed == 0, "looking along a draft pushes nothing"


def test_a_mask_goes_before_top_k_and_the_penalty():
    """The likeliest of what is allowed stays, even where the whole top k is forbidden."""
    two = torch.tensor([True, True])  # ids past the mask's end may not come
    for penalty, token in ((4.0, 0), (1.5, 1)):  # of logits 1 and 2, the second seen
        sampling = Sampling(top_k=1, repetition_penalty=penalty)
        ask = Ask(sampling, b"k", 0, seen=torch.arange(5) == 1, guide=Script(two))
        assert choose(LOGITS[:1] + 1, [ask])[0].tokens == [token]
    assert choose(LOGITS[:1], [Ask(GREEDY, b"k", 0, guide=Script(only(0)))], spelled=4)[0].tokens == [0]


@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
def test_a_draft_that_cannot_be_spelled_never_stands(acceptance):
    """Look-up may find one in a prompt. Penalties and guides behind it are not asked."""
    sampling = Sampling(temperature=1e-6, repetition_penalty=1.1)
    asks = [
        Ask(sampling, b"k", 0, seen=torch.zeros(5) > 0, guide=guide, drafts=(3, 4)) for guide in (None, Script(None))
    ]
    for choice in choose(LOGITS.repeat(2, 1), asks, spelled=4, acceptance=acceptance):
        assert (choice.tokens, choice.accepted) == ([3, 0], 1)


def test_guides_together_allow_what_all_allow():
    both = Guides(
        Script(torch.tensor([True, True, False, True]), None), Script(torch.tensor([False, True, True]), only(2))
    )
    assert both.allowed().tolist() == [False, True, False]
    ahead = both.fork()
    ahead.push(1)
    assert ahead.allowed().tolist() == [False, False, True]
    ahead.push(2)
    assert ahead.allowed() is None
    assert both.allowed().tolist() == [False, True, False] and not both.ended


def test_a_row_without_a_choice_is_refused_and_its_neighbours_are_not():
    nothing = torch.zeros(5, dtype=torch.bool)
    broken = LOGITS.clone()
    broken[0, 2] = torch.nan
    logits = torch.cat([LOGITS, LOGITS[:1], broken, LOGITS])
    asks = [
        Ask(GREEDY, b"a", 0, guide=Script(None, nothing), drafts=(4, 0)),
        Ask(GREEDY, b"b", 0, guide=Script(nothing)),
        Ask(GREEDY, b"c", 0, drafts=(4, 0)),
        Ask(GREEDY, b"d", 0, drafts=(4, 1), guide=Script(None, None, nothing)),
    ]
    for settings in (GREEDY, Sampling(temperature=1e-6)):
        choices = choose(logits, [replace(ask, settings=settings) for ask in asks])
        assert [choice.tokens for choice in choices] == [[4], [], [], [4, 0]]
        found = [choice.refusal.found for choice in choices[:3]]
        assert found[:2] == [f"no token that the row's rules allow after {n} of its own" for n in (1, 0)]
        assert found[2] == "logits that are no numbers"


def test_logprobs_are_of_the_tokens_said_and_top_of_the_model_alone():
    settings = Sampling(temperature=1e-6, logprobs=True)
    asks = [
        Ask(GREEDY, b"a", 0),
        Ask(settings, b"b", 0, drafts=(4, 1), guide=Script(None, only(1)), top=2),
        Ask(GREEDY, b"c", 0, top=3),
    ]
    silent, told, ranked = choose(torch.cat([LOGITS[:1], LOGITS, LOGITS[:1]]), asks)
    assert silent.logprobs is None and silent.top is None
    model = LOGITS.log_softmax(-1)
    assert told.tokens == [4, 1, 2]
    assert told.logprobs == pytest.approx([float(model[0, 4]), float(model[1, 1]), float(model[2, 2])])
    assert told.law_logprobs == pytest.approx([0, 0, 0], abs=1e-6)
    assert [[token for token, _ in place] for place in told.top] == [[4, 3], [0, 1], [2, told.top[2][1][0]]]
    assert [token for token, _ in ranked.top[0]] == [4, 3, 2]
    assert ranked.top[0][1][1] == pytest.approx(float(model[0, 3]))


def test_greedy_in_one_call_is_greedy_step_by_step():
    """Rows that ask for no more than the likeliest say what they say when they ask for log-probabilities too."""
    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(5))
    likeliest = logits[:, :6].argmax(-1).tolist()
    drafts = [(likeliest[0], likeliest[1], 0), (), (likeliest[5], 5, 6)]
    short, long = (
        [Ask(Sampling(temperature=0, logprobs=logprobs), b"k", 0, drafts=own) for own in drafts]
        for logprobs in (False, True)
    )
    assert choosing.plain_greedy(logits, short, 6) == likeliest and choosing.plain_greedy(logits, long, 6) is None
    for one, other in zip(choose(logits, short, 6), choose(logits, long, 6), strict=True):
        assert (one.tokens, one.accepted) == (other.tokens, other.accepted)
    logits[4, 2] = torch.nan
    assert [choice.refusal is None for choice in choose(logits, short, 6)] == [True, False, True]
