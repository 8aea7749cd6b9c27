"""The cases of `engine.py`: what each measures, and what must hold before it tells a speed.

A case yields rows as it goes. Two sides may part where that is a matter of rounding: where the top two logits are at
most TIE apart, or a draw's number lies within TIE of the border between the two tokens. A text that parts elsewhere
makes its row red.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trimaran import Engine, EngineSettings, Request, Sampling
from trimaran.data.shards import TokenShards
from trimaran.engine.pages import Unit
from trimaran.engine.plain import generate
from trimaran.engine.sampler import Law, draw, key_of, uniform
from trimaran.model import hub
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import HybridModel, build
from trimaran.text.tokenizer import Tokenizer

TIE = 1e-4
SPECIAL = 32  # ids below are reserved: prompts of chance leave them out
WARM = 2  # passes before those that are timed

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "mamba_num_heads": 12,
    "mamba_head_dim": 64,
    "ssm_state_size": 64,
    "n_groups": 2,
    "chunk_size": 128,
    "eos_token_id": None,
}
EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 384,
    "moe_shared_expert_intermediate_size": 768,
}
MODELS = {
    "mixed": ModelConfig(pattern="M-ME*EM-ME*-", intermediate_size=1536, **SIZES, **EXPERTS),
    "wide": ModelConfig(pattern="*-*-*-*-", intermediate_size=768, **SIZES | {"num_key_value_heads": 6}),
    "hybrid": ModelConfig(pattern="M-M-M-*-M-M-M-*-", intermediate_size=1536, **SIZES),
    "attention": ModelConfig(pattern="*-*-*-*-*-*-*-*-", intermediate_size=2120, **SIZES),
}


@dataclass(frozen=True)
class Scale:
    """How large the cases are."""

    prompt: int = 512
    new: int = 128
    concurrent: tuple[int, ...] = (1, 8, 32)
    prefix: int = 4096
    shared: int = 4096
    rows: tuple[int, ...] = (1, 2, 8, 32)
    passes: int = 24
    texts: int = 8
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)


FULL = Scale()
SMALL = Scale(24, 6, (1, 3), 640, 256, (1, 2, 3, 4), 3, 2, (64, 128))


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    scale: Scale
    repeat: int
    run: Path


@dataclass(frozen=True)
class Text:
    """A prompt and how it is continued; sample: which of its samples."""

    prompt: tuple[int, ...]
    sampling: Sampling
    sample: int = 0


class Red(Exception):
    """Two sides disagree on more than rounding."""


# agreement


@torch.no_grad()
def parting(model: HybridModel, text: Text, said: Sequence[int], both: tuple[int, int]) -> float:
    """How far the model is from finding both tokens right after `said`: 0 up to TIE is a matter of rounding."""
    logits_V = model(torch.tensor([[*text.prompt, *said]]))[0, -1].double()
    if text.sampling.temperature == 0:
        return float(logits_V.max() - logits_V[list(both)].min())
    law_1V = Law.of([text.sampling]).probabilities(logits_V[None])
    assert text.sampling.seed is not None
    number = uniform(key_of(text.sampling.seed, text.sample, text.prompt), len(said))
    around = [max(0.0, number - TIE), min(number + TIE, 1 - 2**-52)]
    first, last = draw(law_1V.expand(2, -1), around).tolist()
    return 0.0 if all(first <= token <= last for token in both) else 1.0


def agreement(
    model: HybridModel, texts: Sequence[Text], ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]
) -> dict[str, int]:
    """How many tokens were compared, and how many texts part at a tie; raises `Red` where one parts elsewhere."""
    if len(ours) != len(theirs):
        raise Red(f"{len(ours)} texts against {len(theirs)}")
    compared = ties = 0
    for row, (text, one, other) in enumerate(zip(texts, ours, theirs, strict=True)):
        place = next((place for place, (x, y) in enumerate(zip(one, other)) if x != y), None)
        if place is None:
            if len(one) != len(other):
                raise Red(f"text {row} has {len(one)} tokens against {len(other)}")
            compared += len(one)
            continue
        apart = parting(model, text, one[:place], (one[place], other[place]))
        if apart > TIE:
            raise Red(f"text {row} parts at token {place}, {one[place]} against {other[place]}, {apart:.1e} apart")
        compared, ties = compared + place, ties + 1
    return {"compared": compared, "ties": ties}


# time


@dataclass
class Times:
    """Wall and process CPU seconds of one side's turns."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @contextmanager
    def turn(self) -> Iterator[None]:
        began, burnt = time.perf_counter(), time.process_time()
        yield
        self.wall.append(time.perf_counter() - began)
        self.cpu.append(time.process_time() - burnt)

    @property
    def seconds(self) -> float:
        return statistics.median(self.wall)

    @property
    def cpu_seconds(self) -> float:
        return statistics.median(self.cpu)


