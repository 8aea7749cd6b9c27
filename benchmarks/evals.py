"""Evaluations, measured: problems drawn per second, and how much of the engine's speed scoring keeps.

    python benchmarks/evals.py --save evals                # both cases; writes results/evals.json
    python benchmarks/evals.py --cases utilisation --repeat 5
    python benchmarks/evals.py --small                     # a try of seconds, whose numbers mean nothing

    problems      each of RULER's thirteen at 1k and 8k tokens, L0's four bins, and the other families: problems per
                  second of wall time, counted by a tokenizer of 2,048 words
    utilisation   tokens per second of `score` (problems drawn, episodes played, answers judged and recorded) over those
                  of `Engine.generate` given the very same prompts and settings at once, on the same model

Before a speed is told: every problem's perfect answer scores 1 and an empty one 0, and RULER's are within their length;
scoring and raw generation say the same tokens, but for ties of rounding (as in engine.py). A row where that does not
hold is red: no speed, exit code 1. Sides take turns; medians of `--repeat`. Process CPU time stands beside wall time.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from engine_cases import MODELS, Red, Text, agreement, take_turns

from trimaran import Engine, EngineSettings, Request
from trimaran.errors import Refusal
from trimaran.evals.play import Group, Player, conversation_of, request_of, seed_of
from trimaran.evals.run import ScoreSettings, score
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import HybridModel, build
from trimaran.report import environment
from trimaran.tasks.l0 import BINS, L0
from trimaran.tasks.names import task
from trimaran.tasks.ruler import PUBLISHED, Ruler, published
from trimaran.tasks.task import REWARD, Task, Trace
from trimaran.text.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 2048
SPEAKERS: dict[str, ModelConfig] = {  # random weights: speed does not depend on what a model knows
    "small": ModelConfig(
        pattern="MM*E",
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mamba_num_heads=4,
        mamba_head_dim=64,
        ssm_state_size=32,
        n_groups=1,
        chunk_size=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_latent_size=64,
        moe_intermediate_size=128,
        moe_shared_expert_intermediate_size=256,
        eos_token_id=None,
    ),
    "mixed": MODELS["mixed"].replace(vocab_size=VOCABULARY),
}


@dataclass(frozen=True)
class Scale:
    """How large the cases are. drawn: problems of each family; n: problems of each task that is scored; rows: of the
    engine, about as many of them to a problem as by default (64 to 200)."""

    lengths: tuple[int, ...] = (1024, 8192)
    bins: tuple[int, ...] = BINS
    drawn: int = 20
    n: int = 24
    rows: int = 8
    speakers: tuple[str, ...] = ("small", "mixed")


FULL = Scale()
SMALL = Scale((1024,), (13,), 2, 3, 4, ("small",))


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; folder: of the tokenizer, and for records and files."""

    scale: Scale
    repeat: int
    folder: Path
    tokenizer: Tokenizer


# problems


def problems(asked: Asked) -> Iterator[dict[str, Any]]:
    """Problems drawn per second, a row per family."""
    for name, of in families(asked).items():
        row = {"family": name, "problems": asked.scale.drawn}
        try:
            yield row | drawn(of, asked)
        except (Red, Refusal) as red:
            yield row | {"red": str(red)}


def families(asked: Asked) -> dict[str, Task]:
    """All that `score` knows offline, by a name for the table."""
    found: dict[str, Task] = {}
    for length in asked.scale.lengths:
        found |= {f"ruler {name} {length}": published(name, length, asked.folder) for name in PUBLISHED}
    found |= {f"l0 {steps} steps": L0(steps=steps) for steps in asked.scale.bins}
    files = {split: gsm8k_file(asked.folder / f"{split}.jsonl", split) for split in ("train", "held_out")}
    own: dict[str, dict[str, Any]] = {"gsm8k": files}
    names = ("arithmetic", "transforms", "sorting", "calls", "desk", "recall", "code", "gsm8k")
    return found | {name: task(name, own.get(name)) for name in names}


