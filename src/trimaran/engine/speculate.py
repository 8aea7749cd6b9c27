"""Drafts for verification: who proposes them, and how many.

    DraftLength   one draft length for a batch, adapted to what was accepted (BASS, arXiv 2404.15778, Algorithm 1)
    MTP           the model's own draft block, fed with its own hidden vectors after the first
    SmallModel    another, smaller model with the same tokenizer and a memory of its own
    LookUp        what followed the last time that the row's newest tokens stood in its text

The engine tells a drafter what was read and said (`observe`), asks it for drafts (`propose`) and says when a row is
over (`drop`). Models draft with the row's own sampling law, rules and numbers (see choose.py), so that for sampled
rows too a draft is likely to be what the row would have drawn. Nothing that a drafter does changes what is said under
`coupled` acceptance, nor its law under `rejection`.

Shapes: S rows, N tokens of all rows one after the other, D width, V ids.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from trimaran.engine import pages
from trimaran.engine.choose import Ask, Places, likeliest_alone, plain_greedy
from trimaran.engine.paged import Segment
from trimaran.engine.pages import Memory
from trimaran.model.hybrid import HybridModel


class DraftLength:
    """The draft length of a batch after BASS' rule: two more when some row took its whole draft, else fewer, one less
    still after each further pass without such a row, but no fewer than the best row took."""

    FIRST, MORE, PART, LIMIT = 7, 2, 10, 32

    def __init__(self, first: int = FIRST, limit: int = LIMIT):
        self.length, self.limit = min(first, limit), limit
        self.falling = 0

    def update(self, accepted: Sequence[int]) -> None:
        """Takes what a verified pass accepted of each row that goes on. Rows that ended in it must not be among them:
        how far they got says nothing about the next draft."""
        if not accepted:
            return
        best = max(accepted)
        if best >= self.length:
            self.length, self.falling = min(self.length + self.MORE, self.limit), 0
        else:
            shorter = self.length - math.ceil(self.length / self.PART) - self.falling
            self.length, self.falling = max(1, best, shorter), 1


@dataclass(frozen=True)
class Reading:
    """What the trunk has just read of a row, for good: its hidden vectors [M, D] (after the final norm) of M tokens,
    and for each of them the token that follows it. Consecutive over the calls; the first is at `mtp_length`, or behind
    what the drafter has taken and not read yet. of: tokens of the whole pass, which `hidden` may be a view of."""

    row: Hashable
    sequence: pages.Sequence
    hidden: Tensor
    following: Sequence[int]
    of: int = 0


@dataclass(frozen=True)
class Need:
    """A row that is due up to `count` drafts.

    text: its prompt and all it has said; the trunk has read all but the last token, and room for 1 + count tokens is
    reserved in `sequence`. ask: how its next token is chosen. ends: tokens after which it is over.
    """

    row: Hashable
    sequence: pages.Sequence
    text: Sequence[int]
    ask: Ask
    count: int
    ends: frozenset[int] = frozenset()


@dataclass
class Draft:
    """Tokens proposed to a row, and the laws [k, V] that they were drawn from; None: point masses."""

    tokens: list[int] = field(default_factory=list)
    law: Tensor | None = None


class Drafter(Protocol):
    """Whoever proposes. needs_hidden: whether `observe` wants the trunk's hidden vectors."""

    needs_hidden: bool

    def observe(self, readings: Sequence[Reading]) -> None:
        """Takes what the trunk read in a pass, prompts included, without what a verification took back."""

    def behind(self, row: Hashable) -> int:
        """How many pairs of a row it has taken and not read yet."""

    def settle(self, rows: Sequence[Hashable]) -> None:
        """Reads what it has put off of these rows, before their memory is copied or kept."""

    def propose(self, needs: Sequence[Need]) -> list[Draft]:
        """A draft for each row, of `need.count` tokens or fewer."""

    def drop(self, row: Hashable) -> None:
        """Forgets a row: it is over, or its memory has been given back. Unknown rows are nothing to forget."""


