"""Drafters over the paged memory: what is said stays plain generation's, what is remembered that of a fresh pass."""

import itertools
import random

import pytest
import torch

from tests.models import tiny
from trimaran.engine import plain
from trimaran.engine.choose import Ask, choose
from trimaran.engine.paged import Segment
from trimaran.engine.pages import Memory
from trimaran.engine.row import open_rows
from trimaran.engine.sampler import Sampling, probabilities
from trimaran.engine.speculate import MTP, Draft, DraftLength, LookUp, Need, Reading, SmallModel
from trimaran.ops import backend, native, native_stack

VOCAB = 5  # so that random drafts are right now and then
PROMPTS = [[3, 4, 1, 4, 3, 4], [1], [0, 4, 4, 0, 1, 3, 0, 4, 4] * 3, [4, 3]]
SETTINGS = [
    Sampling(temperature=0, max_tokens=16, ignore_eos=True),
    Sampling(temperature=0.8, top_p=0.9, max_tokens=24, seed=3, ignore_eos=True),
    Sampling(temperature=1.0, repetition_penalty=1.3, max_tokens=20, seed=4, ignore_eos=True),
    Sampling(temperature=0, max_tokens=30, stop_ids=(3,)),
]


def test_draft_length_follows_the_published_rule():
    """One row that accepts min(m, l), as worked out by hand; then rows that have ended, and the limit."""
    lengths, rule = [], DraftLength()
    for m in (7, 9, 11, 3, 3, 3, 2, 2, 5, 4, 6):
        rule.update([min(m, rule.length)])
        lengths.append(rule.length)
    assert lengths == [9, 11, 13, 11, 8, 6, 4, 2, 4, 6, 8]
    rule.update([3, 8, 0])
    assert rule.length == 10
    rule.update([])
    assert rule.length == 10
    for _ in range(20):
        rule.update([rule.length])
    assert rule.length == 32
    assert DraftLength(limit=3).length == 3


class Loop:
    """A small engine: rows of the paged memory, ragged drafts, one verification of all rows per pass."""

    def __init__(self, model, drafter, memory, prompts, settings, acceptance="coupled"):
        self.model, self.drafter, self.memory, self.acceptance = model, drafter, memory, acceptance
        self.rows = open_rows(model.config, prompts, settings, None)
        self.texts = {row: list(prompts[row.output.prompt]) for row in self.rows}
        self.sequences = {row: memory.open() for row in self.rows}
        for row in self.rows:
            memory.reserve(self.sequences[row], len(self.texts[row]))
        self.live = list(self.rows)
        self.step({row: Draft() for row in self.rows})

    def ask(self, row, draft=None):
        draft = draft or Draft()
        seen = torch.zeros(VOCAB, dtype=torch.bool)
        seen[self.texts[row]] = True
        return row.ask(seen, draft.tokens, draft.law)

    def drafts(self, lengths):
        needs = []
        for row in self.live:
            count = min(lengths(), row.room - 1)
            assert self.memory.reserve(self.sequences[row], 1 + count)
            needs.append(Need(row, self.sequences[row], self.texts[row], self.ask(row), count, row.ends))
        drafts = self.drafter.propose(needs)
        assert all(len(draft.tokens) <= need.count for need, draft in zip(needs, drafts, strict=True))
        return dict(zip(self.live, drafts, strict=True))

    @torch.no_grad()
    def step(self, drafts):
        segments, tokens, asks, places = [], [], [], []
        for row in self.live:
            sequence, draft = self.sequences[row], drafts[row]
            unread = self.texts[row][sequence.length :] + draft.tokens
            segments.append(Segment(sequence, len(unread), trial=bool(draft.tokens)))
            places.append(range(len(tokens), len(tokens) + len(unread)))
            tokens += unread
            asks.append(self.ask(row, draft))
        view = self.memory.view(segments)
        hidden = self.model.hidden(torch.tensor([tokens]), state=view)[0]
        chosen = [place for own, ask in zip(places, asks, strict=True) for place in own[-1 - len(ask.drafts) :]]
        choices = choose(self.model.head(hidden[chosen][None])[0], asks, acceptance=self.acceptance)
        kept = [len(own) - len(ask.drafts) + c.accepted for own, ask, c in zip(places, asks, choices, strict=True)]
        view.keep(kept)
        readings = []
        for row, own, count, choice, ask in zip(self.live, places, kept, choices, asks, strict=True):
            row.output.passes += 1
            row.output.drafted += len(ask.drafts)
            row.output.accepted += choice.accepted
            for token in choice.tokens:
                if row.output.finish is None:
                    row.push(token, None)
                    self.texts[row].append(token)
            if row.output.finish is None:
                vectors = hidden[own[0] : own[0] + count]
                readings.append(Reading(row, self.sequences[row], vectors, self.texts[row][-count:]))
            else:
                self.memory.close(self.sequences[row])
                self.drafter.drop(row)
        self.drafter.observe(readings)
        self.live = [row for row in self.live if row.output.finish is None]

    def run(self, lengths):
        while self.live:
            self.step(self.drafts(lengths))
        return [row.output for row in self.rows]


