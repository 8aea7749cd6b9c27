"""`trimaran convert --merge RUN OUT`: checkpoints of a constant learning rate, averaged into a decayed model.

Warmup-stable-merge (WSM, arXiv 2507.17634). With checkpoints θ_0 … θ_k and g_i = θ_{i-1} - θ_i what training took away
between two of them,

    Σ_j c_j θ_j  =  θ_0 - Σ_i w_i g_i,      w_i = Σ_{j >= i} c_j   (i = 1 … k)

so averaging with c is a run whose updates were scaled by w: a decay after the fact. From a profile w the coefficients
are c_0 = 1 - w_1, c_j = w_j - w_{j+1}, c_k = w_k; they are positive wherever w falls, and sum to 1. Here w_i is a shape
of `schedule.SHAPES` at r = i / (k + 1), so that every checkpoint counts; `linear` is then the plain mean (`uniform`).

All that a checkpoint's hub files hold is averaged: the routers' balancing bias, which is no parameter, and the draft
block too. Sums are taken in fp64 and written in fp32 (fp64 where the checkpoints are), a tensor at a time: in memory
are one shard of the result and one tensor of one checkpoint. The optimizer's state is not merged.
"""

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trimaran import config
from trimaran.config import Settings
from trimaran.errors import Refusal, writing
from trimaran.model import adapter, hub
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import build
from trimaran.model.names import Piece
from trimaran.report import environment, read_metrics, say
from trimaran.text.tokenizer import Tokenizer
from trimaran.train import checkpoint, sharded
from trimaran.train.schedule import SHAPES

RECORD = "merge.json"  # beside the merged model: what it was made of
KEEP = "a run keeps its newest train.keep checkpoints, one every train.checkpoint_every steps"


class MergeSettings(Settings):
    """Which checkpoints of a run are merged, and by which decay: the newest `last`, those of `steps`, or all."""

    profile: Literal["minus_sqrt", "linear", "cosine", "exponential", "uniform"] = "minus_sqrt"
    last: int | None = Field(None, ge=2)
    steps: tuple[int, ...] | None = None
    shard_bytes: int = Field(5_000_000_000, gt=0)

    @model_validator(mode="after")
    def _one_choice(self) -> "MergeSettings":
        if self.last is not None and self.steps is not None:
            raise Refusal("last beside steps", "one of them", "remove one")
        if self.steps is not None and list(self.steps) != sorted(set(self.steps)):
            raise Refusal(f"steps = {list(self.steps)}", "rising steps, each once", "sort them")
        return self


def main(target: str, overrides: Sequence[str], out: str | None = None) -> int:
    """Merges checkpoints of the run folder `target` into the new hub folder `out`."""
    settings = config.load(MergeSettings, None, overrides)
    if out is None:
        raise Refusal("no folder for the result", "trimaran convert --merge RUN OUT", "name a new folder after RUN")
    folders = chosen(Path(target), settings)
    for folder, share in zip(folders, coefficients(settings.profile, len(folders))):
        say(f"{share:8.5f}  {folder}")
    tell_of_decay(Path(target), folders)
    merge(folders, Path(out), settings.profile, settings.shard_bytes)
    say(f"saved in {out}; continue a text: trimaran generate {out}")
    return 0


def decay_weights(profile: str, updates: int) -> list[float]:
    """w_1 … w_k of a profile: the share of each update that is left. k = `updates`."""
    shape = SHAPES["linear" if profile == "uniform" else profile]
    return [shape(i / (updates + 1)) for i in range(1, updates + 1)]


def coefficients(profile: str, checkpoints: int) -> list[float]:
    """c_0 … c_k, the share of each of k + 1 checkpoints, the oldest first. They are positive and sum to 1."""
    return shares_of(decay_weights(profile, checkpoints - 1))


def shares_of(weights: Sequence[float]) -> list[float]:
    """c_0 … c_k from any w_1 … w_k (arXiv 2507.17634, theorem 3.1)."""
    return [before - after for before, after in pairwise([1.0, *weights, 0.0])]


