"""What a rollout is worth beside the others of its group.

    baseline_i = mean of the others' rewards,  A_i = (reward_i - baseline_i) / (std of the others + 1e-6)

Leave-one-out, with Bessel's correction, divided only where the others differ at all: [1, 0, 0, 0] gives
[1, -0.577, -0.577, -0.577], as the Nemotron 3 recipes compute it (NeMo-RL). Two rollouts leave a single other one,
which has no spread: their advantages are plain differences. A group is what was sampled from one prompt of one batch:
it is known by its place, so that equal prompts drawn twice stay two groups. A rollout without a reward (it failed, or
was cut off and filtered) is nobody's other.
"""

import math
from collections.abc import Sequence

EPSILON = 1e-6


def leave_one_out(rewards: Sequence[float | None], normalise: bool = True) -> list[float | None]:
    """The advantages of one group; None stays None, and who has no other gets 0."""
    return [
        None if own is None else advantage(own, others(rewards, place), normalise) for place, own in enumerate(rewards)
    ]


def others(rewards: Sequence[float | None], place: int) -> list[float]:
    return [reward for other, reward in enumerate(rewards) if other != place and reward is not None]


def advantage(own: float, rest: Sequence[float], normalise: bool) -> float:
    """Of a reward beside those of the rest."""
    if not rest:
        return 0.0
    mean = math.fsum(rest) / len(rest)
    gain = own - mean
    # Equal numbers need not have a mean equal to them in floating point: their spread is 0 all the same.
    if not normalise or min(rest) == max(rest):
        return 0.0 if min(rest) == max(rest) == own else gain
    spread = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rest) / (len(rest) - 1))
    return gain / (spread + EPSILON)
