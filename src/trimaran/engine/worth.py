"""Whether drafts pay, found out by the clock: how many to allow in the next pass.

What a draft costs beside a pass depends on the model, the machine and the batch; BASS' rule for the draft length looks
at what was accepted alone. So of a few most lengths, none among them, the one that has given most tokens per second is
used, and the others are tried now and then: four times in a row, after 32 passes at first, after twice as many each
time that the choice was confirmed, and at once where the best has become slower than another was.

Only for acceptance that makes tokens independent of drafts: a clock must not decide what is said.
"""

from dataclasses import dataclass, field

MOSTS = (1 << 30, 3, 0)  # drafts per row, at most; the first leaves the length to BASS' rule
TRIES = 4  # passes in a row of a length that is tried
FIRST, LAST = 32, 256  # passes of the best one between tries
WORSE = 0.8  # of what another length gave last: then the others are tried at once
FORGET = 0.9  # weight of what was known before, at each new pass


@dataclass
class Rate:
    """Tokens and seconds of passes under one length, later ones weighing more; the first warms up and is left out."""

    tokens: float = 0.0
    seconds: float = 0.0
    passes: int = 0

    def note(self, tokens: int, seconds: float) -> None:
        if self.passes:
            self.tokens = FORGET * self.tokens + tokens
            self.seconds = FORGET * self.seconds + seconds
        self.passes += 1

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Trial:
    """What is known for batches of about one size. queue: lengths (their places in MOSTS) of the next passes."""

    rates: list[Rate] = field(default_factory=lambda: [Rate() for _ in MOSTS])
    best: int = 0
    gap: int = FIRST
    left: int = 0  # passes of the best one until the others are tried
    queue: list[int] = field(default_factory=lambda: [n for n in range(len(MOSTS)) for _ in range(TRIES)])

    def choose(self) -> int:
        """The length for the next pass."""
        return self.queue[0] if self.queue else self.best

    def note(self, tokens: int, seconds: float) -> None:
        """Takes what came of the pass whose length was chosen last."""
        self.rates[self.choose()].note(tokens, seconds)
        if self.queue:
            self.queue.pop(0)
            if not self.queue:
                self._settle()
        elif self.left > 1 and self.rates[self.best].speed >= WORSE * max(rate.speed for rate in self.rates):
            self.left -= 1
        else:
            self.queue = [n for n in range(len(MOSTS)) if n != self.best for _ in range(TRIES)]

    def _settle(self) -> None:
        """After a round of tries: the best from here on, and for how long."""
        best = max(range(len(MOSTS)), key=lambda n: self.rates[n].speed)
        self.gap = min(2 * self.gap, LAST) if best == self.best else FIRST
        self.best, self.left = best, self.gap


class Worth:
    """The most drafts per row for the next pass, by how many rows are due a token: speed differs with that."""

    def __init__(self) -> None:
        self.trials: dict[int, Trial] = {}

    def most(self, rows: int) -> int:
        return MOSTS[self._trial(rows).choose()]

    def note(self, rows: int, tokens: int, seconds: float) -> None:
        """Takes a pass in which nothing but these rows' next tokens was read: what it gave, and how long it took."""
        self._trial(rows).note(tokens, seconds)

    def _trial(self, rows: int) -> Trial:
        return self.trials.setdefault(rows.bit_length(), Trial())