def take_turns(sides: dict[str, Callable[[], Any]], repeat: int) -> dict[str, Times]:
    """The sides' times, one after the other in each round."""
    times = {name: Times() for name in sides}
    for done in range(repeat):
        for name, side in sides.items():
            with times[name].turn():
                side()
        if done == 1 and max(one.wall[-1] for one in times.values()) > 20:
            break
    return times


def against(ours: Times, theirs: Times) -> dict[str, float]:
    """Ratios that are above 1 where ours is quicker."""
    return {
        "ratio": round(theirs.seconds / ours.seconds, 3),
        "cpu_ratio": round(theirs.cpu_seconds / ours.cpu_seconds, 3),
    }


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line that fits best."""
    return statistics.linear_regression(x, y).slope


# throughput


def random_ids(count: int, generator: torch.Generator, vocab: int = SIZES["vocab_size"]) -> tuple[int, ...]:
    return tuple(torch.randint(SPECIAL, vocab, (count,), generator=generator).tolist())


def workload(count: int, scale: Scale, mixed: bool, seed: int = 0) -> list[Text]:
    """Requests of `prompt` and `new` tokens; mixed: each length between half and one and a half of that."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(count):
        stretch = (torch.rand(2, generator=generator) + 0.5).tolist() if mixed else [1.0, 1.0]
        lengths = [round(scale.prompt * stretch[0]), round(scale.new * stretch[1])]
        sampling = Sampling(temperature=0, max_tokens=lengths[1], ignore_eos=True)
        texts.append(Text(random_ids(lengths[0], generator), sampling))
    return texts


def engine_side(engine: Engine, texts: Sequence[Text]) -> Callable[[], list[list[int]]]:
    """All at once through one engine, which is used again and again."""
    requests = [(text.prompt, text.sampling) for text in texts]
    return lambda: [output.tokens for output in engine.generate(Request(*request) for request in requests)]


def static_side(peer: Any, texts: Sequence[Text]) -> Callable[[], list[list[int]]]:
    """transformers' `generate`: one batch, padded on the left, that runs until its longest answer is done."""
    longest = max(len(text.prompt) for text in texts)
    most = max(text.sampling.max_tokens for text in texts)
    ids = torch.tensor([[0] * (longest - len(text.prompt)) + list(text.prompt) for text in texts])
    mask = torch.tensor([[0] * (longest - len(text.prompt)) + [1] * len(text.prompt) for text in texts])

    def turn() -> list[list[int]]:
        out = peer.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=0)
        return [row[longest:][: text.sampling.max_tokens] for row, text in zip(out.tolist(), texts)]

    return turn


def continuous_side(peer: Any, texts: Sequence[Text]) -> Callable[[], list[list[int]]]:
    """transformers' continuous batching, which takes one longest answer for all."""
    most = max(text.sampling.max_tokens for text in texts)

    def turn() -> list[list[int]]:
        answers = peer.generate_batch([list(text.prompt) for text in texts], max_new_tokens=most)
        return [a.generated_tokens[: t.sampling.max_tokens] for a, t in zip(answers.values(), texts, strict=True)]

    return turn


