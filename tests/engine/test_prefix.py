"""What the cache knows, shares, copies and forgets."""

import random

import pytest
import torch

from tests.engine.workloads import at_rest, compare, oracle, small, squeezed
from tests.models import KINDS
from trimaran.engine.engine import Engine
from trimaran.engine.request import EngineSettings, Request
from trimaran.engine.sampler import Sampling

SHORT = Sampling(temperature=0, max_tokens=3, seed=1, ignore_eos=True)


def engine_of(kind: str = "dense", vocabulary: int = 97, **chosen: object) -> Engine:
    return Engine(small(kind, vocabulary), settings=EngineSettings(**{"rows": 4, "page": 4, **chosen}))


def ask(engine: Engine, prompt: list[int], turns: tuple[int, ...] = (), sampling: Sampling = SHORT) -> int:
    """Prompt tokens that the cache spared, after comparing the answer with plain generation's."""
    one = Request(tuple(prompt), sampling, turns=turns)
    outputs = list(engine.generate([one]))
    compare(iter(outputs), oracle(engine.model, [one]))
    return outputs[0].cached


def text(length: int, seed: int = 0) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(97) for _ in range(length)]


@pytest.mark.parametrize("drafter", ["none", "mtp"])
@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 9, 31, 32, 33])
def test_a_prompt_again_needs_its_last_token_only(length, drafter):
    """Short ones too, and those that end on a page's border or beside it."""
    engine = engine_of("latent", drafter=drafter)
    assert ask(engine, text(length)) == 0
    assert ask(engine, text(length)) == length - 1
    at_rest(engine)


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_goes_on_from_its_last_answer(kind):
    engine, prompt, read = engine_of(kind, tokens_per_pass=16), text(21), 0
    for turn in range(4):
        one = Request(tuple(prompt), SHORT.replace(seed=turn))
        output = next(iter(engine.generate([one])))
        assert output.tokens == oracle(engine.model, [one])[0].tokens
        assert output.cached == read
        # all but the answer's last token, which no pass has read
        read = len(prompt) + len(output.tokens) - 1
        prompt = [*prompt, *output.tokens, *text(7, seed=turn)]


def test_a_turn_that_ended_is_a_place_to_begin_from():
    engine, prompt = engine_of(), text(40)
    ask(engine, prompt, turns=(25,))
    assert ask(engine, [*prompt[:30], *text(9, seed=1)]) == 25
    assert ask(engine, [*prompt[:24], *text(9, seed=2)]) == 0


def test_every_so_many_tokens():
    engine, prompt = engine_of(snapshot_every=8), text(40)
    ask(engine, prompt)
    for same in (7, 8, 15, 17, 33):
        assert ask(engine, [*prompt[:same], (prompt[same] + 1) % 97, 5]) == same // 8 * 8


def test_where_two_texts_part_a_third_begins():
    """Nothing marks the place: the second text shows it, and reads up to it on its own."""
    engine, prompt = engine_of(snapshot_every=32, page=8), text(60)
    for same, spared in ((50, 0), (50, 32), (50, 50), (57, 50), (57, 50), (40, 32), (57, 50)):
        assert ask(engine, [*prompt[:same], *text(9, seed=engine.requests + 1)]) == spared, same
    at_rest(engine)


def test_snapshots_take_a_share_of_the_memory():
    """So that short answers, two states each, do not soon push one another out; and large states do not take all."""
    model = small("dense", 97)
    for chosen in ({}, {"rows": 8}, {"memory_bytes": 1 << 22}, {"memory_bytes": 1 << 22, "rows": 30}):
        memory = Engine(model, settings=EngineSettings(**chosen)).memory
        share = memory.total_snapshots * memory.unit.snapshot_bytes / memory.nbytes
        assert 0.15 < share <= 0.2501, chosen

    engine = Engine(model, settings=EngineSettings(rows=4, page=4))
    answers = engine.stats().total_snapshots // 2  # two states each
    assert answers > 10 * engine.settings.rows
    prompts = [text(12, seed) for seed in range(answers)]
    for again in (0, 11):
        assert {ask_only(engine, prompt) for prompt in prompts} == {again}
    assert engine.stats().evictions == 0


def ask_only(engine: Engine, prompt: list[int]) -> int:
    """Prompt tokens that the cache spared."""
    return next(iter(engine.generate([Request(tuple(prompt), SHORT)]))).cached


def test_few_snapshots_are_told_at_the_start():
    told = engine_of(snapshots=3).warnings
    assert told == ["3 snapshots are few for 4 rows: a conversation's state may be forgotten before it goes on."]
    assert not engine_of(snapshots=4).warnings and not engine_of("rope", snapshots=1).warnings


def test_attention_alone_needs_no_places():
    engine, prompt = engine_of("rope", snapshot_every=0), text(40)
    ask(engine, prompt)
    for same in (1, 3, 4, 18, 39):
        assert ask(engine, [*prompt[:same], (prompt[same] + 1) % 97, 5]) == same
    assert engine.stats().total_snapshots == 0