def ragged(seed: int):
    """Draft lengths that differ from row to row and pass to pass."""
    numbers = random.Random(seed)
    return lambda: numbers.randint(0, 5)


def drafter_for(name: str, model, memory, laws: bool = False):
    if name == "mtp":
        return MTP(model, memory, laws=laws)
    if name == "lookup":
        return LookUp()
    small = tiny("dense" if name == "hybrid" else "rope", vocab_size=VOCAB, seed=5)
    return SmallModel(small, Memory(small, rows=16, pages=200, page=4), laws=laws, block=8)


EVERY = ["mtp", "lookup", "hybrid", "attention"]


@pytest.mark.parametrize("kind", ["latent", "everything"])
@pytest.mark.parametrize("name", EVERY)
def test_drafts_change_nothing_that_is_said(kind, name):
    model = tiny(kind, vocab_size=VOCAB)
    memory = Memory(model, rows=8, pages=100, page=4, draft=5)
    drafter = drafter_for(name, model, memory)
    outputs = Loop(model, drafter, memory, PROMPTS, SETTINGS).run(ragged(1))
    for output, expected in zip(outputs, plain.generate(model, PROMPTS, SETTINGS), strict=True):
        assert (output.tokens, output.finish, output.stop) == (expected.tokens, expected.finish, expected.stop)
    drafted, accepted = sum(output.drafted for output in outputs), sum(output.accepted for output in outputs)
    assert 0 < accepted < drafted
    assert memory.free_slots == 8 and memory.free_pages == 100
    if isinstance(drafter, SmallModel):
        assert drafter.memory.free_slots == 16 and drafter.memory.free_pages == 200 and not drafter.crowded


def test_a_sampled_row_drafted_by_its_own_model_accepts_everything():
    """The draft model is the model itself: drawn with the row's own numbers, its drafts are what the row draws."""
    model = tiny("latent", vocab_size=VOCAB)
    memory = Memory(model, rows=4, pages=100, page=4, draft=5)
    drafter = SmallModel(model, Memory(model, rows=8, pages=200, page=4))
    outputs = Loop(model, drafter, memory, PROMPTS, SETTINGS).run(lambda: 4)
    assert sum(output.drafted for output in outputs) > 40
    for output in outputs[:3]:
        assert output.accepted == output.drafted
        assert output.passes == 1 + -(-(len(output.tokens) - 1) // 5)


def test_rejection_stands_by_the_same_model_too():
    model = tiny("latent", vocab_size=VOCAB)
    memory = Memory(model, rows=4, pages=100, page=4, draft=5)
    drafter = SmallModel(model, Memory(model, rows=8, pages=200, page=4), laws=True)
    outputs = Loop(model, drafter, memory, PROMPTS, SETTINGS, "rejection").run(lambda: 4)
    assert all(output.accepted == output.drafted for output in outputs[:3])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mtp", "hybrid", "lookup"])
def test_rejection_keeps_the_joint_law_with_real_drafters(name):
    """20,000 rows of one prompt through the paged memory, against the exact law of their first 4 tokens."""
    count, prompt, vocab = 20_000, [3, 4, 1, 0, 3, 4], 3
    model = tiny("latent", vocab_size=VOCAB)
    sampling = Sampling(
        temperature=0.9, top_k=vocab, repetition_penalty=1.2, max_tokens=5, samples=2000, ignore_eos=True
    )
    law = joint_law(model, prompt, sampling)
    counts = torch.zeros_like(law)
    drafted = accepted = 0
    for seed in range(count // sampling.samples):
        memory = Memory(model, rows=2000, pages=8000, page=4, draft=5)
        drafter = drafter_for(name, model, memory, laws=True)
        if name == "hybrid":
            drafter.memory, drafter.block = Memory(drafter.model, rows=4000, pages=16000, page=4), 4096
        outputs = Loop(model, drafter, memory, [prompt], [sampling.replace(seed=seed)], "rejection").run(lambda: 3)
        for output in outputs:
            counts[tuple(output.tokens[:4])] += 1
            drafted, accepted = drafted + output.drafted, accepted + output.accepted
    assert 0.1 < accepted / drafted < 0.95
    often = law * count >= 5
    assert counts[law == 0].sum() == 0
    observed = [*counts[often].tolist(), float(counts[~often].sum())]
    expected = [*(law[often] * count).tolist(), float(law[~often].sum() * count)]
    freedom = len(observed) - 1
    z = (sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True) if e) - freedom) / (2 * freedom) ** 0.5
    assert abs(z) < 4


