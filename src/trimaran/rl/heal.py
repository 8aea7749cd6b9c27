"""`trimaran train` with a recipe of stage "heal": a draft block that fell behind its trunk catches up with it.

What changes the trunk (fine-tuning, reinforcement learning, distillation) leaves the draft block behind, and drafts
stand less often. Here the trunk stays as it is, bit for bit, and the block learns the trunk's law on its own texts
(see `unroll.py`). What the engine says does not change, only how many passes it takes.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trimaran.engine.engine import Engine
from trimaran.errors import writing
from trimaran.evals.play import Group
from trimaran.model.hybrid import HybridModel
from trimaran.ops.backend import own_process
from trimaran.report import say
from trimaran.rl.acceptance import Acceptance, compared, measure
from trimaran.rl.curriculum import apportioned
from trimaran.rl.heal_recipe import HealRecipe
from trimaran.rl.main import opened
from trimaran.rl.rollout import check_tasks
from trimaran.rl.unroll import Healing
from trimaran.rl.writings import Writings
from trimaran.tasks.task import Task
from trimaran.text.tokenizer import Tokenizer
from trimaran.train.folder import absolute, carry_out, saved
from trimaran.train.loop import Run
from trimaran.train.prepare import optimizer_of

BEFORE = "acceptance.json"  # what was measured before the first step
WAYS = {"greedy": 0.0, "sampled": 1.0}  # temperatures


def main(recipe: HealRecipe) -> int:
    """Carries out a recipe, or what is left of it; returns the exit code (see `loop.fit`).

    result.json of the run folder has the acceptance length before and after, greedy and sampled.
    """
    own_process(recipe.ops)
    environments = {name: one.located() for name, one in recipe.environments.items()}
    recipe = recipe.replace(start=absolute(recipe.start), run=absolute(recipe.run), environments=environments)
    return carry_out(recipe, lambda: begin(recipe), lambda run: finish(recipe, run))


def begin(recipe: HealRecipe) -> Run:
    """A run at its first step. Measures the draft block as it is, unless that was done before."""
    tasks = opened_tasks(recipe)
    tokenizer, model = opened(recipe.start, recipe.train.device)
    settings, folder = recipe.train, Path(recipe.run)
    torch.manual_seed(recipe.seed)
    objective = Healing(
        model,
        depth=recipe.draft.depth,
        temperature=recipe.draft.temperature,
        seed=recipe.seed,
        router_bias_rate=settings.router_bias_rate,
    )
    source = Writings(recipe, Engine(model, tokenizer, recipe.engine), tasks)
    with writing(folder):
        tokenizer.save(folder)
        if not (folder / BEFORE).is_file():
            before = measured(recipe, model, tokenizer, tasks)
            temporary = folder / f".{BEFORE}"
            temporary.write_text(json.dumps({name: asdict(one) for name, one in before.items()}), encoding="utf-8")
            os.replace(temporary, folder / BEFORE)
            say(f"tokens per pass before: {words(before)}")
    return Run(folder, settings, model, objective, optimizer_of(settings, model), source, (), tokenizer, "heal")


def opened_tasks(recipe: HealRecipe) -> dict[str, Task]:
    """The recipe's tasks, refused where one cannot be trusted."""
    tasks = {name: one.open() for name, one in recipe.environments.items()}
    check_tasks(tasks.values())
    return tasks


def measured(
    recipe: HealRecipe, model: HybridModel, tokenizer: Tokenizer, tasks: Mapping[str, Task]
) -> dict[str, Acceptance]:
    """The acceptance on held-out prompts of every environment, greedy and sampled."""
    shares = {name: one.share for name, one in recipe.environments.items()}
    counts = apportioned(shares, max(recipe.measure.prompts, len(shares)))
    found = {}
    for way, temperature in WAYS.items():
        groups = [
            Group(
                tasks[name],
                tasks[name].prompt(number, "held_out"),
                recipe.rollouts.play(recipe.environments[name].effort, temperature),
                seed=recipe.seed,
            )
            for name, count in counts.items()
            # no prompt twice: the interval is one over prompts
            for number in range(min(count, tasks[name].size("held_out") or count))
        ]
        found[way] = measure(model, tokenizer, groups, recipe.measure.draft, recipe.engine)
    return found


def finish(recipe: HealRecipe, run: Run) -> dict[str, Any]:
    """The folder as `folder.saved` leaves it; the acceptance before and after in result.json."""
    held = json.loads((run.folder / BEFORE).read_text(encoding="utf-8"))
    before = {name: Acceptance(**{key: tuple(value) for key, value in one.items()}) for name, one in held.items()}
    assert run.tokenizer is not None
    run.model.eval()
    after = measured(recipe, run.model, run.tokenizer, opened_tasks(recipe))
    result = saved(run, {"acceptance": compared(before, after), "draft": recipe.measure.draft})
    say(f"tokens per pass: {words(before)} before, {words(after)} after, {recipe.measure.draft} drafted")
    return result


def words(measures: Mapping[str, Acceptance]) -> str:
    return ", ".join(f"{one.length:.3f} {name}" for name, one in measures.items())
