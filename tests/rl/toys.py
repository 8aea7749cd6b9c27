"""A tiny model with a tokenizer, tasks that chance solves now and then, and recipes over them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from tests.models import SIZES, tiny
from trimaran import config
from trimaran.engine.engine import Engine
from trimaran.engine.request import EngineSettings
from trimaran.model import hub
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import HybridModel, build
from trimaran.rl.recipe import RLRecipe
from trimaran.tasks.task import REWARD, Message, Prompt, Split, Task, Trace
from trimaran.text.tokenizer import Tokenizer

MODEL = {**SIZES, "pattern": "ME*E", "moe_latent_size": 16, "mtp_pattern": "*E", "initializer_range": 0.05}


class Capitals(Task):
    """An answer with a capital letter in it; `turns` answers of the kind, one after the other."""

    name: ClassVar[str] = "capitals"
    turns: int = 1
    breaks: int = 0  # every so many problems the verifier fails; 0: never

    def prompt(self, number: int, split: Split = "train") -> Prompt:
        return Prompt(self.name, split, number, ({"role": "user", "content": f"{split} {number}?"},), thinking=False)

    def gold(self, prompt: Prompt) -> tuple[Message, ...]:
        said = [{"role": "assistant", "content": "A"}, {"role": "user", "content": "more"}]
        return tuple((said * self.turns)[:-1])

    def turn(self, prompt: Prompt, messages: Sequence[Message]) -> tuple[Message, ...]:
        said = sum(message["role"] == "assistant" for message in messages)
        return () if said >= self.turns else ({"role": "user", "content": "more"},)

    def score(self, trace: Trace) -> dict[str, float]:
        number = trace.prompt.number
        if self.breaks and number >= 32 and number % self.breaks == 0:  # past what `check` looks at
            raise ZeroDivisionError("the verifier broke")
        return {REWARD: float(any("A" <= sign <= "Z" for sign in trace.answer))}


def tokenizer() -> Tokenizer:
    return Tokenizer.train(["train held_out 0123456789 ABC abc\n" * 3], 320)


def folder(path: Path, seed: int = 0, **model: Any) -> Path:
    """A hub folder with a random model."""
    words = tokenizer()
    ids = {"vocab_size": words.vocab_size, "pad_token_id": words.pad_id, "eos_token_id": words.eos_id}
    config_ = ModelConfig(**{**MODEL, **model, **ids})
    hub.save(build(config_, seed=seed), path)
    words.save(path)
    return path


def pair(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[HybridModel, Tokenizer]:
    """A random model of a kind of `tests.models`, its vocabulary that of the tokenizer."""
    words = tokenizer()
    changes = {"vocab_size": words.vocab_size, "eos_token_id": words.eos_id, **changes}
    return tiny(kind, dtype, **changes), words


def engine(model: HybridModel, words: Tokenizer, **settings: Any) -> Engine:
    return Engine(model, words, EngineSettings(**{"rows": 16, "memory_bytes": 2**24, **settings}))


def tables(start: Path, run: Path, **changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as tables; `changes` by table."""
    whole: dict[str, Any] = {
        "stage": "rl",
        "start": str(start),
        "run": str(run),
        "environments": {"one": {"task": "tests.rl.toys:Capitals"}},
        "rollouts": {"prompts": 4, "samples": 4, "max_tokens": 6, "row": 64},
        "policy": {"overlong": "score"},
        "engine": {"rows": 16, "memory_bytes": 2**24},
        "train": {"steps": 4, "batch_size": 16, "lr": 3e-3, "checkpoint_every": 2},
    }
    for name, table in changes.items():
        whole[name] = {**whole[name], **table} if name in whole and name != "environments" else table
    return whole


def recipe(start: Path, run: Path, **changes: Mapping[str, Any]) -> RLRecipe:
    return RLRecipe(**tables(start, run, **changes))


def write_recipe(path: Path, start: Path, run: Path, **changes: Mapping[str, Any]) -> Path:
    config.write(recipe(start, run, **changes), path)
    return path
