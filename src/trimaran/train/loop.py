"""The training loop: batch -> streams -> losses and gradients in parts -> check -> update, until the steps are done.

The loop knows no method: an objective fills the streams and names the losses. Resuming is part of it, since a run that
was interrupted and one that was not end with the same weights, bit for bit, on the same machine and threads.
"""

import math
import signal
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from trimaran.errors import Refusal, writing
from trimaran.model.hybrid import HybridModel
from trimaran.parallel.launch import orphaned
from trimaran.parallel.places import Cut
from trimaran.parallel.shard import synchronise
from trimaran.parallel.world import World
from trimaran.quant.linear import Draws
from trimaran.report import Progress, Silence, say
from trimaran.text.tokenizer import Tokenizer
from trimaran.train import checkpoint
from trimaran.train.interrupt import Interrupts
from trimaran.train.optim import clip, set_learning_rate
from trimaran.train.precision import check_begun
from trimaran.train.recipe import TrainSettings
from trimaran.train.validate import HeldOut, evaluate
from trimaran.train.watch import Watch

if TYPE_CHECKING:
    from trimaran.parallel.pipeline import Pipeline
    from trimaran.train.sharded import Keeper


class Rows(Protocol):
    """Tensors [B, T] of one step: `data.batch.Batch`, `objective.Streams`, and what other objectives make of them."""

    @property
    def tokens_BT(self) -> Tensor: ...
    def to(self, device: torch.device) -> Self: ...
    def rows(self, start: int, stop: int) -> Self: ...


