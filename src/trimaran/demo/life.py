"""`trimaran demo --full`: what becomes of the first run's model, stage after stage, each scored beside its control.

    sft              learns to answer: sums with a scratchpad, changed strings, sorted lists, tool calls
    rlvr             GRPO over four environments at once
    sums, strings    specialists, each by GRPO on one environment
    mopd             rlvr's model learns from both specialists on its own texts, and keeps the rest
    heal             the draft block catches up with the trunk that has moved

A stage is a recipe in `stages/`, carried out as `trimaran train` would. Finished ones are not run again.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trimaran import config
from trimaran.config import Settings
from trimaran.engine.engine import Engine
from trimaran.engine.folder import FolderSettings, open_folder
from trimaran.evals.run import RESULTS, ScoreSettings, score, write_results
from trimaran.evals.table import aligned
from trimaran.evals.tally import Score
from trimaran.report import say
from trimaran.rl import heal, mopd
from trimaran.rl import main as rl
from trimaran.rl.heal_recipe import HealRecipe
from trimaran.rl.mopd_recipe import MopdRecipe, TeacherSettings
from trimaran.rl.recipe import RLRecipe
from trimaran.train import sft
from trimaran.train.sft_recipe import SftRecipe

BASE = ("n=50", "samples=1")  # of the base model, which answers nothing and does not end
STAGES = Path(__file__).parent / "stages"
TASKS, CONTROLS = STAGES / "tasks.toml", STAGES / "controls.json"


@dataclass(frozen=True)
class Stage:
    """A recipe, the stage whose model it starts from, and the control that its scores are printed beside: another
    stage's, or one of the arms in controls.json (benchmarks/life.py). steps: fewer than the recipe's, for time."""

    settings: type[Settings]
    main: Callable[[Any], int]
    start: str
    control: str
    about: str
    steps: int | None = None


CHAIN = {
    "sft": Stage(SftRecipe, sft.main, "pretrain", "pretrain", "fine-tuning; control: the base model"),
    "rlvr": Stage(RLRecipe, rl.main, "sft", "more", "GRPO on four tasks; control: fine-tuning for as many tokens"),
    "sums": Stage(RLRecipe, rl.main, "sft", "rlvr", "specialist in sums; control: rlvr", 60),
    "strings": Stage(RLRecipe, rl.main, "sft", "rlvr", "specialist in strings; control: rlvr", 60),
    "mopd": Stage(MopdRecipe, mopd.main, "rlvr", "rlvr", "taught by both; control: rlvr, where it began", 60),
    "heal": Stage(HealRecipe, heal.main, "mopd", "mopd", "draft block only; control: mopd, which it must equal"),
}


def live(base: Path, seed: int, changes: Mapping[str, Sequence[str]] = MappingProxyType({})) -> int:
    """Carries the finished first run in `base` through its stages; returns the exit code of the first that stops.

    Each stage's folder is base/stages/NAME. base/results.json has {stage: {task: {score, control, n}}}: the mean reward
    of held-out problems, sampled at temperature 1. changes: overrides by stage, and for "tasks" those of the scoring.
    """
    home = base / "stages"

    def score_of(folder: Path, records: Path, *fewer: str) -> dict[str, Score]:
        return scored(folder, records / "scores", ["samples=2", "greedy=false", *fewer, *changes.get("tasks", ())])

    known = json.loads(CONTROLS.read_text(encoding="utf-8"))
    results: dict[str, dict[str, Any]] = {"pretrain": {}}
    reached: dict[str, dict[str, float]] = {**known, "pretrain": rewards(score_of(base, home / "pretrain", *BASE))}
    for name, stage in CHAIN.items():
        say(f"\n{name}: {stage.about}")
        start = base if stage.start == "pretrain" else home / stage.start
        overrides = [f"start={start}", f"run={home / name}", f"seed={seed}"]
        overrides += [] if stage.steps is None else [f"train.steps={stage.steps}"]
        recipe = config.load(stage.settings, STAGES / f"{name}.toml", [*overrides, *changes.get(name, ())])
        code = stage.main(with_teachers(recipe, home) if isinstance(recipe, MopdRecipe) else recipe)
        if code:
            return code
        scores = score_of(home / name, home / name)
        reached[name] = rewards(scores)
        results[name] = beside(scores, reached[stage.control])
        say(table(results[name]))
        write_results(base / RESULTS, results)
    say(f"\n{acceptance(home / 'heal')}")
    say(f"{base / RESULTS} has these figures. Serve what became of it, with a bound on its thoughts:")
    say(f"  trimaran serve {home / 'heal'} engine.drafter=mtp")
    return 0


def with_teachers(recipe: MopdRecipe, home: Path) -> MopdRecipe:
    """The recipe with its teachers' places. What no specialist teaches would be forgotten, so in the other environments
    of rlvr the student is held to rlvr's own model."""
    every = config.load(RLRecipe, STAGES / "rlvr.toml").environments
    paths = {name: home / (name if name in recipe.environments else "rlvr") for name in every}
    teachers = {name: TeacherSettings(path=str(path)) for name, path in paths.items()}
    return recipe.replace(environments=every, teachers=teachers)


def scored(folder: Path, records: Path, overrides: Sequence[str] = ()) -> dict[str, Score]:
    """Held-out scores of a folder's model; every episode is on record in `records`."""
    settings = config.load(ScoreSettings, TASKS, overrides)
    held = open_folder(str(folder), FolderSettings())
    return score(Engine(held.model, held.tokenizer, settings.engine), settings.open(), settings, records)


def rewards(scores: Mapping[str, Score]) -> dict[str, float]:
    return {name: one.sampled.reward for name, one in scores.items() if one.sampled is not None}


def beside(scores: Mapping[str, Score], control: Mapping[str, float]) -> dict[str, Any]:
    """{task: {score, control, n}}; the control is None where there is none for a task."""
    return {
        name: {"score": one.sampled.reward, "control": control.get(name), "n": one.sampled.n}
        for name, one in scores.items()
        if one.sampled is not None
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per task."""
    lines = [("task", "", "score", "control", "problems")]
    for task, one in results.items():
        control = "-" if one["control"] is None else f"{one['control']:.1%}"
        lines.append((task, "", f"{one['score']:.1%}", control, str(one["n"])))
    return aligned(lines)


def acceptance(folder: Path) -> str:
    """What healing did to the draft block, in a sentence."""
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))["acceptance"]
    words = [
        f"{way} {one['before']['length']:.2f} before, {one['after']['length']:.2f} after" for way, one in found.items()
    ]
    return f"Tokens per pass of the whole model with its draft block: {'; '.join(words)}."