@torch.no_grad()
def joint_law(model, prompt: list[int], sampling: Sampling) -> torch.Tensor:
    """The exact law of the first 4 tokens, all texts of 3 read as one batch."""
    law = torch.ones([VOCAB] * 4, dtype=torch.float64)
    for depth in range(4):
        texts = torch.tensor(list(itertools.product(range(VOCAB), repeat=depth)), dtype=torch.long)
        texts = torch.cat([torch.tensor([prompt]).expand(len(texts), -1), texts], 1)
        seen = torch.zeros(len(texts), VOCAB, dtype=torch.bool).scatter(1, texts, True)
        steps = probabilities(model(texts)[:, -1], [sampling] * len(texts), seen)
        law *= steps.reshape([VOCAB] * (depth + 1) + [1] * (3 - depth))
    return law


@torch.no_grad()
def test_the_draft_block_remembers_what_the_trunk_said():
    """After ragged drafts and verifications its next drafts are those of a row read in one go."""
    model = tiny("everything", vocab_size=VOCAB)
    memory = Memory(model, rows=8, pages=100, page=4, draft=5)
    loop = Loop(model, MTP(model, memory), memory, PROMPTS[:3], SETTINGS[:3])
    lengths = ragged(2)
    for _ in range(4):
        loop.step(loop.drafts(lengths))
    loop.drafter.settle(list(loop.live))
    before = {row: (loop.sequences[row].mtp_length, list(loop.texts[row])) for row in loop.live}
    drafts = loop.drafts(lambda: 5)
    assert before == {row: (loop.sequences[row].mtp_length, loop.texts[row]) for row in loop.live}
    for row in loop.live:
        text = loop.texts[row]
        assert loop.sequences[row].mtp_length == len(text) - 1
        state = model.new_state(1)
        hidden = model.hidden(torch.tensor([text[:-1]]), state=state)
        hidden = model.mtp(hidden, torch.tensor([text[1:]]), state=state.mtp)[:, -1:]
        torch.testing.assert_close(loop.drafter.after[row], hidden[0, 0], rtol=1e-9, atol=1e-9)
        ask = loop.ask(row)
        for ahead, token in enumerate(drafts[row].tokens):
            if ahead:
                hidden = model.mtp(hidden, torch.tensor([drafts[row].tokens[ahead - 1 : ahead]]), state=state.mtp)
            seen = ask.seen.clone()
            seen[drafts[row].tokens[:ahead]] = True
            again = row.ask(seen)
            again = type(again)(again.settings, again.key, again.place + ahead, seen)
            assert choose(model.head(hidden)[0], [again])[0].tokens == [token]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_drafts_in_one_call_are_the_steps_drafts(rows, depth, dtype, monkeypatch):
    """Several rows, with as many pairs to read as it happens: the drafts, what the block remembers, and its output."""
    sizes = {"head_dim": 16, "ssm_state_size": 16, "vocab_size": 50, "initializer_range": 0.15}
    model, calls = tiny("latent", dtype, **sizes), []
    at_once = native_stack.drafts
    monkeypatch.setattr(native_stack, "drafts", lambda *given: calls.append(given) or at_once(*given))
    generator = torch.Generator().manual_seed(rows)

    def run(setting):
        memory = Memory(model, rows=rows, pages=16 * rows, page=4)
        drafter, said = MTP(model, memory, spelled=47), []
        texts = [[row + 1] * 3 for row in range(rows)]
        sequences = [memory.open() for _ in texts]
        generator.manual_seed(rows)
        for turn in range(3):
            due = [1 + (row + turn) % 3 for row in range(rows)] if turn else [2] * rows
            for row, (sequence, text, count) in enumerate(zip(sequences, texts, due, strict=True)):
                hidden = torch.randn(count, 32, generator=generator).to(dtype)
                text += [1] * count if turn else []
                assert memory.reserve(sequence, len(text) + depth + 2)
                drafter.observe([Reading(row, sequence, hidden, text[-count:])])
            ask = [Ask(Sampling(temperature=0.0), b"", 0)] * rows
            needs = [Need(row, sequences[row], texts[row], ask[row], depth) for row in range(rows)]
            with backend.using(setting):
                said.append([draft.tokens for draft in drafter.propose(needs)])
            assert [sequence.mtp_length for sequence in sequences] == [len(text) - 1 for text in texts]
        return said, torch.stack([drafter.after[row] for row in range(rows)])

    expected, expected_after = run("-native")
    assert not calls
    found, found_after = run("auto")
    assert len(calls) == (3 if native.library() is not None else 0)
    apart = sum(a != b for one, two in zip(found, expected) for a, b in zip(one, two))
    assert apart <= (0 if dtype == torch.float32 else 0.2 * 3 * rows)  # bf16: ties of the logits as rounded
    worst = 1e-4 if dtype == torch.float32 else 3e-2
    assert (found_after - expected_after).abs().max() <= worst * expected_after.abs().max()
    assert all(token < 47 for drafts in found for draft in drafts for token in draft)