class Pencil:
    """One row's draft while it grows."""

    def __init__(self, need: Need):
        self.need, self.ask, self.tokens, self.laws = need, need.ask, list[int](), list[Tensor]()

    @property
    def open(self) -> bool:
        """Whether another token is of use."""
        over = bool(self.tokens) and self.tokens[-1] in self.need.ends
        ended = self.ask.guide is not None and self.ask.guide.ended
        return len(self.tokens) < self.need.count and not over and not ended

    def push(self, token: int, law: Tensor | None) -> None:
        self.tokens.append(token)
        if law is not None:
            self.laws.append(law)
        if len(self.tokens) < self.need.count:
            self.ask = self.ask.after(token)

    def take(self, tokens: Sequence[int]) -> None:
        """A whole draft of likeliest tokens, which ends where the row would."""
        for token in tokens:
            self.tokens.append(token)
            if token in self.need.ends:
                break

    def draft(self) -> Draft:
        return Draft(self.tokens, torch.stack(self.laws) if self.laws else None)


def write(pencils: Sequence[Pencil], logits_SV: Tensor, spelled: int | None, laws: bool) -> list[int]:
    """Draws a token for each draft from the law that its row's settings make of the drafter's logits. Returns the
    places of those that can go on; a row whose rules leave no choice gets no token, and ends its draft."""
    asks = [pencil.ask for pencil in pencils]
    tokens = None if laws else plain_greedy(logits_SV, asks, spelled)
    places = None if tokens is not None else Places(logits_SV, asks, spelled)
    if places is not None:
        tokens = places.draws()
    assert tokens is not None
    going_on = []
    for place, pencil in enumerate(pencils):
        if places is not None and place in places.hopeless:
            continue
        pencil.push(tokens[place], places.law_NV[place] if places is not None and laws else None)
        if pencil.open:
            going_on.append(place)
    return going_on


@dataclass
class Pairs:
    """Hidden vectors, in pieces [M, D], and the tokens after them that the draft block has still to read for a row."""

    row: Hashable
    sequence: pages.Sequence
    hidden: list[Tensor]
    following: list[int]

    def split(self, count: int) -> tuple["Pairs", "Pairs"]:
        """The first `count`, and the rest."""
        hidden_MD = joined(self.hidden)
        return tuple(  # type: ignore[return-value]
            Pairs(self.row, self.sequence, [hidden_MD[part]], self.following[part])
            for part in (slice(count), slice(count, None))
        )


def joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def picked(places: Sequence[int], x_ND: Tensor) -> Tensor:
    """x_ND[places] in memory of its own; several times quicker on a CPU than indexing with a list."""
    if len(places) == 1:
        return x_ND[places[0] : places[0] + 1].clone()
    return x_ND.index_select(0, torch.tensor(places, dtype=torch.long, device=x_ND.device))