def test_branches_share_the_pages_of_their_stem():
    engine, stem = engine_of(), text(16)
    ask(engine, [*stem, 1], turns=(16,))
    held = engine.stats().total_pages - engine.stats().free_pages
    for seed in range(1, 6):
        assert ask(engine, [*stem, *text(3, seed)]) == 16
    grown = engine.stats().total_pages - engine.stats().free_pages
    assert grown - held <= 5 * 2  # each branch has its last blocks, none has the stem again
    at_rest(engine)


def test_what_was_known_but_had_no_place_is_counted():
    engine, prompt = engine_of(snapshot_every=16), text(40)
    ask(engine, prompt)
    ask(engine, [*prompt[:30], *text(3, seed=1)])
    stats = engine.stats()
    assert stats.cached_tokens == 16 and stats.recomputed_tokens == 14
    assert stats.recomputed_bytes == 14 * engine.memory.unit.kv_token
    assert stats.hit_rate == pytest.approx(16 / 73)


def test_the_least_recently_used_goes_first():
    model = small("dense", 97)
    chosen = squeezed(EngineSettings(rows=1, page=4, snapshots=30, snapshot_every=0), model, 30)
    engine = Engine(model, settings=chosen)
    prompts = [text(20, seed) for seed in range(20)]
    for prompt in prompts[:3]:
        ask(engine, prompt)
    for prompt in prompts[3:]:
        assert ask(engine, prompts[0]) == 19  # used all the time
        ask(engine, prompt)
    assert engine.stats().evictions > 0
    assert ask(engine, prompts[1]) == 0 and ask(engine, prompts[0]) == 19
    at_rest(engine)


def test_the_oldest_snapshot_makes_way_and_takes_what_only_it_kept():
    engine = engine_of(snapshots=2, snapshot_every=0)
    for seed in range(5):
        ask(engine, text(20, seed))  # two places each: before the last token, and at the answer's end
        stats = engine.stats()
        assert stats.free_snapshots == 0 and not engine.faults()
        assert stats.total_pages - stats.free_pages <= 6
    assert ask(engine, text(20, seed=0)) == 0


def test_nothing_is_forgotten_for_what_cannot_be_had():
    engine = engine_of()
    ask(engine, text(20))
    before = engine.stats()
    assert not engine.cache.make_room(before.total_pages + 1)
    assert engine.stats() == before
    assert engine.cache.make_room(before.total_pages)
    assert engine.stats().free_pages == before.total_pages


def test_pages_that_a_row_reads_stay():
    engine = engine_of()
    ask(engine, text(20))
    engine.submit(Request(tuple(text(20)), SHORT.replace(max_tokens=20)))
    engine.step()
    row = engine.scheduler.running[0]
    shared = [page for page in row.sequence.pages if engine.memory.references(page) > 1]
    assert shared
    assert not engine.cache.make_room(engine.stats().total_pages)
    assert [page for page in row.sequence.pages if engine.memory.references(page) > 1] == shared


@pytest.mark.parametrize(("past", "drafter"), [(past, ["none", "mtp"][past % 2]) for past in range(3, 12)])
def test_no_nan_after_a_hit_whose_prefill_ended_past_a_border(past, drafter):
    """vLLM #55766: the prefill before had ended a few tokens past a block's border. Free memory is poisoned here."""
    engine = engine_of("latent", 7, page=16, tokens_per_pass=16 + past, drafter=drafter)
    for pool in (engine.memory.kv, engine.memory.tail, engine.memory.ssm):
        pool.fill_(torch.nan)
    dice = random.Random(past)
    stem = [dice.randrange(7) for _ in range(32 + past)]
    sampling = Sampling(max_tokens=6, seed=past, ignore_eos=True)
    for number in range(4):
        ask(engine, [*stem, *(dice.randrange(7) for _ in range(number + 1))], turns=(len(stem),), sampling=sampling)
    assert engine.stats().cached_tokens >= 3 * len(stem)


def test_a_state_kept_in_the_middle_of_a_mixed_batch():
    """SGLang #39342: states kept while prompts in chunks and decoding rows shared a pass."""
    model = small("everything", 7)
    engine = Engine(model, settings=EngineSettings(rows=4, page=4, tokens_per_pass=10, snapshot_every=8, drafter="mtp"))
    dice = random.Random(0)
    stems = [[dice.randrange(7) for _ in range(30)] for _ in range(3)]
    asked = [
        Request(
            (*stems[number % 3][: dice.randrange(8, 31)], *(dice.randrange(7) for _ in range(dice.randrange(1, 9)))),
            Sampling(max_tokens=dice.randrange(1, 12), seed=number, ignore_eos=True),
        )
        for number in range(40)
    ]
    compare(engine.generate(asked), oracle(model, asked))
    assert engine.stats().hit_rate > 0.3
    at_rest(engine)
