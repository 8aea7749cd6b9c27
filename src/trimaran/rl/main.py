"""`trimaran train` with a recipe of stage "rl": a model answers, is scored, and learns what scored better."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trimaran.engine.engine import Engine
from trimaran.errors import Refusal
from trimaran.model.hybrid import HybridModel
from trimaran.model.lora import LowRankHead
from trimaran.ops.backend import own_process
from trimaran.report import curve_png, read_metrics, say, series
from trimaran.rl.objective import PolicyGradient
from trimaran.rl.recipe import RLRecipe
from trimaran.rl.records import Records
from trimaran.rl.rollout import check_tasks
from trimaran.rl.source import Rollouts
from trimaran.text.tokenizer import Tokenizer
from trimaran.train.adapters import begin_adapters
from trimaran.train.folder import absolute, carry_out, saved
from trimaran.train.loop import Run
from trimaran.train.prepare import optimizer_of
from trimaran.train.sft import opened_model, opened_tokenizer


def main(recipe: RLRecipe) -> int:
    """Carries out a recipe, or what is left of it; returns the exit code (see `loop.fit`).

    The run folder ends as a hub folder, with rollouts.jsonl and transcripts.md beside what every run leaves.
    """
    own_process(recipe.ops)
    recipe = located(recipe)
    return carry_out(recipe, lambda: begin(recipe), finish)


def located(recipe: RLRecipe) -> RLRecipe:
    """The recipe with absolute paths, so that its copy in the run folder means the same from anywhere."""
    curriculum = recipe.curriculum.replace(profile=absolute(recipe.curriculum.profile))
    paths = {"start": absolute(recipe.start), "run": absolute(recipe.run)}
    environments = {name: one.located() for name, one in recipe.environments.items()}
    return recipe.model_copy(update={**paths, "curriculum": curriculum, "environments": environments})


def begin(recipe: RLRecipe, source_of: Callable[..., Rollouts] = Rollouts) -> Run:
    """A run at its first step. Raises Refusal for what cannot work, before anything is rolled out."""
    tasks = {name: one.open() for name, one in recipe.environments.items()}
    check_tasks(tasks.values())
    tokenizer, model = opened(recipe.start, recipe.train.device)
    tokenizer.save(recipe.run)
    torch.manual_seed(recipe.seed)
    settings = recipe.train
    begin_adapters(model, recipe.lora, settings, recipe.seed)
    check_dropout(model)
    objective = PolicyGradient(
        model,
        recipe.policy,
        temperature=recipe.rollouts.temperature,
        router_bias_rate=settings.router_bias_rate,
    )
    reference = opened(recipe.start, settings.device)[1].requires_grad_(False) if recipe.policy.kl else None
    engine = Engine(model, tokenizer, recipe.engine)
    records = Records(Path(recipe.run), tokenizer, recipe.logs)
    source = source_of(recipe, model, engine, tasks, records, reference)
    counts = ", ".join(f"{count} of {name}" for name, count in source.curriculum.counts.items())
    say(f"a batch: {recipe.rollouts.samples} rollouts each of {counts}; updates made of it: {recipe.updates}")
    optimizer = optimizer_of(settings, model)
    return Run(Path(recipe.run), settings, model, objective, optimizer, source, (), tokenizer, recipe.stage)


def check_dropout(model: HybridModel) -> None:
    """Refuses dropout in the head: its logits are made again for the gradient, and would be those of another draw."""
    if isinstance(model.head, LowRankHead) and model.head.dropout:
        found = f"lora.dropout = {model.head.dropout} with an adapter on the head"
        raise Refusal(found, "0, or adapters elsewhere", "leave the head out of lora.targets, or set lora.dropout=0")


def opened(start: str, device: str) -> tuple[Tokenizer, HybridModel]:
    """Tokenizer (with a chat template) and model of a folder, in fp32. Refuses a folder in which they do not fit."""
    tokenizer = opened_tokenizer(start)
    return tokenizer, opened_model(start, device, tokenizer)


def finish(run: Run) -> dict[str, Any]:
    """The folder as `folder.saved` leaves it, its curve that of the rewards, and a word on what was reached."""
    result = saved(run)
    metrics = run.folder / "metrics.jsonl"
    names = {name: name for one in read_metrics(metrics)[:1] for name in one if name.split("/")[0] == "reward"}
    curves = series(metrics, **{name.removeprefix("reward/"): column for name, column in names.items()})
    if curves:
        curve_png(run.folder / "curve.png", curves, title=run.folder.name, value="mean reward of a batch")
        rewards = curves["reward"][1]
        say(f"mean reward of a batch: {rewards[0]:.3f} at first, {rewards[-1]:.3f} at last")
    return result