class MTP:
    """The model's draft block, one set of weights for every depth.

    Pairs (hidden vector, token after it) are read with the trunk's hidden vectors also at places that were drafted
    before; what drafting itself reads is taken back. A prompt's pairs are read at once; those of what is said wait
    until a draft needs them, so that a row for which nothing is drafted costs next to nothing. laws: keeps the laws
    that `rejection` needs.
    """

    needs_hidden = True
    MOST_WAITING = 64  # pairs of a row

    def __init__(self, model: HybridModel, memory: Memory, *, spelled: int | None = None, laws: bool = False):
        if model.mtp is None:
            raise ValueError("the model has no draft block (MTP)")
        self.model, self.mtp, self.memory, self.spelled, self.laws = model, model.mtp, memory, spelled, laws
        self.after: dict[Hashable, Tensor] = {}  # the block's output [D] at each row's newest pair
        self.waiting: dict[Hashable, Pairs] = {}  # pairs that were put off, or that had no page

    @torch.inference_mode()
    def observe(self, readings: Sequence[Reading]) -> None:
        many = []
        for reading in readings:
            self.after.pop(reading.row, None)
            pairs = self.waiting.get(reading.row)
            if pairs is None:
                pairs = self.waiting[reading.row] = Pairs(reading.row, reading.sequence, [], [])
            pairs.hidden.append(reading.hidden)
            pairs.following += reading.following
            if len(pairs.following) > self.MOST_WAITING:
                many.append(self.waiting.pop(reading.row))
            elif 2 * len(reading.following) < reading.of:  # a view holds on to the whole pass
                pairs.hidden[-1] = reading.hidden.clone()
        self.catch_up(many)

    def behind(self, row: Hashable) -> int:
        return len(self.waiting[row].following) if row in self.waiting else 0

    @torch.inference_mode()
    def settle(self, rows: Sequence[Hashable]) -> None:
        self.catch_up([self.waiting.pop(row) for row in rows if row in self.waiting])

    def catch_up(self, due: Sequence[Pairs]) -> None:
        """Reads pairs, all but a row's newest where that has no page: it lies at the place of a token that the trunk
        has not read, which is in a page of its own at times."""
        fitting = []
        for pairs in due:
            if not self.memory.reserve(pairs.sequence, 1):
                pairs, self.waiting[pairs.row] = pairs.split(len(pairs.following) - 1)
            fitting.append(pairs)
        self.read([pairs for pairs in fitting if pairs.following])
        for row in self.waiting.keys() & {pairs.row for pairs in due}:
            self.after.pop(row, None)

    def read(self, due: Sequence[Pairs]) -> None:
        """One pass of the draft block over pairs of the trunk's making."""
        if not due:
            return
        view = self.memory.view([Segment(pairs.sequence, len(pairs.following)) for pairs in due], "mtp")
        following_1N = torch.tensor([[token for pairs in due for token in pairs.following]], device=self.model.device)
        hidden_ND = joined([piece for pairs in due for piece in pairs.hidden])
        out_ND = self.mtp(hidden_ND[None], following_1N, state=view)[0]
        ends = [end - 1 for end in accumulate(len(pairs.following) for pairs in due)]
        newest_SD = picked(ends, out_ND)  # apart: views of the whole would hold on to the pass
        self.after.update(zip((pairs.row for pairs in due), newest_SD.unbind(0), strict=True))

    @torch.inference_mode()
    def propose(self, needs: Sequence[Need]) -> list[Draft]:
        pencils = [Pencil(need) for need in needs]
        if self.drafted_at_once(pencils):
            return [pencil.draft() for pencil in pencils]
        self.read([self.waiting.pop(need.row) for need in needs if need.row in self.waiting])
        live = [pencil for pencil in pencils if pencil.open]
        if not live:
            return [pencil.draft() for pencil in pencils]
        with taken_back(live):
            after = [self.after[pencil.need.row] for pencil in live]
            hidden_SD = after[0][None] if len(after) == 1 else torch.stack(after)
            while True:
                going_on = write(live, self.model.head(hidden_SD[None])[0], self.spelled, self.laws)
                live = [live[place] for place in going_on]
                if not live:
                    break
                newest_1S = torch.tensor([[pencil.tokens[-1] for pencil in live]], device=self.model.device)
                view = self.memory.view([Segment(pencil.need.sequence, 1) for pencil in live], "mtp")
                hidden_SD = hidden_SD if len(going_on) == len(hidden_SD) else picked(going_on, hidden_SD)
                hidden_SD = self.mtp(hidden_SD[None], newest_1S, state=view)[0]
        return [pencil.draft() for pencil in pencils]

    def drafted_at_once(self, pencils: Sequence[Pencil]) -> bool:
        """Whether pairs could be read and all drafts written in one call: of rows that want as many drafts, and their
        likeliest tokens."""
        rows, depth = [pencil.need.row for pencil in pencils], pencils[0].need.count
        alike = all(p.open and p.need.count == depth and likeliest_alone(p.ask) for p in pencils)
        if self.laws or not alike or not all(row in self.waiting for row in rows):
            return False
        due = [self.waiting[row] for row in rows]
        counts = [len(pairs.following) for pairs in due]
        segments = [Segment(pairs.sequence, count + depth - 1) for pairs, count in zip(due, counts, strict=True)]
        view = self.memory.view(segments, "mtp")
        hidden_ND = joined([piece for pairs in due for piece in pairs.hidden])
        following = [token for pairs in due for token in pairs.following]
        drafted = self.model.drafts(hidden_ND, following, len(rows), depth, self.spelled, view)
        if drafted is None:
            return False
        for pencil, count, newest_D, tokens in zip(pencils, counts, *drafted, strict=True):
            need = pencil.need
            need.sequence.mtp_length += count
            self.after[need.row] = newest_D
            del self.waiting[need.row]
            pencil.take(tokens)
        return True

    def drop(self, row: Hashable) -> None:
        self.after.pop(row, None)
        self.waiting.pop(row, None)