def chosen(run: Path, settings: MergeSettings) -> list[Path]:
    """The checkpoints that the settings name, the oldest first. Raises Refusal where they are missing or too few."""
    folder = run / "checkpoints"
    found = checkpoint.steps_in(folder) if folder.is_dir() else []
    steps = list(found if settings.steps is None else settings.steps)
    there = ", ".join(map(str, found)) or "none"
    if settings.last is not None:
        steps = steps[-settings.last :]
    wanted = max(2, settings.last or 0)
    missing = [step for step in steps if step not in found]
    if missing or len(steps) < wanted:
        what = f"no checkpoint of step {missing[0]}" if missing else f"{len(steps)} checkpoints to merge"
        asked = "steps that are there" if missing else f"at least {wanted}"
        raise Refusal(f"{what} in {folder}", f"{asked}: {there}", f"{KEEP}: train on with train.keep={max(wanted, 5)}")
    distances = {after - before for before, after in pairwise(steps)}
    if len(distances) > 1 and settings.profile != "uniform":
        found_words = f"checkpoints at steps {', '.join(map(str, steps))}"
        raise Refusal(found_words, "equal distances, for a profile is a decay over time", "choose with steps=[…]")
    return [folder / f"step-{step}" for step in steps]


def tell_of_decay(run: Path, folders: Sequence[Path]) -> None:
    """Says so where the learning rate fell between the checkpoints, for then they hold a decay already."""
    first, last = (int(folder.name.removeprefix("step-")) for folder in (folders[0], folders[-1]))
    rates = [
        line["lr"] for line in read_metrics(run / "metrics.jsonl") if first < line["step"] <= last and "lr" in line
    ]
    if rates and rates[-1] < rates[0]:
        say(f"the learning rate fell from {rates[0]:.1e} to {rates[-1]:.1e} meanwhile: merging stands in for a decay")


class Weighted:
    """Σ c_j θ_j for one tensor of a checkpoint at a time, in `dtype`; sums in fp64."""

    def __init__(self, folders: Sequence[Path], shares: Sequence[float], model_config: ModelConfig):
        self.terms = [(share, sharded.opened(folder, model_config)) for share, folder in zip(shares, folders)]
        names = build(model_config, "meta").state_dict()
        stored = {shards.stored[name].dtype for _, shards in self.terms for name in names}
        self.dtype = torch.float64 if torch.float64 in stored else torch.float32

    def __call__(self, piece: Piece) -> Tensor:
        total = torch.zeros(piece.shape, dtype=torch.float64)
        for share, shards in self.terms:
            total.add_(sharded.piece_of(shards, piece), alpha=share)
        return total.to(self.dtype)


def merge(folders: Sequence[Path], out: Path, profile: str = "minus_sqrt", shard_bytes: int = 5_000_000_000) -> None:
    """Writes Σ c_j θ_j over the checkpoints `folders`, the oldest first, as the hub folder `out`: there whole or not at
    all, with the newest one's tokenizer and `merge.json`.

    Raises Refusal for fewer than two, other architectures, adapters, damage, and for an `out` that holds something.
    """
    if len(folders) < 2:
        raise Refusal(f"{len(folders)} checkpoints to merge", "at least 2", KEEP)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise Refusal(f"{out} holds something already", "a new folder", "name another, or remove it")
    model_config = same_architecture(folders)
    shares = coefficients(profile, len(folders))
    weighted = Weighted(folders, shares, model_config)
    made_of = {str(folder.absolute()): share for folder, share in zip(folders, shares)}
    record = {"profile": profile, "checkpoints": made_of, "made_on": environment()}
    stage = out.with_name(f".{out.name}.merging")
    with writing(out):
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        try:
            model = build(model_config, "meta", weighted.dtype)
            hub.save(model, stage, shard_bytes=shard_bytes, read=weighted)
            Tokenizer.load(folders[-1]).save(stage)
            (stage / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            if out.is_dir():
                out.rmdir()
            stage.rename(out)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def same_architecture(folders: Sequence[Path]) -> ModelConfig:
    """The configuration that all the checkpoints share. Raises Refusal for one that differs."""
    for folder in folders:
        if (folder / adapter.CONFIG).is_file():
            step = "merge checkpoints of a run without a table lora"
            raise Refusal(f"{folder} holds adapters alone", "checkpoints of whole models", step)
    first, *others = [hub.read_config(folder) for folder in folders]
    for folder, other in zip(folders[1:], others):
        differing = [name for name, value in first.model_dump().items() if other.model_dump()[name] != value]
        if differing:
            name = differing[0]
            found = f"{folder} has {name} = {getattr(other, name)!r}"
            raise Refusal(found, f"{getattr(first, name)!r}, as {folders[0]} has it", "merge one model's checkpoints")
    return first
