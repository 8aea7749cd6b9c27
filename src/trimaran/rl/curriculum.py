"""Which prompts a batch asks: exact counts of every environment, and within one either new prompts or those of a pool
whose pass-rates are near the one aimed at.

    aim(progress) = easy + (hard - easy) progress          falls over the run
    chance of a prompt ∝ exp(-(pass-rate - aim)² / (2 sigma²))

A Gaussian target whose mean moves from easy to hard, domain shares fixed in every batch, and solved prompts dropped are
Nemotron 3's curriculum (arXiv 2512.20848; sigma is not published). Drawing evenly instead drifts to what is easy. A
prompt that has not been tried is taken for one at the aim: the pool is explored first.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimaran.errors import Refusal
from trimaran.report import read_metrics
from trimaran.rl.recipe import CurriculumSettings, Environment
from trimaran.rl.rollout import Asked, Rollout
from trimaran.tasks.task import REWARD


def apportioned(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """`total` split by `shares` into whole numbers, the largest remainders rounded up, none below 1."""
    whole = sum(shares.values())
    exact = {name: share / whole * total for name, share in shares.items()}
    counts = {name: max(1, math.floor(value)) for name, value in exact.items()}
    while (left := total - sum(counts.values())) != 0:
        step = 1 if left > 0 else -1
        able = [name for name in counts if step > 0 or counts[name] > 1]
        # whoever is furthest below its exact share, or furthest above; the first of equals
        name = max(able, key=lambda one: step * (exact[one] - counts[one]))
        counts[name] += step
    return counts


class Pool:
    """The prompts of one environment. rates: pass-rate of each prompt that was tried, as it was last seen.

    size: how many problems its task has; None: no end of them.
    """

    def __init__(self, settings: CurriculumSettings, size: int | None = None):
        self.settings, self.size = settings, size
        self.width = settings.pool if size is None else min(settings.pool, size)
        self.first = self.taken = 0  # where the pool begins; prompts taken so far
        self.rates: dict[int, float] = {}

    def take(self, count: int, progress: float, chance: np.random.Generator) -> list[int]:
        """`count` different prompts. progress: 0 at the start of the run, 1 at its end."""
        if not self.settings.pool:
            numbers = list(range(self.taken, self.taken + count))
        else:
            numbers = self.draw(count, progress, chance)
        self.taken += count
        return numbers

    def draw(self, count: int, progress: float, chance: np.random.Generator) -> list[int]:
        while len(open_ := self.open()) < count:
            self.move_on()
        settings = self.settings
        aim = settings.easy + (settings.hard - settings.easy) * progress
        apart = np.array([self.rates.get(number, aim) - aim for number in open_])
        # far from the aim a chance may round to 0, and choice() wants `count` of them above it
        weights = np.exp(-(apart**2) / (2 * settings.sigma**2)) + 1e-12
        drawn = chance.choice(len(open_), size=count, replace=False, p=weights / weights.sum())
        return [open_[place] for place in drawn]

    def move_on(self) -> None:
        """All but a few are solved: on to prompts never seen, or, where there are no others, to all of them again."""
        self.first += self.width
        if self.size is not None and self.first >= self.size:
            self.first, self.rates = 0, {}

    def open(self) -> list[int]:
        """Prompts of the pool that may be asked."""
        end = self.first + self.width
        numbers = range(self.first, end if self.size is None else min(end, self.size))
        solved = 1.0 if self.settings.drop_solved else math.inf
        return [number for number in numbers if self.rates.get(number, 0.0) < solved]

    def state(self) -> dict[str, Any]:
        return {
            "first": self.first,
            "taken": self.taken,
            "rates": [[number, rate] for number, rate in self.rates.items()],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.first, self.taken = state["first"], state["taken"]
        self.rates = dict(state["rates"])


class Curriculum:
    """The pools of all environments. steps: batches of the run; sizes: problems of each environment's task."""

    def __init__(
        self,
        settings: CurriculumSettings,
        environments: Mapping[str, Environment],
        prompts: int,
        seed: int,
        steps: int,
        sizes: Mapping[str, int | None] | None = None,
    ):
        self.settings, self.seed, self.batches = settings, seed, max(1, steps - 1)
        self.counts = apportioned({name: one.share for name, one in environments.items()}, prompts)
        self.pools = {name: Pool(settings, (sizes or {}).get(name)) for name in environments}
        for name, pool in self.pools.items():
            if settings.pool and pool.width < self.counts[name]:
                found = f"a pool of {pool.width} prompts for {name}"
                step = "raise curriculum.pool, or lower the environment's share"
                raise Refusal(found, f"at least the {self.counts[name]} of a batch", step)
        if settings.profile is not None:
            self.profile(Path(settings.profile))

    def profile(self, path: Path) -> None:
        """Pass-rates from the rollouts of an earlier run."""
        records = [one for one in read_metrics(path) if one.get("environment") in self.pools]
        if not records:
            found = f"no rollouts of {', '.join(self.pools)} in {path}"
            raise Refusal(found, "rollouts.jsonl of a run with these environments", "correct curriculum.profile")
        rewards: dict[tuple[str, int], list[float]] = {}
        for one in records:
            if one.get(REWARD) is not None:
                rewards.setdefault((one["environment"], one["number"]), []).append(one[REWARD])
        for (name, number), found_rewards in rewards.items():
            self.pools[name].rates[number] = math.fsum(found_rewards) / len(found_rewards)

    def ask(self, batch: int) -> list[Asked]:
        """The prompts of a batch: as many of each environment as its share makes, one environment after the other."""
        chance = np.random.default_rng([self.seed, batch])
        progress = min(1.0, batch / self.batches)
        return [
            Asked(name, number)
            for name, pool in self.pools.items()
            for number in pool.take(self.counts[name], progress, chance)
        ]

    def learn(self, rollouts: Sequence[Rollout]) -> None:
        """Takes note of the pass-rates of a batch."""
        for group in grouped(rollouts):
            rewards = [one.reward for one in group if one.reward is not None]
            if rewards and self.settings.pool:
                self.pools[group[0].environment].rates[group[0].number] = math.fsum(rewards) / len(rewards)

    def state(self) -> dict[str, Any]:
        return {name: pool.state() for name, pool in self.pools.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        for name, pool in self.pools.items():
            pool.load(state[name])


def grouped(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """The rollouts of each group of a batch, in the order of groups."""
    groups: dict[int, list[Rollout]] = {}
    for one in rollouts:
        groups.setdefault(one.group, []).append(one)
    return list(groups.values())