@contextmanager
def taken_back(pencils: Sequence[Pencil]) -> Iterator[None]:
    """What the draft block reads inside is forgotten afterwards. Refuses rows of which it has not read every pair."""
    lengths = {}
    for pencil in pencils:
        need = pencil.need
        if need.sequence.mtp_length != len(need.text) - 1:
            read = f"{need.sequence.mtp_length} pairs of a text with {len(need.text) - 1}"
            raise RuntimeError(f"the draft block has read {read}: observe each pass before proposing")
        lengths[need.sequence] = need.sequence.mtp_length
    try:
        yield
    finally:
        for sequence, length in lengths.items():
            sequence.mtp_length = length


class SmallModel:
    """A smaller model with the same token ids, attention or hybrid. It reads what was said and drafts on copies of its
    memory, which are thrown away: so its state is always that of the text alone.

    memory: its own, with two slots for each row that is drafted for at once. A row that it has no room for gets no
    draft; `crowded` counts these. block: tokens read per pass.
    """

    needs_hidden = False

    def __init__(
        self,
        model: HybridModel,
        memory: Memory,
        *,
        spelled: int | None = None,
        laws: bool = False,
        block: int = 2048,
    ):
        self.model, self.memory, self.spelled, self.laws, self.block = model, memory, spelled, laws, block
        self.sequences: dict[Hashable, pages.Sequence] = {}
        self.crowded = 0

    def observe(self, readings: Sequence[Reading]) -> None:
        """Nothing: it reads the texts themselves."""

    def behind(self, row: Hashable) -> int:
        return 0

    def settle(self, rows: Sequence[Hashable]) -> None:
        """Nothing: its memory is its own."""

    @torch.no_grad()
    def propose(self, needs: Sequence[Need]) -> list[Draft]:
        pencils = [Pencil(need) for need in needs]
        live = [pencil for pencil in pencils if pencil.open and self.opened(pencil.need)]
        if live:
            logits_SV = self.model.head(self.read([pencil.need for pencil in live])[None])[0]
            twins: list[pages.Sequence] = []
            try:
                self.draw(live, logits_SV, twins)
            finally:
                for twin in twins:
                    self.memory.close(twin)
        return [pencil.draft() for pencil in pencils]

    def opened(self, need: Need) -> bool:
        """Whether there is a sequence for the row, with room for its whole text."""
        sequence = self.sequences.get(need.row) or self.memory.open()
        if sequence is not None:
            self.sequences[need.row] = sequence
            if self.memory.reserve(sequence, len(need.text) - sequence.length):
                return True
            self.drop(need.row)
        self.crowded += 1
        return False

    def read(self, needs: Sequence[Need]) -> Tensor:
        """Reads each text to its end, `block` tokens a pass; the hidden vectors of the last tokens [S, D]."""
        last: dict[Hashable, Tensor] = {}
        while unread := [need for need in needs if self.sequences[need.row].length < len(need.text)]:
            segments, ends, left = [], [], self.block
            tokens: list[int] = []
            for need in unread:
                sequence = self.sequences[need.row]
                part = need.text[sequence.length : sequence.length + left]
                left -= len(part)
                if part:
                    segments.append(Segment(sequence, len(part)))
                    tokens += part
                    ends.append((need.row, len(tokens) - 1))
            hidden_ND = self.hidden(tokens, segments)
            last |= {row: hidden_ND[end] for row, end in ends}
        return torch.stack([last[need.row] for need in needs])

    def draw(self, live: list[Pencil], logits_SV: Tensor, twins: list[pages.Sequence]) -> None:
        """Drafts until no row has use for more; `twins` takes the copies that are to be closed."""
        going_on = write(live, logits_SV, self.spelled, self.laws)
        pairs = []
        for pencil in (live[place] for place in going_on):
            twin = self.memory.fork(self.sequences[pencil.need.row])
            if twin is None:
                self.crowded += 1
                continue
            twins.append(twin)
            pairs.append((pencil, twin))
        while pairs:
            fits = [self.memory.reserve(twin, 1) for _, twin in pairs]
            self.crowded += fits.count(False)
            pairs = [pair for pair, fit in zip(pairs, fits, strict=True) if fit]
            if pairs:
                newest = [pencil.tokens[-1] for pencil, _ in pairs]
                hidden_SD = self.hidden(newest, [Segment(twin, 1) for _, twin in pairs])
                logits_SV = self.model.head(hidden_SD[None])[0]
                going_on = write([pencil for pencil, _ in pairs], logits_SV, self.spelled, self.laws)
                pairs = [pairs[place] for place in going_on]

    def hidden(self, tokens: list[int], segments: list[Segment]) -> Tensor:
        tokens_1N = torch.tensor([tokens], device=self.model.device)
        return self.model.hidden(tokens_1N, state=self.memory.view(segments))[0]

    def drop(self, row: Hashable) -> None:
        sequence = self.sequences.pop(row, None)
        if sequence is not None:
            self.memory.close(sequence)