@pytest.mark.parametrize("why", ["sampled", "guide of laws", "unlike", "hook on the head", "hook on the embedding"])
def test_other_drafts_take_their_steps(why, monkeypatch):
    model = tiny("latent", torch.float32, head_dim=16, ssm_state_size=16)
    memory = Memory(model, rows=2, pages=32, page=4)
    drafter = MTP(model, memory, laws=why == "guide of laws")
    monkeypatch.setattr(native_stack, "drafts", lambda *_: pytest.fail("in one call"))
    heard = []
    if why == "hook on the head":
        model.lm_head.register_forward_hook(lambda *_: heard.append(1))
    if why == "hook on the embedding":
        model.backbone.embeddings.register_forward_pre_hook(lambda *_: heard.append(1))
    needs = []
    for row in range(2):
        sequence = memory.open()
        memory.reserve(sequence, 9)
        drafter.observe([Reading(row, sequence, torch.randn(2, 32), [1, 2])])
        ask = Ask(Sampling(temperature=0.7 if why == "sampled" else 0.0), b"", 0)
        needs.append(Need(row, sequence, [1, 1, 2], ask, 2 + (row if why == "unlike" else 0)))
    assert [len(draft.tokens) for draft in drafter.propose(needs)] == [need.count for need in needs]
    assert bool(heard) == ("hook" in why)


def test_a_draft_in_one_call_ends_where_the_row_would():
    model = tiny("latent", torch.float32, head_dim=16, ssm_state_size=16)
    memory = Memory(model, rows=1, pages=32, page=4)
    for ends, most in ((frozenset(), 4), (frozenset(range(97)), 1)):
        drafter, sequence = MTP(model, memory), memory.open()
        memory.reserve(sequence, 9)
        drafter.observe([Reading(0, sequence, torch.randn(2, 32), [1, 2])])
        (draft,) = drafter.propose([Need(0, sequence, [1, 1, 2], Ask(Sampling(temperature=0.0), b"", 0), 4, ends)])
        assert len(draft.tokens) == most
        memory.close(sequence)


