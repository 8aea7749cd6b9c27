"""What the length of an answer adds to its reward.

effort   L = min(1, w (1 - length / upper)),  r' = r + r max(L, 0) + penalty min(L, 0)
         for prompts that ask for less effort (Nemotron 3 Ultra: w = 0.1, upper = 15000, penalty = 1)
length   r' = r + λ (w_i - mean w),  w_i = 1 - (l_i - l_min) / (l_max - l_min)
         within a group, for thoughts and for the rest of the answers apart (λ = 0.5 each in Nano's RLHF); the terms of
         a group sum to 0, and are 0 where all are equally long
shortest a bonus for the shortest of the rollouts whose reward is at or above the group's quantile (0.5 and 0.8)
"""

from collections.abc import Sequence

import numpy as np

from trimaran.rl.recipe import ShapingSettings
from trimaran.rl.rollout import Rollout


def effort(reward: float, length: int, settings: ShapingSettings) -> float:
    """A reward for `length` tokens where the prompt asked for less effort."""
    gain = min(1.0, settings.effort * (1 - length / settings.effort_tokens))
    return reward + reward * max(gain, 0.0) + settings.effort_penalty * min(gain, 0.0)


def relative_lengths(lengths: Sequence[int]) -> list[float]:
    """How short each is beside the others: centred, so that a group gains nothing as a whole."""
    least, most = min(lengths), max(lengths)
    if least == most:
        return [0.0] * len(lengths)
    weights = [1 - (length - least) / (most - least) for length in lengths]
    mean = sum(weights) / len(weights)
    return [weight - mean for weight in weights]


def shaped(
    group: Sequence[Rollout], rewards: Sequence[float | None], asks_effort: bool, settings: ShapingSettings
) -> list[float | None]:
    """The rewards of a group with all that the settings add; None (no reward) stays None."""
    places = [place for place, reward in enumerate(rewards) if reward is not None]
    base = {place: float(rewards[place] or 0.0) for place in places}
    found = dict(base)
    if not places:
        return list(rewards)
    if asks_effort and settings.effort:
        found = {place: effort(found[place], len(group[place].said), settings) for place in places}
    thoughts = [group[place].thoughts for place in places]
    answers = [len(group[place].said) - group[place].thoughts for place in places]
    for weight, lengths in ((settings.thought_length, thoughts), (settings.answer_length, answers)):
        for place, term in zip(places, relative_lengths(lengths)):
            found[place] += weight * term
    if settings.shortest:
        border = float(np.quantile(list(base.values()), settings.shortest_quantile))
        best = min((len(group[place].said), place) for place in places if base[place] >= border)[1]
        found[best] += settings.shortest
    return [found.get(place) for place in range(len(rewards))]
