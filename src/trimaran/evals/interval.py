"""What a score is worth: intervals by resampling, and the chance that one of several samples is right."""

from collections.abc import Sequence
from math import comb

import numpy as np

RESAMPLED = 10_000
CHUNK = 1 << 24  # numbers drawn at once


def mean_interval(values: Sequence[float], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """The bootstrap's percentile interval of a mean (Efron 1979), `level` of the resampled means in it.

    values: 0 to 1, one per independent item; several samples of one prompt are one item, their mean. Means of so many
    draws with replacement as there are values, RESAMPLED times; the same for the same values and seed. Where all values
    are alike, resampling knows nothing of what it has not seen: there the binomial's bound (Clopper and Pearson 1934)
    says which share of items may yet be otherwise, and all of them could be 0, or 1.
    """
    items_N = np.asarray(values, dtype=np.float64)
    if (items_N == items_N[0]).all():
        alike, otherwise = float(items_N[0]), 1 - ((1 - level) / 2) ** (1 / len(items_N))
        return alike * (1 - otherwise), alike + (1 - alike) * otherwise
    generator, size = np.random.default_rng(seed), len(items_N)
    step = max(1, CHUNK // size)
    means = [
        items_N[generator.integers(size, size=(min(step, RESAMPLED - start), size))].mean(1)
        for start in range(0, RESAMPLED, step)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def pass_at(k: int, samples: int, solved: int) -> float:
    """The chance that one of `k` samples solves a problem which `solved` of `samples` did, without bias:
    1 - C(samples - solved, k) / C(samples, k) (Chen et al. 2021, arXiv 2107.03374)."""
    return 1 - comb(samples - solved, k) / comb(samples, k)
