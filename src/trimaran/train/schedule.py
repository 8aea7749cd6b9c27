"""The learning rate over a run: warm-up, stable, decay (WSD).

With r = (step - decay_start) / decay_length in [0, 1], the rate is min + (max - min) * c(r):

    linear       1 - r
    cosine       (1 + cos(pi r)) / 2
    exponential  2 * 0.5^r - 1
    minus_sqrt   1 - sqrt(r)        Nemotron-3 Super and Ultra (reports of 2025-2026)

These are the shapes of Megatron-LM's `optimizer_param_scheduler.py`. minus_sqrt falls at once: a tenth into the decay
it stands at 68 % of the peak. Weight decay is not scheduled.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda r: 1 - r,
    "cosine": lambda r: (1 + math.cos(math.pi * r)) / 2,
    "exponential": lambda r: 2 * 0.5**r - 1,
    "minus_sqrt": lambda r: 1 - math.sqrt(r),
}


@dataclass(frozen=True)
class Schedule:
    """schedule(step) is the rate of the update that follows `step` finished ones.

    `warmup` and `decay` are steps. The first update already moves (its rate is lr / warmup), the first of the decay is
    still at exactly `lr`, and `min_lr` is what one update after the last would have.
    """

    steps: int
    lr: float
    min_lr: float = 0.0
    warmup: int = 0
    decay: int = 0
    shape: str = "minus_sqrt"

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        begin = self.steps - self.decay
        if step <= begin or not self.decay:
            return self.lr
        r = min(1.0, (step - begin) / self.decay)
        return self.min_lr + (self.lr - self.min_lr) * SHAPES[self.shape](r)
