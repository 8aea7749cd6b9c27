"""Drafts are made where they pay by the clock, and the clock never decides what is said."""

import random
from collections import Counter

import pytest

from tests.engine.workloads import at_rest, compare, oracle, requests, small
from trimaran.engine.engine import Engine
from trimaran.engine.request import EngineSettings, Request
from trimaran.engine.sampler import Sampling
from trimaran.engine.worth import LONGEST, UNLIMITED, Worth


def spent(worth: Worth, rows: int, passes: int, cost: float, likely: float, dice: random.Random) -> tuple[float, float]:
    """(seconds per token, seconds per token of the best length) of a world in which a draft takes `cost` passes and
    stands with the chance `likely`."""

    def gain(k: int) -> float:
        return sum(likely**n for n in range(k + 1))

    best = min((1 + cost * k) / gain(k) for k in range(LONGEST + 1))
    seconds = tokens = 0.0
    for _ in range(passes):
        k, drafts = min(worth.most(rows), LONGEST), []
        for _ in range(rows):
            stood = 0
            while stood < k and dice.random() < likely:
                stood += 1
            drafts.append((k, stood))
        took = 1 + cost * k
        worth.note(rows, drafts, took)
        seconds += took
        tokens += sum(1 + stood for _, stood in drafts) / rows
    return seconds / tokens, best


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(("cost", "likely"), [(0.0, 0.9), (0.02, 0.8), (0.3, 0.9), (0.3, 0.2), (1.0, 0.7)])
def test_the_best_length_is_found_and_kept(rows, cost, likely):
    took, best = spent(Worth(), rows, 3000, cost, likely, random.Random(7))
    assert took < 1.15 * best  # eight passes in 264 go into trying, and may each take nine times as long


def test_a_changed_world_is_noticed_and_batches_are_told_apart():
    worth, dice = Worth(), random.Random(1)
    spent(worth, 1, 500, 0.0, 0.9, dice)
    assert spent(worth, 1, 4000, 1.0, 0.3, dice)[0] < 1.2  # none would cost 1
    worth = Worth()
    for _ in range(600):
        for rows, cost in ((1, 0.0), (9, 2.0)):
            spent(worth, rows, 1, cost, 0.8, dice)
    chosen = {rows: Counter() for rows in (1, 9)}
    for _ in range(30):
        for rows, cost in ((1, 0.0), (9, 2.0)):
            chosen[rows][worth.most(rows)] += 1
            spent(worth, rows, 1, cost, 0.8, dice)
    assert chosen[1].most_common(1)[0][0] == UNLIMITED and chosen[9].most_common(1)[0][0] == 0


class Clock:
    """A clock by which every pass takes a second, and every draft in it `dear` more."""

    def __init__(self, engine: Engine, dear: float):
        self.engine, self.dear = engine, dear

    def __call__(self) -> float:
        return self.engine.passes + self.dear * self.engine.drafted


@pytest.mark.parametrize("drafter", ["mtp", "lookup"])
def test_dear_drafts_are_hardly_made_and_no_token_changes(copier, pattern_prompts, drafter):
    greedy = Sampling(temperature=0, max_tokens=300, seed=1, ignore_eos=True)
    asked = [Request(tuple(prompt), greedy) for prompt in pattern_prompts()[:2]]
    expected, drafted = oracle(copier, asked), {}
    for dear in (0.0, 10.0):
        engine = Engine(copier, settings=EngineSettings(rows=2, page=16, drafter=drafter, prefix_cache=False))
        engine.clock = Clock(engine, dear)
        compare(engine.generate(asked), expected)
        drafted[dear] = engine.stats().drafted / engine.passes
        at_rest(engine)
    assert drafted[0.0] > 2 * drafted[10.0]


def test_random_work_under_a_random_clock():
    dice, model = random.Random(5), small("latent", 5)
    asked = requests(dice, 5, 12)
    engine = Engine(model, settings=EngineSettings(rows=4, page=4, drafter="mtp"))
    engine.clock = lambda: engine.passes + dice.random()
    compare(engine.generate(asked), oracle(model, asked))
    at_rest(engine)


def test_where_tokens_hang_on_the_drafts_the_clock_is_not_asked():
    model = small("latent", 5)
    for chosen in ({"acceptance": "rejection"}, {"draft": 2}, {"drafter": "none"}):
        engine = Engine(model, settings=EngineSettings(**{"drafter": "mtp", **chosen}))
        assert engine.worth is None
