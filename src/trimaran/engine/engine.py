"""Many texts at once through one model: what `plain.py` says, token for token, whatever shares the pass.

A step is one pass of the model over a flat batch:

    plan       the scheduler gives each text its share of the pass (see scheduler.py)
    draft      a drafter proposes tokens for the texts that are due one (see speculate.py)
    read       all shares, one after the other, go through the model; each text's memory moves on
    choose     for the texts read to their end: the drafts that stand, and one token more (see choose.py)
    keep       of the drafts only those that stand have been read; the rest never happened
    remember   the cache takes what is worth keeping; texts that have ended give back what they held

Shapes: N tokens of all shares, D width.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from trimaran.engine.choose import Choice, choose
from trimaran.engine.fenced import Broken, Fenced
from trimaran.engine.paged import PagedState, Segment
from trimaran.engine.pages import Memory
from trimaran.engine.prefix import PrefixCache
from trimaran.engine.request import EngineSettings, Piece, Request, Stats, check_request
from trimaran.engine.row import Output, check_prompt, open_rows
from trimaran.engine.scheduler import Job, Scheduler, Share
from trimaran.engine.sizing import check_drafter, fitted, warnings
from trimaran.engine.speculate import MTP, Drafter, DraftLength, LookUp, Need, Reading, SmallModel, picked
from trimaran.engine.worth import Worth
from trimaran.errors import Refusal
from trimaran.model.hybrid import HybridModel
from trimaran.text.tokenizer import Tokenizer


class Engine:
    """Continues many prompts at once. For one thread: `runner.py` gives it one.

    warnings: settings that work against one another, for whoever starts the engine to show.
    """

    def __init__(
        self,
        model: HybridModel,
        tokenizer: Tokenizer | None = None,
        settings: EngineSettings = EngineSettings(),  # noqa: B008 (frozen)
        draft_model: HybridModel | None = None,
    ):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.spelled = model.config.vocab_size if tokenizer is None else tokenizer.vocab_size
        check_drafter(settings, model, draft_model)
        self.memory, draft_memory = fitted(model, settings, draft_model)
        self.warnings = warnings(settings, self.memory)
        self.drafter = self._drafter(draft_model, draft_memory)
        self.draft_length = DraftLength(limit=settings.draft_limit)
        adapting = self.drafter is not None and not settings.draft and settings.acceptance == "coupled"
        self.worth, self.clock = Worth() if adapting else None, time.perf_counter
        self.cache = PrefixCache(self.memory, settings.drafter == "mtp") if settings.prefix_cache else None
        self.scheduler = Scheduler(self.memory, self.cache, settings, self.drafter)
        self.jobs: dict[str, list[Job]] = {}
        self.shares: list[Share] = []
        self.requests = self.arrivals = self.passes = self.tokens = self.drafted = self.accepted = 0

    def _drafter(self, draft_model: HybridModel | None, draft_memory: Memory | None) -> Drafter | None:
        laws = self.settings.acceptance == "rejection"
        if self.settings.drafter == "mtp":
            return MTP(self.model, self.memory, spelled=self.spelled, laws=laws)
        if self.settings.drafter == "model":
            assert draft_model is not None and draft_memory is not None
            return SmallModel(draft_model, draft_memory, spelled=self.spelled, laws=laws)
        return LookUp() if self.settings.drafter == "lookup" else None

    # asking

    def check(self, request: Request) -> None:
        """Raises `Refusal` for a request that can never be honoured. May be called from any thread."""
        config, sampling = self.model.config, request.sampling
        check_prompt(request.prompt, 0, config)
        check_request(request, config.vocab_size)
        if sampling.stop and self.tokenizer is None:
            raise Refusal(f"stop = {list(sampling.stop)} without a tokenizer", "stop_ids", "give the engine one")
        memory, most = self.memory, len(request.prompt) + sampling.max_tokens
        if memory.pages_for(most) > memory.total_pages:
            asked = f"{len(request.prompt)} prompt tokens + max_tokens = {sampling.max_tokens} make {most}"
            holds = f"{memory.total_pages} pages x {memory.page} = {memory.total_pages * memory.page} tokens"
            raise Refusal(asked, f"what the memory holds, {holds}", "ask for less, or give the engine more memory")

    def submit(self, request: Request) -> str:
        """Takes a request; its id, under which `step` reports."""
        self.check(request)
        if request.id in self.jobs:
            raise Refusal(f"a second request with the id {request.id!r}", "an id of its own", "leave the id out")
        guides = [Fenced.maker(request.guide)]
        rows = open_rows(self.model.config, [request.prompt], [request.sampling], self.tokenizer, guides)
        jobs = [Job(request, row, self.arrivals + place, list(request.prompt)) for place, row in enumerate(rows)]
        self.arrivals += len(jobs)
        for job in jobs:
            job.stops = self._stops(request)
            if request.sampling.repetition_penalty != 1:
                job.seen = torch.zeros(self.model.config.vocab_size, dtype=torch.bool, device=self.model.device)
                job.seen[list(request.prompt)] = True
            if job is not jobs[0]:
                job.leader = jobs[0]
                jobs[0].samples.append(job)
            self.scheduler.wait(job)
        self.jobs[request.id] = jobs
        self.requests += 1
        return request.id

    def _stops(self, request: Request) -> tuple[int, ...]:
        """Places of the prompt where reading pauses: where the cache keeps a state, and before the last token where
        samples will go on from the rest. One token is always left to read, for there to be something to choose from.
        """
        last, every, places = len(request.prompt) - 1, self.settings.snapshot_every, set[int]()
        if request.sampling.samples > 1:
            places.add(last)
        if self.cache is not None and self.cache.keeps_points:
            places |= {turn for turn in request.turns if turn <= last} | {last}
            places |= set(range(every, last, every)) if every else set()
        return tuple(sorted(places - {0}))

    def abort(self, request: str) -> bool:
        """Ends a request wherever it stands and gives back all it held; False: there is none with this id."""
        for job in self.jobs.get(request, ()):
            self.scheduler.drop(job)
        return self.jobs.pop(request, None) is not None

    def generate(self, requests: Iterable[Request]) -> Iterator[Output]:
        """The outputs of all requests, in the order asked: each request's samples one after the other.

        An output's `prompt` is its request's place. Leaving early aborts the rest.
        """
        ids = [self.submit(request) for request in requests]
        samples = {one: len(self.jobs[one]) for one in ids}
        ended: dict[tuple[str, int], Output] = {}
        try:
            for place, one in enumerate(ids):
                for sample in range(samples[one]):
                    while (one, sample) not in ended:
                        for piece in self.step():
                            if piece.error is not None:
                                raise piece.error
                            if piece.output is not None:
                                ended[piece.request, piece.sample] = piece.output
                    yield replace(ended.pop((one, sample)), prompt=place)
        finally:
            for one in ids:
                self.abort(one)

    # one pass

    @torch.inference_mode()  # each call costs about half of what it does under no_grad
    def step(self) -> list[Piece]:
        """One pass: a piece for each text that grew or failed; none when there is nothing to do."""
        self.shares, began, decoding = [], self.clock(), self.scheduler.decoding
        self.check_version()
        self.shares = shares = self.scheduler.plan(self.draft_room)
        if not shares:
            return []
        self.draft(shares)
        view, hidden_ND = self.read(shares)

        due = [share for share in shares if share.due]
        for share in list(due):  # samples go on from the prompt that the first of them has read
            due += [replace(share, job=sample) for sample in self.scheduler.fork(share.job)]
        choices = self.choose(due, hidden_ND)
        pieces = [self.push(share, choice) for share, choice in zip(due, choices, strict=True)]

        if any(share.drafts for share in shares):
            view.keep([share.kept for share in shares])
            self.adapt(due, decoding)
        failed = {piece.request for piece in pieces if piece.error is not None}
        read = dict.fromkeys([*shares, *due])  # each once: those in the pass, and samples that took their prompt over
        self.remember([share for share in read if share.job.request.id not in failed], hidden_ND)
        self.leave(pieces)
        self.shares = []
        if self.worth is not None and len(due) == sum(share.count for share in shares) == decoding:
            made = [(len(share.drafts), share.kept - 1 if share.drafts else 0) for share in shares]
            self.worth.note(decoding, made, self.clock() - began)
        return pieces

    @property
    def draft_room(self) -> int:
        """Drafts per row in the next pass, at most."""
        if self.drafter is None:
            return 0
        length = self.settings.draft or self.draft_length.length
        return length if self.worth is None else min(length, self.worth.most(self.scheduler.decoding))

    def draft(self, shares: list[Share]) -> None:
        """Asks for drafts where the plan has room for them."""
        drafting = [share for share in shares if share.room]
        if self.drafter is None or not drafting:
            return
        needs = []
        for share in drafting:
            job = share.job
            assert job.sequence is not None
            needs.append(Need(job, job.sequence, job.text, job.row.ask(job.seen), share.room, job.row.ends))
        for share, draft in zip(drafting, self.drafter.propose(needs), strict=True):
            share.drafts, share.law = draft.tokens, draft.law

    def read(self, shares: list[Share]) -> tuple[PagedState, Tensor]:
        """The pass: the view that it went through, and the hidden vectors of all its tokens [N, D]."""
        tokens: list[int] = []
        segments = []
        for share in shares:
            share.start, share.begin, share.kept = len(tokens), share.job.length, share.count
            tokens += share.tokens
            assert share.job.sequence is not None
            segments.append(Segment(share.job.sequence, len(tokens) - share.start, trial=bool(share.drafts)))
        view = self.memory.view(segments)
        hidden_1ND = self.model.hidden(torch.tensor([tokens], device=self.model.device), state=view)
        self.passes += 1
        return view, hidden_1ND[0]

    def choose(self, due: list[Share], hidden_ND: Tensor) -> list[Choice]:
        """The choices after the last token of each text and after each of its drafts."""
        if not due:
            return []
        asks, places = [], list[int]()
        for share in due:
            job, last = share.job, share.start + share.count - 1
            asks.append(job.row.ask(job.seen, share.drafts, share.law, job.request.top_logprobs))
            places += range(last, last + 1 + len(share.drafts))
        # samples that begin together all look at the prompt's last place
        wanted_PD = hidden_ND if places == [*range(len(hidden_ND))] else picked(places, hidden_ND)
        logits_NV = self.model.head(wanted_PD[None])[0]
        return choose(logits_NV, asks, self.spelled, self.settings.acceptance)

    def push(self, share: Share, choice: Choice) -> Piece:
        """Hands a text its tokens, until it ends: an end token or stop string may stand among the accepted drafts."""
        job, row = share.job, share.job.row
        output, tokens, text = row.output, list[int](), ""
        for ahead, token in enumerate(choice.tokens):
            tokens.append(token)
            text += row.push(token, choice.logprobs_at(ahead))
            if output.finish is not None:
                break
        problem = row.guide.failure if isinstance(row.guide, Fenced) else None
        if problem is None and output.finish is None:
            problem = choice.refusal.problem if isinstance(choice.refusal, Broken) else choice.refusal
        if problem is not None:
            return Piece(job.request.id, output.sample, [], "", error=problem)
        accepted = min(len(tokens), choice.accepted)
        output.passes += 1
        output.drafted += len(share.drafts)
        output.accepted += accepted
        job.text += tokens
        if job.seen is not None:
            job.seen[tokens] = True
        if share.drafts:  # the last token said is not read yet, whether it was a draft or not
            share.kept = len(tokens)
        self.tokens += len(tokens)
        self.drafted += len(share.drafts)
        self.accepted += accepted
        ended = output if output.finish is not None else None
        logprobs = None if choice.logprobs is None else choice.logprobs[: len(tokens)]
        top = None if choice.top is None else choice.top[: len(tokens)]
        return Piece(job.request.id, output.sample, tokens, text, logprobs, top, ended)

    def adapt(self, due: list[Share], decoding: int) -> None:
        """Tells the draft length what became of the drafts of texts that go on, where it had its say."""
        if self.worth is not None and self.worth.most(decoding) < self.draft_length.length:
            return
        going_on = [share for share in due if share.room and share.job.row.output.finish is None]
        self.draft_length.update([share.kept - 1 for share in going_on])

    def remember(self, shares: list[Share], hidden_ND: Tensor) -> None:
        """Tells the drafter what has been read for good, and the cache what is worth keeping."""
        if self.drafter is not None and self.drafter.needs_hidden:
            self.drafter.observe([reading(share, hidden_ND, self.drafter.behind(share.job)) for share in shares])
        if self.cache is None:
            return
        if self.cache.hidden:  # apart: views would hold on to the pass
            for share, newest_D in zip(shares, picked([s.start + s.kept - 1 for s in shares], hidden_ND).unbind(0)):
                share.job.hidden = newest_D
        kept = [share.job for share in shares if self.worth_keeping(share.job)]
        if self.drafter is not None:
            self.drafter.settle(kept)
        for job in kept:
            assert job.sequence is not None
            self.cache.remember(job.text, job.sequence, job.hidden)

    def worth_keeping(self, job: Job) -> bool:
        """Whether the cache takes what a text has read: where its reading pauses for that, and when it ends. Where no
        state has to be kept, a prompt is known as soon as it is read."""
        whole = job.length == len(job.request.prompt) and self.cache is not None and not self.cache.sparse
        return whole or job.length in job.stops or job.row.output.finish is not None

    def leave(self, pieces: list[Piece]) -> None:
        """Texts that have ended give back what they held; a request one of whose samples failed ends with it."""
        for piece in pieces:
            if piece.error is not None:
                self.abort(piece.request)
            elif piece.output is not None and piece.request in self.jobs:
                jobs = self.jobs[piece.request]
                job = next(job for job in jobs if job.row.output is piece.output)
                self.scheduler.release(job)
                jobs.remove(job)
                if not jobs:
                    del self.jobs[piece.request]

    # how it stands

    @property
    def idle(self) -> bool:
        return not self.jobs

    @property
    def waiting_requests(self) -> int:
        """Requests none of whose samples runs."""
        return len({job.request.id for job in self.scheduler.waiting} - {j.request.id for j in self.scheduler.running})

    def check_version(self) -> None:
        """What other weights have remembered is forgotten; texts that they have begun cannot go on."""
        if self.memory.version == self.model.version:
            return
        if self.cache is not None:
            self.cache.clear()
        begun = [job for jobs in self.jobs.values() for job in jobs if job.length or job.row.output.tokens]
        if begun:
            change = f"from version {self.memory.version} to {self.model.version}"
            raise RuntimeError(f"the weights changed {change} under {len(begun)} texts: abort those requests first")
        self.memory.version = self.model.version

    def recover(self) -> list[str]:
        """After a step that raised: ends the requests that were in the pass, or all where it had not begun, and names
        them. Whether the rest can go on is what `faults` says."""
        failed = {share.job.request.id for share in self.shares} or set(self.jobs)
        for one in failed:
            self.abort(one)
        self.shares = []
        return sorted(failed)

    def faults(self) -> list[str]:
        """Where counts and owners of pages, slots and snapshots disagree; empty when all is accounted for."""
        memory, running = self.memory, self.scheduler.running
        owners = Counter(page for job in running if job.sequence is not None for page in job.sequence.pages)
        points = 0
        if self.cache is not None:
            owners.update(block.page for block in self.cache.blocks if block.page is not None)
            points = sum(block.points[place].snapshot is not None for block, place in self.cache.points)
        counts = {page: memory.references(page) for page in range(memory.total_pages)}
        found = [
            f"page {page} has {count} references and {owners[page]} owners"
            for page, count in counts.items()
            if count != owners[page]
        ]
        taken = sum(map(bool, counts.values()))
        for name, held, used, free, total in (
            ("pages", "held", taken, memory.free_pages, memory.total_pages),
            ("slots", "running", len(running), memory.free_slots, memory.total_slots),
            ("snapshots", "cached", points, memory.free_snapshots, memory.total_snapshots),
        ):
            if used + free != total:
                found.append(f"{name}: {used} {held} and {free} free of {total}")
        return found

    def stats(self) -> Stats:
        """The counts of this moment."""
        memory, scheduler = self.memory, self.scheduler
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            free_pages=memory.free_pages,
            total_pages=memory.total_pages,
            free_slots=memory.free_slots,
            total_slots=memory.total_slots,
            free_snapshots=memory.free_snapshots,
            total_snapshots=memory.total_snapshots,
            cached_pages=0 if self.cache is None else self.cache.held_pages,
            cached_snapshots=0 if self.cache is None else self.cache.held_snapshots,
            requests=self.requests,
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            recomputed_tokens=scheduler.recomputed_tokens,
            recomputed_bytes=scheduler.recomputed_tokens * memory.unit.kv_token,
            evictions=0 if self.cache is None else self.cache.evictions,
            preemptions=scheduler.preemptions,
            drafted=self.drafted,
            accepted=self.accepted,
            passes=self.passes,
            tokens=self.tokens,
        )


def reading(share: Share, hidden_ND: Tensor, behind: int) -> Reading:
    """What a share's text has read for good since the drafter was last told; `behind`: what it has put off of that."""
    job, sequence = share.job, share.job.sequence
    assert sequence is not None
    hidden_MD, told = hidden_ND[share.start : share.start + share.kept], sequence.mtp_length + behind
    if told < share.begin:  # taken up from the cache, which kept the hidden vector before that place
        assert job.hidden is not None and told == share.begin - 1
        hidden_MD = torch.cat([job.hidden[None], hidden_MD])
    following = job.text[told + 1 : share.begin + share.kept + 1]
    return Reading(job, sequence, hidden_MD, following, len(hidden_ND))
