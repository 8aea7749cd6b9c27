"""How many drafts pay, by what stands of them and by the clock.

    gain(k)   1 + sum over i <= k of P(a row's first i drafts all stand): its tokens of a pass with k drafts
    cost(k)   seconds of such a pass
    most      the k with the most gain(k) / cost(k), none among them

BASS' rule for the draft length looks at what was accepted alone; what a draft costs beside a pass depends on the model,
the machine and the batch. So the rule has its say below `most`. Both sides are known for batches of about one size:
what stood as a running mean, what passes took as the median of the latest, which a busy machine moves least. A length
that was never tried lies on the line through its neighbours. Lengths that are not in use are tried now and then, more
rarely the longer they do not pay.

Only for acceptance that makes tokens independent of drafts: a clock must not decide what is said.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

UNLIMITED = 1 << 30
LONGEST = 8  # the longest length that is weighed; where it pays most, BASS' rule is left alone
TRY = 3  # drafts per row in a try of drafting
TRIES = 4  # passes of a try
FIRST, LAST = 32, 256  # passes between tries
EVERY = 8  # passes between looks at what is best
LATEST = 15  # passes whose median is the cost of a length
KEEP = 0.96  # weight of what stood before, at each new pass
BETTER = 1.05  # gain of a change, at least: what differs by less is noise


@dataclass
class Mean:
    """A running mean, later values weighing more."""

    total: float = 0.0
    weight: float = 0.0

    def note(self, value: float, weight: float = 1.0) -> None:
        self.total = KEEP * self.total + value * weight
        self.weight = KEEP * self.weight + weight

    @property
    def value(self) -> float:
        return self.total / self.weight


@dataclass
class Record:
    """What is known of batches of about one size. queue: lengths of the next passes, which are tries."""

    costs: dict[int, deque[float]] = field(default_factory=dict)  # seconds, by drafts per row
    warm: set[int] = field(default_factory=set)  # lengths whose first pass is over: it is not counted
    stood: list[Mean] = field(default_factory=list)  # share of drafts of i + 1 tokens or more whose first i + 1 stood
    best: int = UNLIMITED
    gap: int = FIRST
    left: int = 0  # passes until the next try
    queue: list[int] = field(default_factory=lambda: [TRY] * TRIES + [0] * TRIES)

    @property
    def most(self) -> int:
        return self.queue[0] if self.queue else self.best

    def note(self, drafts: Sequence[tuple[int, int]], seconds: float) -> None:
        """Takes a pass: per row, how many drafts it had and how many of them stood; and how long it took."""
        length = max((made for made, _ in drafts), default=0)
        if length in self.warm:
            self.costs.setdefault(length, deque(maxlen=LATEST)).append(seconds)
        self.warm.add(length)
        for place in range(length):
            made = [stood for count, stood in drafts if count > place]
            if place == len(self.stood):
                self.stood.append(Mean())
            self.stood[place].note(sum(stood > place for stood in made) / len(made), len(made))
        if self.queue:
            self.queue.pop(0)
            self.left = self.gap
        elif self.left > 0:
            self.left -= 1
        else:
            self.queue = [TRY] * TRIES if not self.best else [0] * (TRIES // 2) + [self.best + 2] * (TRIES // 2)
        if not self.queue and self.left % EVERY == 0:
            self.settle()

    def settle(self) -> None:
        """The best length by what is known now."""
        if 0 not in self.costs or max(self.costs) == 0:  # one side has not been seen: drafts that were never made, say
            return
        speeds = [gain / self.cost(length) for length, gain in enumerate(self.gains())]
        fastest = max(range(len(speeds)), key=speeds.__getitem__)
        now = min(self.best, LONGEST)
        if speeds[fastest] > BETTER * speeds[now]:
            self.best, self.gap = (fastest if fastest < LONGEST else UNLIMITED), FIRST
        elif self.left == self.gap:  # a round of tries has changed nothing
            self.gap = min(2 * self.gap, LAST)

    def gains(self) -> list[float]:
        """Tokens of a row for 0 to LONGEST drafts; places that no draft has reached stand as the last ones did."""
        chances = [1.0]
        for mean in self.stood[:LONGEST]:
            chances.append(min(mean.value, chances[-1]))
        while len(chances) <= LONGEST:
            chances.append(chances[-1] * (chances[-1] / chances[-2] if chances[-2] else 0.0))
        return [sum(chances[: length + 1]) for length in range(LONGEST + 1)]

    def cost(self, length: int) -> float:
        """Seconds of a pass with `length` drafts per row: as measured, or on the line through its two neighbours."""
        if length in self.costs:
            return median(self.costs[length])
        known = sorted(self.costs)
        above = next((place for place, one in enumerate(known) if one > length), len(known) - 1)
        low, high = known[above - 1], known[above]
        slope = (self.cost(high) - self.cost(low)) / (high - low)
        return max(self.cost(low) + slope * (length - low), self.cost(0))


class Worth:
    """The most drafts per row for the next pass, by how many rows are due a token: speed differs with that."""

    def __init__(self) -> None:
        self.records: dict[int, Record] = {}

    def most(self, rows: int) -> int:
        return self._record(rows).most

    def note(self, rows: int, drafts: Sequence[tuple[int, int]], seconds: float) -> None:
        """Takes a pass in which nothing but these rows' next tokens was read; see `Record.note`."""
        self._record(rows).note(drafts, seconds)

    def _record(self, rows: int) -> Record:
        return self.records.setdefault(rows.bit_length(), Record())
