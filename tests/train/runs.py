"""Tiny runs for the tests: a text, a recipe over it, and a process of its own that carries one out."""

import contextlib
import multiprocessing
import os
import random
import sys
from pathlib import Path

import matplotlib.figure  # noqa: F401 (this and the next: what a run imports late, here once for all its processes)
import torch
import torch._dynamo

from tests.models import SIZES
from trimaran import cli, config
from trimaran.train.recipe import PretrainRecipe

WORDS = ["sea", "hull", "mast", "tide", "wind", "rope", "keel", "sail", "anchor", "harbour"]
MODEL = {**SIZES, "pattern": "ME*E", "moe_latent_size": 16, "mtp_pattern": "*E", "initializer_range": 0.05}
MODEL.pop("vocab_size")
TRAIN = {"steps": 12, "batch_size": 4, "lr": 3e-3, "checkpoint_every": 4, "eval_every": 6}


def write_text(path: Path, documents: int = 40) -> Path:
    """Documents of one short line each, as JSONL."""
    chance = random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(1, 60))) for _ in range(documents)]
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return path


def write_recipe(folder: Path, **train: object) -> Path:
    """A recipe in `folder` that trains MODEL on a small text there and writes folder/run."""
    tables = {
        "stage": "pretrain",
        "run": str(folder / "run"),
        "tokenizer": {"vocab_size": 320},
        "model": MODEL,
        "data": {"path": str(write_text(folder / "text.jsonl")), "sequence_length": 32, "held_out": 0.1},
        "train": {**TRAIN, **train},
    }
    path = folder / "recipe.toml"
    config.write(PretrainRecipe(**tables), path)
    return path


def read_recipe(folder: Path, *overrides: str, **train: object) -> PretrainRecipe:
    return config.load(PretrainRecipe, write_recipe(folder, **train), overrides)


def carry_out(path: str, overrides: list[str], log: str) -> None:
    """`trimaran train PATH OVERRIDES` in this process, its words going to the file `log`."""
    torch.set_num_threads(1)
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        cli.main(["train", path, *overrides])


def server() -> multiprocessing.context.ForkServerContext:
    """Starts processes in milliseconds, torch already imported; none of them has run anything yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.runs", "trimaran.train.pretrain"])
    return context


def start(path: Path, *overrides: str) -> multiprocessing.context.ForkServerProcess:
    """`trimaran train` as a process; the log is beside the recipe."""
    process = server().Process(target=carry_out, args=(str(path), list(overrides), str(path.with_suffix(".log"))))
    process.start()
    return process


def command(path: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "trimaran", "train", str(path), *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
