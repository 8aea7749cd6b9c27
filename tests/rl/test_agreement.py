"""What the sampler says a token's probability is, the trainer says too: after every update, for every layer kind."""

from dataclasses import replace

import pytest
import torch

from tests.models import KINDS
from tests.rl import toys
from trimaran.evals.play import Player
from trimaran.rl.objective import PolicyGradient
from trimaran.rl.recipe import PolicySettings, RolloutSettings
from trimaran.rl.rollout import Asked, Rollout, roll
from trimaran.rl.source import logprobs
from trimaran.rl.streams import Example, pack, unpack
from trimaran.tasks.task import Task


def rolled(
    player: Player, task: Task, *, prompts: int = 3, samples: int = 3, seed: int = 0, first: int = 0, **settings
):
    play = {"one": RolloutSettings(**{"max_tokens": 9, **settings}).play()}
    asked = [Asked("one", first + number) for number in range(prompts)]
    return roll(player, {"one": task}, asked, play, samples=samples, seed=seed)


def gap(model, rollouts: list[Rollout], temperature: float = 1.0) -> float:
    """The largest difference between sampler and trainer."""
    examples = [Example(one, 1.0, 1.0) for one in rollouts if one.said]
    streams = pack(examples, 64, 0)
    found = unpack(logprobs(model, streams, temperature), streams, examples)
    return max(abs(a - b) for one, own in zip(examples, found) for a, b in zip(one.rollout.logprobs, own, strict=True))


def update(model, rollouts: list[Rollout]) -> None:
    """A step large enough for old weights to be found out."""
    objective = PolicyGradient(model.train(), PolicySettings(gap_limit=None), router_bias_rate=0.05)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    examples = [Example(one, (-1.0) ** place, 1.0) for place, one in enumerate(rollouts)]
    objective.terms(pack(examples, 64, 0))[0].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    objective.after_step()
    model.version += 1
    model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_after_every_update(kind):
    model, words = toys.pair(kind)
    player = Player(toys.engine(model, words))
    task = toys.Capitals(turns=2)
    for step in range(3):
        rollouts = rolled(player, task, seed=step)  # the same prompts: what a cache kept of them would show
        assert gap(model, rollouts) <= 1e-4
        if step < 2:
            update(model, rollouts)
            assert gap(model, rollouts) > 1e-3, "an update that changes nothing tests nothing"


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_at_a_temperature(temperature):
    model, words = toys.pair("everything")
    rollouts = rolled(Player(toys.engine(model, words)), toys.Capitals(), temperature=temperature)
    assert gap(model, rollouts, temperature) <= 1e-4
    assert gap(model, rollouts, 1.0) > 1e-2


def test_answers_stay_the_tokens_that_were_said():
    model, words = toys.pair("mamba")
    task = toys.Capitals(turns=3)
    for one in rolled(Player(toys.engine(model, words)), task, max_tokens=40):
        ids = [one.ids[place] for place in one.said]
        assert len(one.logprobs) == len(ids) and all(value <= 0 for value in one.logprobs)
        assert one.said == tuple(sorted(set(one.said))) and one.said[-1] < len(one.ids)


def test_what_is_sampled_depends_on_the_seed_and_not_on_the_company():
    model, words = toys.pair("everything")
    task = toys.Capitals()
    wide = rolled(Player(toys.engine(model, words)), task, prompts=4)
    narrow = rolled(Player(toys.engine(model, words, rows=2, tokens_per_pass=7)), task, prompts=4)
    assert [one.ids for one in wide] == [one.ids for one in narrow]
    other = rolled(Player(toys.engine(model, words)), task, prompts=4, seed=1)
    assert [one.ids for one in wide] != [one.ids for one in other]
    assert [(one.group, one.sample) for one in wide] == [(g, s) for g in range(4) for s in range(3)]


def test_a_broken_verifier_is_recorded_and_scores_nothing():
    model, words = toys.pair("mamba")
    rollouts = rolled(Player(toys.engine(model, words)), toys.Capitals(breaks=2), prompts=2, first=32)
    broken = [one for one in rollouts if one.number == 32]
    assert all("ZeroDivisionError: the verifier broke" in (one.error or "") for one in broken)
    assert all(one.reward is None and one.finish == "error" for one in broken)
    assert all(one.reward is not None for one in rollouts if one.number == 33)


def test_tokens_that_a_budget_forced_were_not_chosen():
    model, words = toys.pair("mamba")
    player = Player(toys.engine(model, words))

    class Thinks(toys.Capitals):
        def prompt(self, number, split="train"):
            return replace(super().prompt(number, split), thinking=True)

    close = words.id_of("</think>")
    rollouts = rolled(player, Thinks(), max_tokens=12, budget=3)
    forced = [one for one in rollouts if one.thoughts == 3]
    assert forced
    for one in forced:
        place = one.ids.index(close, one.said[0])
        assert place not in one.said and place + 1 in one.said
        assert one.thoughts == place - one.said[0]
    assert gap(model, rollouts) <= 1e-4