def gsm8k_file(path: Path, split: str) -> Path:
    """A file of GSM8K's form: 200 questions that are made up."""
    rows = []
    for n in range(200):
        here, more = n + 2, 3 * n + 1
        question = f"A {split} boat {n} carries {here} sacks, and {more} more come aboard. How many are there?"
        answer = f"There are {here} + {more} = <<{here}+{more}={here + more}>>{here + more}.\n#### {here + more}"
        rows.append({"question": question, "answer": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def drawn(of: Task, asked: Asked) -> dict[str, Any]:
    """How quickly problems are drawn, all but the first; raises `Red` where one of them is not what it should be."""
    of.prompt(0, "held_out")  # reads files, and looks once for the size that fits
    began, burnt = time.perf_counter(), time.process_time()
    prompts = [of.prompt(number, "held_out") for number in range(1, asked.scale.drawn + 1)]
    wall, cpu = time.perf_counter() - began, time.process_time() - burnt
    lengths = [sum(len(asked.tokenizer.encode(str(one["content"]))) for one in prompt.messages) for prompt in prompts]
    for prompt, length in zip(prompts, lengths):
        empty = ({"role": "assistant", "content": ""},)
        gold, none = (of.score(Trace(prompt, said))[REWARD] for said in (of.gold(prompt), empty))
        if (gold, none) != (1, 0):
            raise Red(f"problem {prompt.number}: the perfect answer scores {gold}, an empty one {none}")
        if isinstance(of, Ruler) and length + of.counter.overhead + of.kept > of.length:
            raise Red(f"problem {prompt.number}: {length} tokens of {of.length}")
    return {
        "per_second": round(len(prompts) / wall, 1),
        "ms": round(1000 * wall / len(prompts), 4),
        "cpu_ms": round(1000 * cpu / len(prompts), 4),
        "prompt_tokens": round(statistics.mean(lengths)),
    }


# utilisation


def utilisation(asked: Asked) -> Iterator[dict[str, Any]]:
    """Scoring beside raw generation, a row per model and evaluation."""
    for speaker in asked.scale.speakers:
        model = build(SPEAKERS[speaker]).eval()
        for name, scored in evaluations(asked).items():
            row = {"model": speaker, "evaluation": name}
            try:
                yield row | used(model, scored, asked)
            except (Red, Refusal) as red:
                yield row | {"red": str(red)}


Scored = list[tuple[dict[str, Task], ScoreSettings]]  # what is played together, one after the other


def evaluations(asked: Asked) -> dict[str, Scored]:
    """Plain tasks are played together; a suite's rows one after the other, as `trimaran score` does."""
    scale = asked.scale
    plain = {name: task(name) for name in ("arithmetic", "transforms", "sorting")}
    needles = [name for name in PUBLISHED if name.startswith("niah")][:4]
    ruler = [published(name, scale.lengths[0], asked.folder) for name in needles]
    greedy = ScoreSettings(n=scale.n, samples=0, thinking=False)
    traces = {"steps-13": L0(steps=13)}
    return {
        "arithmetic, transforms, sorting": [(plain, ScoreSettings(n=scale.n, samples=4, max_tokens=64))],
        f"ruler at {scale.lengths[0]}, 4 tasks": [
            ({name: of}, greedy.replace(max_tokens=of.kept)) for name, of in zip(needles, ruler)
        ],
        "l0, 13 steps": [(traces, ScoreSettings(n=scale.n, samples=1, max_tokens=200, thinking=False))],
    }


def used(model: HybridModel, scored: Scored, asked: Asked) -> dict[str, Any]:
    """Tokens per second of both sides; raises `Red` where they do not say the same."""
    settings = EngineSettings(rows=asked.scale.rows)
    groups = list(chain.from_iterable(groups_of(*one) for one in scored))
    requests = [request_of_group(asked.tokenizer, group) for group in groups]

    def raw() -> list[list[int]]:
        engine = Engine(model, asked.tokenizer, settings)
        # ids are fresh each time, for an engine takes none twice
        return [output.tokens for output in engine.generate(Request(r.prompt, r.sampling) for r in requests)]

    def scoring() -> None:
        engine = Engine(model, asked.tokenizer, settings)
        with tempfile.TemporaryDirectory() as home:
            for tasks, how in scored:
                score(engine, tasks, how, Path(home))

    said, texts = raw(), texts_of(requests)
    agreed = agreement(model, texts, played(model, asked.tokenizer, settings, groups), said)
    scoring()  # a turn that is not timed
    times = take_turns({"score": scoring, "raw": raw}, asked.repeat)
    tokens = sum(map(len, said))
    return {
        "episodes": len(texts),
        "prompt_tokens": sum(len(text.prompt) for text in texts),
        "tokens": tokens,
        **agreed,
        "score": round(tokens / times["score"].seconds, 1),
        "raw": round(tokens / times["raw"].seconds, 1),
        "utilisation": round(times["raw"].seconds / times["score"].seconds, 3),
        "score_cpu_s": round(times["score"].cpu_seconds, 3),
        "raw_cpu_s": round(times["raw"].cpu_seconds, 3),
        "cpu_utilisation": round(times["raw"].cpu_seconds / times["score"].cpu_seconds, 3),
    }


def groups_of(tasks: Mapping[str, Task], settings: ScoreSettings) -> Iterator[Group]:
    """What `score` plays, in its order."""
    for of in tasks.values():
        for number in range(settings.n):
            for play, samples in settings.modes().values():
                yield Group(of, of.prompt(number, settings.split), play, samples, settings.seed)


def request_of_group(tokenizer: Tokenizer, group: Group) -> Request:
    """What the player asks the engine for a group's first (and here only) answer."""
    conversation = conversation_of(tokenizer, group)
    conversation.hear(group.prompt.messages)
    return request_of(conversation, group, seed_of(group), group.samples)


def texts_of(requests: list[Request]) -> list[Text]:
    return [Text(one.prompt, one.sampling, place) for one in requests for place in range(one.sampling.samples)]


def played(model: HybridModel, tokenizer: Tokenizer, settings: EngineSettings, groups: list[Group]) -> list[list[int]]:
    """What the episodes said, by group and sample. Raises `Red` for an episode that failed, or has several turns."""
    found = {}
    for one in Player(Engine(model, tokenizer, settings)).play(iter(groups)):
        if one.error is not None or len(one.outputs) != 1:
            raise Red(f"problem {one.prompt.number} of {one.prompt.task}: {one.error or f'{len(one.outputs)} turns'}")
        found[one.group, one.sample] = one.outputs[0].tokens
    return [tokens for _, tokens in sorted(found.items())]


# all of it

CASES: dict[str, Callable[[Asked], Iterator[dict[str, Any]]]] = {"problems": problems, "utilisation": utilisation}


def measured(names: list[str], asked: Asked) -> dict[str, Any]:
    """The cases, told while they grow."""
    result: dict[str, Any] = {"made_on": environment() | {"load": round(os.getloadavg()[0], 2), "dtype": "float32"}}
    for name in names:
        result[name] = []
        for row in CASES[name](asked):
            result[name].append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr, flush=True)
    return result


def tokenizer_in(folder: Path) -> Tokenizer:
    """A tokenizer that was trained on such problems, saved there."""
    texts = [str(published(name, 2000).prompt(0).messages[0]["content"]) for name in PUBLISHED]
    texts += [str(L0(steps=40).prompt(number).messages[0]["content"]) for number in range(4)]
    tokenizer = Tokenizer.train(texts, VOCABULARY)
    tokenizer.save(folder)
    return tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--repeat", type=int, default=3, help="turns of each side")
    parser.add_argument("--small", action="store_true", help="a try of seconds, whose numbers mean nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    given = parser.parse_args()
    names = given.cases.split(",")
    if unknown := set(names) - set(CASES):
        raise SystemExit(f"{', '.join(sorted(unknown))}: not one of {', '.join(CASES)}")
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        asked = Asked(SMALL if given.small else FULL, given.repeat, folder, tokenizer_in(folder))
        result = measured(names, asked)
    if given.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{given.save}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if given.json:
        print(json.dumps(result, indent=1))
    return int(any("red" in row for name in names for row in result[name]))


if __name__ == "__main__":
    sys.exit(main())
