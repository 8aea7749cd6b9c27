"""What a batch of rollouts was like, as numbers by name.

reward/NAME, length/NAME, cut/NAME, failed/NAME   of an environment: means over its rollouts, share cut, share failed
reward, length                                    of all
solved_0 … solved_1                               share of groups by pass-rate: none of its rollouts rewarded in full,
                                                  up to a quarter, a half, three quarters, less than all, all
left_out                                          share of rollouts without an advantage
"""

import math
from collections.abc import Iterable, Sequence

from trimaran.rl.curriculum import grouped
from trimaran.rl.rollout import Rollout

BINS = ("solved_0", "solved_25", "solved_50", "solved_75", "solved_99", "solved_1")


def summary(rollouts: Sequence[Rollout], advantages: Sequence[float | None]) -> dict[str, float]:
    """Of one batch. An environment all of whose rollouts failed has no reward."""
    found = of(rollouts, "")
    for name in dict.fromkeys(one.environment for one in rollouts):
        found |= of([one for one in rollouts if one.environment == name], f"/{name}")
    rates = [rate for group in grouped(rollouts) if (rate := pass_rate(group)) is not None]
    bins = [bin_of(rate) for rate in rates]
    found |= {name: bins.count(place) / max(1, len(bins)) for place, name in enumerate(BINS)}
    found["left_out"] = mean(one is None for one in advantages)
    return found


def of(rollouts: Sequence[Rollout], suffix: str) -> dict[str, float]:
    rewards = [one.reward for one in rollouts if one.reward is not None]
    found = {f"reward{suffix}": mean(rewards)} if rewards else {}
    return found | {
        f"length{suffix}": mean(len(one.said) for one in rollouts),
        f"cut{suffix}": mean(one.finish == "length" for one in rollouts),
        f"failed{suffix}": mean(one.error is not None for one in rollouts),
    }


def pass_rate(group: Sequence[Rollout]) -> float | None:
    """Share of the group's rollouts with a full reward; None where all failed."""
    rewards = [one.reward for one in group if one.reward is not None]
    return mean(reward >= 1 for reward in rewards) if rewards else None


def bin_of(rate: float) -> int:
    return 0 if rate == 0 else 5 if rate == 1 else min(4, math.ceil(rate * 4))


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)