def continuous_refusal(peer: Any, scale: Scale) -> str | None:
    """Why transformers' continuous batching does not serve this architecture; None where it does."""
    try:
        continuous_side(peer, workload(1, scale, mixed=False))()
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, NotImplementedError) as problem:
        return f"{type(problem).__name__}: {problem}"
    return None


def load_peer(folder: str) -> Any:
    """transformers' own model from the folder that ours wrote, without its clamp of `dt`, which the model lacks."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    model.generation_config.eos_token_id = None
    return model


def throughput(asked: Asked) -> Iterator[dict[str, Any]]:
    """Tokens chosen per second, prompts included in the time."""
    with tempfile.TemporaryDirectory() as folder:
        hub.save(build(MODELS["mixed"]), folder)
        model, peer = hub.load(folder).eval(), load_peer(folder)
    peers = {"static": static_side}
    refusal = continuous_refusal(peer, asked.scale)
    if refusal is None:
        peers["continuous"] = continuous_side
    else:
        yield {"peer": "continuous", "refused": refusal}
    for count in asked.scale.concurrent:
        for mixed in (False, True) if count > 1 else (False,):
            texts = workload(count, asked.scale, mixed)
            engine = Engine(model, settings=EngineSettings(rows=count, prefix_cache=False))
            sides = {"ours": engine_side(engine, texts)} | {name: side(peer, texts) for name, side in peers.items()}
            row = {"concurrent": count, "lengths": "mixed" if mixed else "even"}
            yield from throughput_rows(row, model, texts, sides, asked.repeat)


def throughput_rows(
    row: dict[str, Any], model: HybridModel, texts: list[Text], sides: dict[str, Callable], repeat: int
) -> Iterator[dict[str, Any]]:
    """A row per peer."""
    said = {name: side() for name, side in sides.items()}  # also warms up
    agreed: dict[str, dict[str, int]] = {}
    for name in [name for name in sides if name != "ours"]:
        try:
            agreed[name] = agreement(model, texts, said["ours"], said[name])
        except Red as red:
            yield row | {"peer": name, "red": str(red)}
    times = take_turns({name: side for name, side in sides.items() if name in ("ours", *agreed)}, repeat)
    tokens = sum(text.sampling.max_tokens for text in texts)
    for name, counts in agreed.items():
        yield {
            **row,
            "peer": name,
            "prompt_tokens": sum(len(text.prompt) for text in texts),
            "tokens": tokens,
            "ours": round(tokens / times["ours"].seconds, 1),
            "theirs": round(tokens / times[name].seconds, 1),
            **against(times["ours"], times[name]),
            "cpu_s": round(times["ours"].cpu_seconds, 3),
            "peer_cpu_s": round(times[name].cpu_seconds, 3),
            **counts,
            "repeats": len(times["ours"].wall),
        }


# prefix


def first_token(engine: Engine, text: Text, times: Times, turns: tuple[int, ...] = ()) -> list[int]:
    """Submits a request and times it until its first token; all of its tokens."""
    with times.turn():
        engine.submit(Request(text.prompt, text.sampling, turns=turns))
        pieces = until_token(engine)
    while not engine.idle:
        pieces += engine.step()
    return [token for piece in pieces for token in piece.tokens]


def until_token(engine: Engine) -> list[Any]:
    """Steps until someone has a token."""
    pieces: list[Any] = []
    while not any(piece.tokens for piece in pieces):
        pieces += engine.step()
    return pieces


def prefix(asked: Asked) -> Iterator[dict[str, Any]]:
    """Two questions about one long text: the first reads it, the second finds it."""
    model = build(MODELS["mixed"]).eval()
    settings = EngineSettings(rows=2)
    length, own = asked.scale.prefix, asked.scale.prompt // 8
    for marked, prefix_tokens in ((True, length), (False, length - settings.snapshot_every // 5)):
        cold, warm = Times(), Times()
        spared = recomputed = nbytes = 0
        row: dict[str, Any] = {"prefix": prefix_tokens, "own": own, "marked_turn": marked}
        try:
            for seed in range(asked.repeat):
                generator = torch.Generator().manual_seed(seed)
                shared = random_ids(prefix_tokens, generator)
                sampling = Sampling(temperature=0, max_tokens=8, ignore_eos=True)
                first, second = (Text(shared + random_ids(own, generator), sampling) for _ in range(2))
                turns = (prefix_tokens,) if marked else ()
                engine = Engine(model, settings=settings)
                first_token(engine, first, cold, turns)
                before = engine.stats()
                said = first_token(engine, second, warm, turns)
                after = engine.stats()
                without = Engine(model, settings=settings.replace(prefix_cache=False))
                agreement(model, [second], [said], [first_token(without, second, Times())])
                spared += after.cached_tokens - before.cached_tokens
                recomputed += after.recomputed_tokens - before.recomputed_tokens
                nbytes += after.recomputed_bytes - before.recomputed_bytes
        except Red as red:
            yield row | {"red": str(red)}
            continue
        yield row | {
            "cold_ms": round(1e3 * cold.seconds, 1),
            "cached_ms": round(1e3 * warm.seconds, 1),
            **against(warm, cold),
            "cold_cpu_s": round(cold.cpu_seconds, 3),
            "cached_cpu_s": round(warm.cpu_seconds, 3),
            "cached_tokens": spared // asked.repeat,
            "recomputed_tokens": recomputed // asked.repeat,
            "recomputed_bytes": nbytes // asked.repeat,
            "repeats": asked.repeat,
        }


# sharing


def formula(rows: int, context: int, decoded: int, layers: int, key_bytes: int) -> tuple[int, int]:
    """Bytes of keys and values that a pass reads, shared and dense: g k (m_c + b m_d) and g k b (m_c + m_d), twice.

    key_bytes: of one key and its value in one layer.
    """
    return layers * key_bytes * (context + rows * decoded), layers * key_bytes * rows * (context + decoded)


def sharing(asked: Asked) -> Iterator[dict[str, Any]]:
    """b samples of one prompt: what a pass reads and how long it takes, shared and dense."""
    model, scale = build(MODELS["wide"]).eval(), asked.scale
    generator = torch.Generator().manual_seed(0)
    prompt = random_ids(scale.shared + 1, generator)  # the last token is read by the sample that reads for all
    took: dict[str, list[float]] = {"shared": [], "dense": []}
    for rows in scale.rows:
        row = one_sharing(model, prompt, rows, scale.passes)
        yield row
        if "red" not in row:
            for name, values in took.items():
                values.append(row[f"{name}_ms"])
    if len(took["dense"]) == len(scale.rows):
        slopes = {name: slope(scale.rows, values) for name, values in took.items()}
        yield {
            **{f"{name}_slope_ms_per_row": round(value, 4) for name, value in slopes.items()},
            "slope_ratio": round(slopes["dense"] / slopes["shared"], 2),
        }


def one_sharing(model: HybridModel, prompt: tuple[int, ...], rows: int, passes: int) -> dict[str, Any]:
    """One number of samples; both engines take turns pass by pass."""
    sampling = Sampling(temperature=1.0, samples=rows, seed=0, max_tokens=WARM + passes + 1, ignore_eos=True)
    settings = EngineSettings(rows=rows + 1, prefix_cache=False)  # one more, for memory goes by rows
    engines = {"shared": Engine(model, settings=settings)}
    engines["dense"] = Engine(model, settings=settings.replace(shared_prefix=False))
    said: dict[str, list[list[int]]] = {name: [[] for _ in range(rows)] for name in engines}
    times, read = {name: Times() for name in engines}, dict.fromkeys(engines, 0)

    def note(name: str, pieces: list[Any]) -> None:
        for piece in pieces:
            said[name][piece.sample] += piece.tokens

    for name, engine in engines.items():
        engine.submit(Request(prompt, sampling))
        note(name, until_token(engine))
    for number in range(WARM + passes):
        for name, engine in engines.items():
            before, one = engine.memory.bytes_read, Times()
            with one.turn():
                pieces = engine.step()
            note(name, pieces)
            if number >= WARM:
                read[name] += engine.memory.bytes_read - before
                times[name].wall += one.wall
                times[name].cpu += one.cpu
    memory, context = engines["shared"].memory, len(prompt) - 1
    layers = len(memory.places["trunk"])
    key_bytes = memory.unit.kv_token // sum(map(len, memory.places.values()))
    due = [formula(rows, context, number + 2, layers, key_bytes) for number in range(WARM, WARM + passes)]
    expected = dict(zip(("shared", "dense"), map(sum, zip(*due)), strict=True))
    row: dict[str, Any] = {"rows": rows, "context": context, "passes": passes}
    for name, count in read.items():
        row |= {f"{name}_bytes": count // passes, f"{name}_formula": expected[name] // passes}
    wrong = [name for name in engines if abs(read[name] / expected[name] - 1) > 0.01]
    if wrong:
        return row | {"red": f"bytes read ({', '.join(wrong)}) are more than 1 % from the formula"}
    try:
        row |= agreement(model, [Text(prompt, sampling, n) for n in range(rows)], said["shared"], said["dense"])
    except Red as red:
        return row | {"red": str(red)}
    for name, one in times.items():
        row |= {f"{name}_ms": round(1e3 * one.seconds, 2), f"{name}_cpu_ms": round(1e3 * one.cpu_seconds, 2)}
    return row | against(times["shared"], times["dense"])


# speculation

DRAFTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "mtp, adapted": {"drafter": "mtp"},
    "mtp, 1": {"drafter": "mtp", "draft": 1},
    "mtp, 2": {"drafter": "mtp", "draft": 2},
    "mtp, 3": {"drafter": "mtp", "draft": 3},
    "lookup, adapted": {"drafter": "lookup"},
    "lookup, 3": {"drafter": "lookup", "draft": 3},
}


def held_out(run: Path, count: int, tokens: int) -> list[tuple[int, ...]]:
    """Beginnings of documents that the run was not trained on."""
    documents = TokenShards(run / "data" / "held_out" / "stdlib")
    long_enough = (i for i in range(len(documents)) if documents.starts[i + 1] - documents.starts[i] > tokens)
    return [tuple(documents.document(place)[:tokens].tolist()) for place, _ in zip(long_enough, range(count))]


def speculation(asked: Asked) -> Iterator[dict[str, Any]]:
    """Every drafter says what none says; how many passes and how much time it takes for that."""
    model, tokenizer = hub.load(asked.run).eval(), Tokenizer.load(asked.run)
    prompts = held_out(asked.run, asked.scale.texts, 64)
    for temperature in (0.0, 0.7):
        sampling = Sampling(temperature=temperature, max_tokens=asked.scale.new, ignore_eos=True, seed=0)
        texts = [Text(prompt, sampling) for prompt in prompts]
        for batch in (1, len(texts)):
            parts = [texts[first : first + batch] for first in range(0, len(texts), batch)]
            engines = {
                name: Engine(model, tokenizer, EngineSettings(rows=batch, prefix_cache=False, **settings))
                for name, settings in DRAFTERS.items()
            }
            yield from speculation_rows(engines, parts, asked.repeat)


def speculation_rows(engines: dict[str, Engine], parts: list[list[Text]], repeat: int) -> Iterator[dict[str, Any]]:
    """A row per drafter. The counts are those of the first turn, which is not timed."""

    def side(name: str) -> Callable[[], list[Any]]:
        requests = [[(text.prompt, text.sampling) for text in part] for part in parts]
        return lambda: [
            output for part in requests for output in engines[name].generate(Request(*request) for request in part)
        ]

    texts, sides = [text for part in parts for text in part], {name: side(name) for name in engines}
    said = {name: one() for name, one in sides.items()}
    times = take_turns(sides, repeat)
    for name, outputs in said.items():
        row = {"batch": len(parts[0]), "temperature": texts[0].sampling.temperature, "drafter": name}
        try:
            row |= agreement(
                engines[name].model, texts, [output.tokens for output in outputs], [o.tokens for o in said["none"]]
            )
        except Red as red:
            yield row | {"red": str(red)}
            continue
        drafted, accepted = sum(o.drafted for o in outputs), sum(o.accepted for o in outputs)
        passes, tokens = sum(o.passes for o in outputs), sum(len(o.tokens) for o in outputs)
        yield row | {
            "accepted_per_step": round(accepted / passes, 3),
            "tokens_per_step": round(tokens / passes, 3),
            "accepted_share": round(accepted / drafted, 3) if drafted else None,
            "tokens_per_s": round(tokens / times[name].seconds, 1),
            **against(times[name], times["none"]),
            "cpu_s": round(times[name].cpu_seconds, 3),
            "repeats": len(times[name].wall),
        }


# context


def context(asked: Asked) -> Iterator[dict[str, Any]]:
    """Nested prompts, each taken up from the one before; both models take turns pass by pass."""
    names, longest = ("hybrid", "attention"), max(asked.scale.contexts)
    models = {name: build(MODELS[name]).eval() for name in names}
    sampling = Sampling(temperature=0, max_tokens=WARM + asked.scale.passes + 1, ignore_eos=True)
    ids = random_ids(longest, torch.Generator().manual_seed(0))
    engines = {name: Engine(model, settings=roomy(model, longest)) for name, model in models.items()}
    for length in asked.scale.contexts:
        text, times = Text(ids[:length], sampling), {name: Times() for name in names}
        said: dict[str, list[int]] = {name: [] for name in names}
        for name, engine in engines.items():
            engine.submit(Request(text.prompt, sampling))
            said[name] += until_token(engine)[-1].tokens
        for number in range(WARM + asked.scale.passes):
            for name, engine in engines.items():
                with (Times() if number < WARM else times[name]).turn():
                    pieces = engine.step()
                said[name] += pieces[0].tokens
        row: dict[str, Any] = {"context": length}
        try:
            for name, model in models.items():
                row |= agreement(model, [text], [said[name]], [generate(model, [text.prompt], sampling)[0].tokens])
        except Red as red:
            yield row | {"red": str(red)}
            continue
        for name, one in times.items():
            unit = engines[name].memory.unit
            row |= {
                f"{name}_ms": round(1e3 * one.seconds, 2),
                f"{name}_cpu_ms": round(1e3 * one.cpu_seconds, 2),
                f"{name}_state_bytes": unit.snapshot_bytes + engines[name].memory.pages_for(length) * unit.page_bytes,
            }
        yield row | against(times["hybrid"], times["attention"])


def roomy(model: HybridModel, tokens: int) -> EngineSettings:
    """Memory for one row of that length and for what the cache keeps of it."""
    snapshots = 64
    settings = EngineSettings(rows=1, snapshots=snapshots)
    unit = Unit.of(model.config, model.dtype, torch.float32, settings.page, 0)
    room = (2 * tokens + 4096) * unit.kv_token + (snapshots + 2) * unit.snapshot_bytes
    return settings.replace(memory_bytes=2 * room)


CASES: dict[str, Callable[[Asked], Iterator[dict[str, Any]]]] = {
    "throughput": throughput,
    "prefix": prefix,
    "sharing": sharing,
    "speculation": speculation,
    "context": context,
}
