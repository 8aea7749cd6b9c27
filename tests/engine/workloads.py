"""Random work for the engine: requests that begin alike, engines with little memory."""

import random
from collections.abc import Iterator

import torch

from tests.models import tiny
from trimaran.engine.engine import Engine
from trimaran.engine.pages import Unit
from trimaran.engine.plain import generate
from trimaran.engine.request import EngineSettings, Request
from trimaran.engine.row import Output
from trimaran.engine.sampler import Sampling
from trimaran.model.hybrid import HybridModel


def requests(dice: random.Random, vocabulary: int, count: int) -> list[Request]:
    """Prompts of 1 to 90 tokens, many with a common beginning, some repeated; every kind of sampling."""
    common = [dice.randrange(vocabulary) for _ in range(60)]
    made: list[Request] = []
    for number in range(count):
        prompt = common[: dice.randrange(60)] if dice.random() < 0.6 else []
        prompt += [dice.randrange(vocabulary) for _ in range(dice.choice([1, 2, 5, 17, 30]))]
        if made and dice.random() < 0.3:
            prompt = list(dice.choice(made).prompt)
        sampling = Sampling(
            temperature=dice.choice([0, 1.0, 0.7]),
            top_p=dice.choice([1, 0.9]),
            repetition_penalty=dice.choice([1, 1.2]),
            max_tokens=dice.randrange(1, 20),
            samples=dice.choice([1, 1, 1, 3, 5]),
            seed=number % 4,
            ignore_eos=dice.random() < 0.5,
            logprobs=dice.random() < 0.5,
        )
        turns = tuple(sorted({dice.randrange(1, len(prompt) + 1) for _ in range(dice.randrange(3))}))
        made.append(Request(tuple(prompt), sampling, dice.choice([0, 0, 0, 1, -1]), turns=turns))
    return made


def settings(dice: random.Random, model: HybridModel, asked: list[Request], **fixed: object) -> EngineSettings:
    """Settings of every kind; memory for the largest request and little more."""
    drafters = ["none", "lookup", *(["mtp"] * 2 if model.mtp is not None else [])]
    page = dice.choice([1, 2, 4, 16, 32])
    chosen = EngineSettings(
        **{
            "rows": dice.choice([1, 2, 4, 9]),
            "tokens_per_pass": dice.choice([1, 3, 7, 16, 50, 512]),
            "page": page,
            "prefix_cache": dice.random() < 0.7,
            "snapshots": dice.choice([1, 3, 20]),
            "snapshot_every": dice.choice([0, 5, 16]),
            "drafter": dice.choice(drafters),
            "draft": dice.choice([0, 0, 1, 3]),
            "shared_prefix": dice.choice([None, True, False]),
            **fixed,
        }
    )
    longest = max(len(one.prompt) + one.sampling.max_tokens for one in asked)
    pages = max(-(-longest // chosen.page) + dice.choice([0, 0, 1, 5, 50]), chosen.rows) + 1
    return squeezed(chosen, model, pages)


def squeezed(chosen: EngineSettings, model: HybridModel, pages: int) -> EngineSettings:
    """The settings with memory for `pages` pages, a few more where snapshots would else take over half of it."""
    draft = 0 if chosen.drafter == "none" else chosen.draft or chosen.draft_limit
    wide = torch.promote_types(model.dtype, torch.float32)
    unit = Unit.of(model.config, model.dtype, wide, chosen.page, draft)
    chosen = chosen.replace(snapshots=64 if chosen.snapshots is None else chosen.snapshots)
    states = unit.snapshot_bytes * (chosen.snapshots if chosen.prefix_cache else 0)
    rest = max((pages - chosen.rows) * unit.page_bytes + states, 2 * states)
    return chosen.replace(memory_bytes=chosen.rows * (unit.row_bytes + unit.page_bytes) + rest)


def oracle(model: HybridModel, asked: list[Request]) -> list[Output]:
    """What plain generation says."""
    return generate(model, [one.prompt for one in asked], [one.sampling for one in asked])


def compare(outputs: Iterator[Output], expected: list[Output]) -> None:
    for one, other in zip(outputs, expected, strict=True):
        assert (one.prompt, one.sample, one.seed) == (other.prompt, other.sample, other.seed)
        assert (one.tokens, one.finish, one.stop) == (other.tokens, other.finish, other.stop)
        assert (one.logprobs is None) == (other.logprobs is None)
        for pair in zip(one.logprobs or [], other.logprobs or [], strict=True):
            assert abs(pair[0] - pair[1]) < 1e-8


def at_rest(engine: Engine) -> None:
    """Nothing runs, and every page, slot and snapshot is free or the cache's."""
    assert engine.idle and not engine.scheduler.running and not engine.scheduler.waiting
    assert not engine.faults()
    if engine.cache is not None:
        engine.cache.clear()
    stats = engine.stats()
    assert (stats.free_pages, stats.free_slots) == (stats.total_pages, stats.total_slots)
    assert stats.free_snapshots == stats.total_snapshots


def small(kind: str, vocabulary: int = 7) -> HybridModel:
    return tiny(kind, vocab_size=vocabulary)
