"""Who reads what in the next pass.

    decode    every text that is waiting for nothing but its next token gets that token, and room for drafts
    prefill   what is left of the pass's tokens goes to prompts, in chunks, in order; then to new ones
    preempt   where pages or slots are missing, the cache forgets first; then the last in order gives back what it
              holds and waits, to be read anew later

The order is (priority, arrival). A text that was preempted has its own tokens to read again as well as its prompt;
since a choice depends on nothing but the text and the row's own numbers, it goes on with the same tokens.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from torch import Tensor

from trimaran.engine.pages import Memory
from trimaran.engine.pages import Sequence as Pages
from trimaran.engine.prefix import PrefixCache
from trimaran.engine.request import EngineSettings, Request
from trimaran.engine.row import Row
from trimaran.engine.speculate import Drafter

LEAST = 8  # prompts get at least one in this many of a pass's tokens, however many rows decode


@dataclass(eq=False)
class Job:
    """One sample of a request: a text that grows.

    text: prompt and output. stops: places of the text where reading pauses, for the cache to remember. leader: the
    sample that reads the prompt for this one too; None once that is done. sequence: its memory; None while it waits.
    hidden [D]: the trunk's, of the last token read, for a draft block that pairs it with the next. seen [V]: which
    tokens its text has, where a penalty asks. reread: tokens that had been read before the memory was taken away.
    """

    request: Request
    row: Row
    arrival: int
    text: list[int]
    stops: tuple[int, ...] = ()
    leader: "Job | None" = None
    seen: Tensor | None = None
    sequence: Pages | None = None
    hidden: Tensor | None = None
    reread: int = 0
    samples: list["Job"] = field(default_factory=list)  # that wait for this one to read their prompt

    @property
    def rank(self) -> tuple[int, int]:
        return self.request.priority, self.arrival

    @property
    def length(self) -> int:
        """Tokens read."""
        return 0 if self.sequence is None else self.sequence.length

    @property
    def unread(self) -> int:
        return len(self.text) - self.length


@dataclass(eq=False)
class Share:
    """What one job gets of a pass: `count` tokens of its text, and room for `room` drafts behind them.

    due: the pass reads the text to its end, so that the next token can be chosen. law [k, V]: what the drafts were
    drawn from; None: point masses. start: its place in the flat batch. begin: tokens of the text read before the pass;
    kept: those that the pass added for good.
    """

    job: Job
    count: int
    room: int = 0
    due: bool = True
    drafts: Sequence[int] = ()
    law: Tensor | None = None
    start: int = 0
    begin: int = 0
    kept: int = 0

    @property
    def tokens(self) -> list[int]:
        """What it reads, as long as it has not."""
        read = self.job.length
        return [*self.job.text[read : read + self.count], *self.drafts]


class Scheduler:
    """Jobs that run, jobs that wait, and the memory they share."""

    def __init__(
        self, memory: Memory, cache: PrefixCache | None, settings: EngineSettings, drafter: Drafter | None = None
    ):
        self.memory, self.cache, self.settings, self.drafter = memory, cache, settings, drafter
        self.ahead = 1 if settings.drafter == "mtp" else 0  # the draft block writes at the place of the next token
        self.running: list[Job] = []
        self.waiting: list[Job] = []  # both in order
        self.preemptions = self.prompt_tokens = self.cached_tokens = self.recomputed_tokens = 0

    @property
    def decoding(self) -> int:
        """Texts that wait for nothing but their next token."""
        return sum(job.unread == 1 for job in self.running)

    def plan(self, draft: int) -> list[Share]:
        """The next pass, up to `draft` drafts per row; empty when there is nothing to do."""
        shares: dict[Job, Share] = {}
        before = self.preemptions

        # decode
        ready = [job for job in self.running if job.unread == 1]
        draft = min(draft, self.settings.tokens_per_pass // len(ready) - 1) if ready else 0
        for job in ready:
            # What other samples take over must not be on trial.
            drafting = job.sequence is not None and not job.samples
            room = max(0, min(draft, job.row.room - 1)) if drafting else 0
            if room and not self.fits(job, 1 + room):
                room = 0
            if self.make_fit(job, 1, shares):
                shares[job] = Share(job, 1, room)

        # prefill
        budget = self.settings.tokens_per_pass - sum(share.count + share.room for share in shares.values())
        budget = max(budget, 1, self.settings.tokens_per_pass // LEAST)
        for job in chain([job for job in self.running if job.unread > 1], self.admitted(shares, before)):
            count = min(budget, self.next_stop(job) - job.length)
            if self.make_fit(job, count, shares):
                shares[job] = Share(job, count, due=count == job.unread)
                budget -= count
            if not budget:
                break
        return list(shares.values())

    # prefill

    def next_stop(self, job: Job) -> int:
        """Where the next chunk of the text must end at the latest."""
        return next((stop for stop in job.stops if stop > job.length), len(job.text))

    def admitted(self, shares: dict[Job, Share], preemptions: int) -> Iterator[Job]:
        """Waiting jobs, as far as memory allows; the first that does not fit holds up those behind it. None in a pass
        that has taken memory from someone: that one would be back at once."""
        for job in list(self.waiting):
            if self.preemptions > preemptions or (job.leader is None and not self.admit(job, shares)):
                return
            if job.leader is None:
                yield job

    def admit(self, job: Job, shares: dict[Job, Share]) -> bool:
        """Gives a waiting job a sequence, from the cache as far as that knows its text."""
        known, matched = (0, 0) if self.cache is None else self.cache.find(job.text)[1:]
        # Those that run will want a page each before long; without this they would soon push the newcomer out again.
        need = self.memory.pages_for(len(job.text)) - self.memory.pages_for(known) + len(self.running)
        while self.running and (not self.memory.free_slots or not self.make_room(need)):
            # Who comes later in order waits; only a lower priority makes way.
            if self.running[-1].request.priority <= job.request.priority:
                return False
            self.preempt(self.running[-1], shares)
        hit = None if self.cache is None or not self.make_room(1) else self.cache.open(job.text)
        job.sequence = self.memory.open() if hit is None else hit.sequence
        if job.sequence is None:
            return False
        job.hidden = None if hit is None else hit.hidden
        self.note(job, 0 if hit is None else hit.length, 0 if hit is None else hit.matched)
        if self.cache is not None and self.cache.keeps_points and matched - job.length >= self.memory.page:
            # Two texts part here. A third with this beginning is likely, and is to find a state at its very end.
            job.stops = tuple(sorted({*job.stops, matched}))
        self.waiting.remove(job)
        bisect.insort(self.running, job, key=lambda one: one.rank)
        return True

    def note(self, job: Job, length: int, matched: int) -> None:
        """Counts what the cache spared, and what is read although it was known before."""
        if job.reread:
            self.recomputed_tokens += max(0, job.reread - length)
        else:
            self.prompt_tokens += len(job.text)
            self.cached_tokens += length
            self.recomputed_tokens += matched - length
            for one in (job, *job.samples):
                one.row.output.cached = length
        job.reread = 0

    # preempt

    def make_room(self, pages: int) -> bool:
        """Whether `pages` are free, once the cache has forgotten what it must."""
        return self.memory.free_pages >= pages or (self.cache is not None and self.cache.make_room(pages))

    def fits(self, job: Job, tokens: int) -> bool:
        """Whether `job` has room to read `tokens` more, the cache forgetting what it must."""
        assert job.sequence is not None
        tokens += self.ahead
        missing = self.memory.pages_for(job.length + tokens) - len(job.sequence.pages)
        return self.make_room(missing) and self.memory.reserve(job.sequence, tokens)

    def make_fit(self, job: Job, tokens: int, shares: dict[Job, Share]) -> bool:
        """Room for `tokens` more of `job`, taken from those behind it in order; False: it was itself the last."""
        while job.sequence is not None:
            if self.fits(job, tokens):
                return True
            self.preempt(self.running[-1], shares)
        return False

    def preempt(self, job: Job, shares: dict[Job, Share]) -> None:
        """Takes a job's memory away; what it has read stays in the cache for as long as nobody needs the room."""
        assert job.sequence is not None
        shares.pop(job, None)
        job.reread = job.length
        if self.cache is not None and job.length:
            if self.drafter is not None:
                self.drafter.settle([job])
            self.cache.remember(job.text, job.sequence, job.hidden)
        self.release(job)
        self.preemptions += 1
        self.wait(job)

    # coming and going

    def wait(self, job: Job) -> None:
        bisect.insort(self.waiting, job, key=lambda one: one.rank)

    def release(self, job: Job) -> None:
        """Gives back the memory of a running job, which then runs no more."""
        assert job.sequence is not None
        self.memory.close(job.sequence)
        if self.drafter is not None:
            self.drafter.drop(job)
        self.running.remove(job)
        job.sequence = job.hidden = None

    def drop(self, job: Job) -> None:
        """Forgets a job, wherever it is. Samples that waited for it to read their prompt read it themselves."""
        if job.sequence is not None:
            self.release(job)
        elif job in self.waiting:
            self.waiting.remove(job)
        for sample in job.samples:
            sample.leader = None
        job.samples.clear()

    def fork(self, job: Job) -> list[Job]:
        """The samples that go on from where `job` has just read their prompt. The others will read it themselves."""
        forked = []
        if job.samples and self.drafter is not None:
            self.drafter.settle([job])
        for sample in job.samples:
            sample.leader = None
            sample.sequence = self.twin(job)
            if sample.sequence is not None:
                sample.hidden = job.hidden
                self.waiting.remove(sample)
                bisect.insort(self.running, sample, key=lambda one: one.rank)
                forked.append(sample)
        job.samples.clear()
        return forked

    def twin(self, job: Job) -> Pages | None:
        """A second sequence that has read what `job` has, with room for the draft block's next pair."""
        assert job.sequence is not None
        sequence = self.memory.fork(job.sequence) if self.make_room(2) else None
        if sequence is not None and not self.memory.reserve(sequence, self.ahead):
            self.memory.close(sequence)
            return None
        return sequence