class Source(Protocol):
    """Where batches come from, with a position that can be saved; see `data.loader.Loader`."""

    def __next__(self) -> Any: ...
    def observed(self) -> Mapping[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Objective(Protocol):
    """What a step minimises; see `objective.Pretraining`. Its streams are `Rows`, whatever else they hold."""

    def streams(self, batch: Any, step: int) -> Any: ...
    def terms(self, part: Any) -> tuple[Tensor, dict[str, Tensor]]: ...
    def observed(self) -> Mapping[str, Tensor]: ...
    def after_step(self) -> None: ...
    def abandon(self) -> None: ...


R = TypeVar("R", bound=Rows)
SIGNALS = "asked to stop"


class Diverged(Refusal):
    """A loss or gradient that is not finite. Weights and optimizer stand where the last good step left them."""


@dataclass
class Run:
    """One run: what it changes, what it reads, where it writes. `step` counts finished updates.

    world: the processes it is spread over; cuts: what `parallelize` left of each parameter in this one. asked: the
    signal that this process heard; stopping: whether any did, on which all agree. draws: of a model in narrow numbers.
    """

    folder: Path
    settings: TrainSettings
    model: HybridModel
    objective: Objective
    optimizer: torch.optim.Optimizer
    loader: Source
    held_out: Sequence[HeldOut] = ()
    tokenizer: Tokenizer | None = None
    label: str = "train"
    step: int = 0
    world: World = field(default_factory=World)
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    draws: Draws | None = None
    asked: int | None = None
    stopping: bool = False
    parameters: list[torch.nn.Parameter] = field(init=False)
    watch: Watch = field(init=False)
    pipeline: "Pipeline | None" = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.watch = Watch(self.world)
        check_begun(self.settings, self.draws)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.model.recompute(self.settings.recompute)
        if self.world.settings.pp > 1:
            from trimaran.parallel.pipeline import Pipeline  # a second of imports, for those who have one

            if self.settings.accumulate > 1:
                found = f"train.accumulate = {self.settings.accumulate} in a pipeline"
                raise Refusal(
                    found, "1: its micro-batches are the parts of a step", "set parallel.micro_batches instead"
                )
            self.pipeline = Pipeline(self.model, self.world)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def fit(run: Run) -> int:
    """Trains from the newest checkpoint (or the start) to the last step; returns the exit code.

    0: all steps are done and saved. 128 + n: signal n asked to stop, the step was finished and saved, and the same
    call goes on from there. Raises `Diverged`, and Refusal when a checkpoint cannot be written.
    """
    with keeping(run) as keeper:
        resume(run, keeper)
        run.model.train()
        with reporting(run) as progress:
            with Interrupts(answer=run.world.alone) as interrupts:
                while run.step < run.settings.steps and not run.stopping:
                    advance(run, interrupts, progress, keeper)
            if run.step < run.settings.steps:
                done = f"stopped after step {run.step} of {run.settings.steps}"
                progress.say(f"{done}; the same command goes on from there")
                return 128 + int(interrupts.asked or signal.SIGTERM)
    return 0


def advance(run: Run, interrupts: Interrupts, progress: Progress | Silence, keeper: "Keeper | None") -> None:
    """A step and what is due after it: validation, a line in the metrics, a checkpoint."""
    settings = run.settings
    with run.watch.own():
        batch, lr = next(run.loader), settings.schedule()(run.step)
    run.asked = interrupts.asked
    values: dict[str, Any] = {**run.loader.observed(), **train_step(run, batch, lr)}
    run.step += 1
    if run.held_out and due(run.step, settings.eval_every, settings.steps):
        values |= held_out(run)
    by_process, warning = run.watch.after_step(run.step)
    if warning:
        progress.say(warning)
    values |= by_process
    progress.update(run.step, tokens=batch.tokens_BT.numel(), lr=lr, **values)
    if run.world.alone:
        run.stopping = interrupts.asked is not None
    if due(run.step, settings.checkpoint_every, settings.steps) or run.stopping:
        save(run, keeper)


def reporting(run: Run) -> Progress | Silence:
    """The live line and the metrics, which one process writes for all."""
    if not run.world.first:
        return Silence()
    metrics = run.folder / "metrics.jsonl"
    return Progress(run.settings.steps, start=run.step, label=run.label, metrics=metrics)


def due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def train_step(run: Run, batch: Rows, lr: float) -> dict[str, float]:
    """One update of the weights; returns what it saw, as plain numbers.

    Reading those is the one wait for the device in a step: nothing may be updated before they are known to be finite.
    """
    objective, model = run.objective, run.model
    if run.draws is not None:
        run.draws.begin(run.step)
    streams = run.world.share(objective.streams(batch, run.step)).to(model.device)
    run.optimizer.zero_grad(set_to_none=True)
    seen = run.world.total({**gradients(run, streams), **signals(run)})
    seen["grad_norm"] = clip(run.parameters, run.settings.clip, run.world, run.pipeline.copies if run.pipeline else ())
    seen |= objective.observed()
    values = dict(zip(seen, torch.stack([value.float() for value in seen.values()]).tolist()))
    run.stopping = values.pop(SIGNALS, 0.0) > 0
    if not all(map(math.isfinite, values.values())):
        objective.abandon()
        raise diverged(run, batch, lr, values)
    set_learning_rate(run.optimizer, lr)
    with run.watch.own():
        run.optimizer.step()
    objective.after_step()
    model.version += 1
    return values


def signals(run: Run) -> dict[str, Tensor]:
    """Of several processes: whether this one is to stop, for all of them to know."""
    if run.world.alone:
        return {}
    return {SIGNALS: torch.tensor(float(run.asked is not None or orphaned()), device=run.model.device)}


def gradients(run: Run, streams: Rows) -> dict[str, Tensor]:
    """Losses and their gradients, a part of the rows at a time; the terms by name, added up."""
    if run.pipeline is not None:
        return run.pipeline.gradients(run.objective, parts(streams, run.pipeline.count), lambda: autocast(run))
    seen: dict[str, Tensor] = {}
    pieces = parts(streams, run.settings.accumulate)
    for number, part in enumerate(pieces, 1):
        synchronise(run.model, number == len(pieces), run.world)
        with autocast(run):
            loss, terms = run.objective.terms(part)
        loss.backward()
        for name, term in terms.items():
            seen[name] = seen[name] + term if name in seen else term
    return seen


def parts(streams: R, count: int) -> list[R]:
    """The rows in `count` parts as equal as can be, or one row each where there are fewer."""
    rows = len(streams.tokens_BT)
    if count == 1:
        return [streams]
    count = min(count, rows)
    borders = [rows * part // count for part in range(count + 1)]
    return [streams.rows(start, stop) for start, stop in pairwise(borders)]


def autocast(run: Run) -> torch.autocast:
    """bf16 for the products unless the recipe says fp32; the weights and what the number contract names stay fp32."""
    return torch.autocast(run.model.device.type, torch.bfloat16, enabled=run.settings.precision != "fp32")


def held_out(run: Run) -> dict[str, float]:
    score = evaluate(run.model, run.held_out, run.world, run.pipeline)
    return {"held_out_loss": score.loss, "bits_per_byte": score.bits_per_byte}


def diverged(run: Run, batch: Rows, lr: float, values: Mapping[str, float]) -> Diverged:
    """Saves the batch that led to it, and the error that says so: the same in every process."""
    path = run.folder / f"diverged-step-{run.step + 1}.safetensors"
    if run.world.first:
        tensors = {name: value for name, value in vars(batch).items() if torch.is_tensor(value)}
        with writing(path):
            checkpoint.save_tensors(tensors, path)
    wrong = ", ".join(f"{name} = {value}" for name, value in values.items() if not math.isfinite(value))
    found = f"step {run.step + 1} gave {wrong} at learning rate {lr:.2e}; nothing was updated"
    step = f"look at the batch in {path}, or begin another run with a lower train.lr or train.clip"
    return Diverged(found, "finite losses and gradients", step)


def keeping(run: Run) -> "AbstractContextManager[Keeper | None]":
    """What writes the checkpoints of several processes beside their training; one process needs nothing."""
    if run.world.alone:
        return nullcontext()
    from trimaran.train.sharded import Keeper  # here: importing DCP takes a second

    return Keeper(run.checkpoints, run.world, keep=run.settings.keep, tokenizer=run.tokenizer)


def save(run: Run, keeper: "Keeper | None") -> None:
    position: dict[str, Any] = run.loader.state_dict()
    if keeper is not None:
        keeper.save(run.step, run.model, run.optimizer, run.cuts, position)
        return
    checkpoint.save(
        run.checkpoints,
        run.step,
        run.model,
        run.optimizer,
        position,
        keep=run.settings.keep,
        tokenizer=run.tokenizer,
    )


def resume(run: Run, keeper: "Keeper | None") -> None:
    """Goes to the newest whole checkpoint, if there is one."""
    if keeper is not None:
        saved = keeper.restore(run.model, run.optimizer, run.cuts, say)
    else:
        saved = checkpoint.restore(run.checkpoints, run.model, run.optimizer, say)
    if saved is not None:
        run.step = saved.step
        run.loader.load_state_dict(saved.position)
        say(f"going on after step {run.step} of {run.settings.steps}")