@torch.no_grad()
def test_a_pair_without_a_page_waits():
    """The newest pair lies where the next token will: with no page left there, it is read once there is one."""
    model = tiny("latent", vocab_size=VOCAB)
    memory = Memory(model, rows=2, pages=2, page=4, draft=4)
    drafter, text = MTP(model, memory), [3, 4, 1, 0, 3]
    sequence, other = memory.open(), memory.open()
    assert memory.reserve(sequence, 4) and memory.reserve(other, 1)
    hidden = model.hidden(torch.tensor([text[:4]]), state=memory.view([Segment(sequence, 4)]))[0]
    drafter.observe([Reading("row", sequence, hidden, text[1:])])
    assert sequence.mtp_length == 0 and drafter.behind("row") == 4  # read when somebody needs it
    drafter.settle(["row"])
    assert sequence.mtp_length == 3 and drafter.behind("row") == 1 and len(sequence.pages) == 1
    memory.close(other)
    assert memory.reserve(sequence, 3)
    row = open_rows(model.config, [text], [Sampling(temperature=0)], None)[0]
    late = drafter.propose([Need("row", sequence, text, row.ask(None), 2)])
    assert sequence.mtp_length == 4
    whole = Memory(model, rows=1, pages=9, page=4, draft=4)
    drafter, sequence = MTP(model, whole), whole.open()
    whole.reserve(sequence, 7)
    hidden = model.hidden(torch.tensor([text[:4]]), state=whole.view([Segment(sequence, 4)]))[0]
    drafter.observe([Reading("row", sequence, hidden, text[1:])])
    assert drafter.propose([Need("row", sequence, text, row.ask(None), 2)]) == late
    with pytest.raises(RuntimeError, match="observe each pass"):
        drafter.propose([Need("row", sequence, [*text, 1], row.ask(None), 2)])


def test_a_crowded_small_model_drafts_less_and_says_so():
    model = tiny("latent", vocab_size=VOCAB)
    memory = Memory(model, rows=4, pages=100, page=4, draft=5)
    for rows, pages in ((2, 200), (5, 200), (8, 12)):
        drafter = SmallModel(model, Memory(model, rows=rows, pages=pages, page=4))
        outputs = Loop(model, drafter, memory, PROMPTS, SETTINGS).run(lambda: 4)
        assert [o.tokens for o in outputs] == [o.tokens for o in plain.generate(model, PROMPTS, SETTINGS)]
        assert drafter.crowded and sum(output.drafted for output in outputs)
        assert drafter.memory.free_slots == rows and drafter.memory.free_pages == pages


class TestLookUp:
    def continuation(self, text, count, **settings):
        drafter = LookUp(**settings)
        row = open_rows(tiny("mamba").config, [[1]], [Sampling()], None)[0]
        for end in range(1, len(text)):  # as a text grows
            drafter.propose([Need("row", None, text[:end], row.ask(None), 1)])
        return drafter.propose([Need("row", None, text, row.ask(None), count, frozenset({9}))])[0].tokens

    def test_the_longest_stretch_wins_then_the_newest(self):
        assert self.continuation([1, 2, 3, 5, 2, 3, 6, 1, 2, 3], 2) == [5, 2]
        assert self.continuation([2, 3, 5, 2, 3, 6, 4, 2, 3], 3) == [6, 4, 2]
        assert self.continuation([1, 2, 3, 5, 2, 3, 6, 1, 2, 3], 2, longest=2) == [6, 1]

    def test_a_repetition_goes_on(self):
        assert self.continuation([7, 1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
        assert self.continuation([4, 4, 4], 3) == [4, 4, 4]

    def test_nothing_after_an_end_and_nothing_where_nothing_is_known(self):
        assert self.continuation([1, 2, 9, 5, 1, 2], 4) == [9]
        assert self.continuation([1, 2, 3, 4], 4) == []
        assert self.continuation([1], 4) == []
        assert self.continuation([1, 2, 3, 1], 4) == []
        assert self.continuation([1, 2, 3, 1], 3, shortest=1) == [2, 3, 1]