class LookUp:
    """Prompt look-up: drafts what followed the longest earlier stretch that ends like the text, of several the newest.

    shortest, longest: tokens of such a stretch. Stretches are found by their last `shortest` tokens; of those that
    share them, the `reach` newest are compared. A continuation may run past the end of the text into itself, as it
    does where the text repeats.
    """

    needs_hidden = False

    def __init__(self, shortest: int = 2, longest: int = 6, reach: int = 16):
        self.shortest, self.longest, self.reach = shortest, longest, reach
        self.indices: dict[Hashable, Index] = {}

    def observe(self, readings: Sequence[Reading]) -> None:
        """Nothing: texts are looked at when they are due a draft."""

    def behind(self, row: Hashable) -> int:
        return 0

    def settle(self, rows: Sequence[Hashable]) -> None:
        """Nothing: it has no memory in the model's."""

    def propose(self, needs: Sequence[Need]) -> list[Draft]:
        return [Draft(self.continuation(need)) for need in needs]

    def continuation(self, need: Need) -> list[int]:
        text, tokens = need.text, list[int]()
        index = self.indices.setdefault(need.row, Index(self.shortest))
        index.extend(text)
        best, start = 0, None
        for place in index.places(text, self.reach):
            same = self.shortest
            while same < min(self.longest, place) and text[place - 1 - same] == text[len(text) - 1 - same]:
                same += 1
            if same > best:
                best, start = same, place
        while start is not None and len(tokens) < need.count and not (tokens and tokens[-1] in need.ends):
            ahead = start + len(tokens)
            tokens.append(text[ahead] if ahead < len(text) else tokens[ahead - len(text)])
        return tokens

    def drop(self, row: Hashable) -> None:
        self.indices.pop(row, None)


class Index:
    """Where each `size` tokens of a growing text were followed by more: the newest place, and from each place the one
    before it with the same tokens."""

    def __init__(self, size: int):
        self.size = size
        self.newest: dict[tuple[int, ...], int] = {}
        self.before: list[int | None] = []  # by place, the place of the token that follows the stretch

    def extend(self, text: Sequence[int]) -> None:
        """Takes the text so far; stretches that nothing follows yet wait for the next call."""
        for place in range(len(self.before), len(text)):
            if place < self.size:
                self.before.append(None)
                continue
            stretch = tuple(text[place - self.size : place])
            self.before.append(self.newest.get(stretch))
            self.newest[stretch] = place

    def places(self, text: Sequence[int], count: int) -> Iterator[int]:
        """Up to `count` places after stretches that are the text's last, newest first."""
        place = self.newest.get(tuple(text[-self.size :]))
        while place is not None and count:
            yield place
            place, count = self.before[place], count - 1
