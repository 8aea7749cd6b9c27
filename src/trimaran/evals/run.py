"""`trimaran score`: how well a model does its tasks, every prompt, output and score on record.

    trimaran score runs/sft arithmetic,transforms n=200 samples=4 tasks.arithmetic.settings.digits=3
    trimaran score runs/sft tasks.toml thinking=false

All tasks go through one engine together. Killed and called again, it goes on; asked for more, it plays the rest.
"""

import json as as_json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from trimaran import config
from trimaran.config import Settings
from trimaran.engine.engine import Engine
from trimaran.engine.folder import FolderSettings, open_folder
from trimaran.engine.request import EngineSettings
from trimaran.errors import Refusal, writing
from trimaran.evals.play import Group, Player, PlaySettings
from trimaran.evals.records import Key, Records, digest_of, model_digest, record_of, source_of
from trimaran.evals.table import table, total_failed
from trimaran.evals.tally import Score, score_of
from trimaran.report import Progress, environment, say
from trimaran.report.terminal import put
from trimaran.tasks import names
from trimaran.tasks.task import Split, Task
from trimaran.train.folder import locked

SCORES, RECORDS, RESULTS = "scores", "records.jsonl", "results.json"
COUNTS = {"n", "samples", "greedy", "tasks", "engine", "device"}  # settings that no single episode depends on


class Subject(Settings):
    """A task to score. task: its name, or `package.module:Class`; None: the name of its table."""

    task: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)


class ScoreSettings(PlaySettings):
    """What is scored, how often, and how the model answers."""

    tasks: dict[str, Subject] = Field(default_factory=dict)
    n: int = Field(200, ge=1)  # problems of each task
    split: Split = "held_out"
    samples: int = Field(4, ge=0)  # episodes of each problem at `temperature`
    greedy: bool = True  # also one episode of each problem at temperature 0
    seed: int = Field(0, ge=0)
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    engine: EngineSettings = EngineSettings()

    def open(self) -> dict[str, Task]:
        """The tasks by their names here. Raises Refusal for those that do not exist or cannot be trusted."""
        found = {name: names.task(one.task or name, one.settings) for name, one in self.tasks.items()}
        for task in found.values():
            task.check()
        return found

    def modes(self) -> dict[str, tuple[PlaySettings, int]]:
        """How each problem is answered: (settings, episodes) by name."""
        play = PlaySettings(**{name: getattr(self, name) for name in PlaySettings.model_fields})
        sampled = self.samples if self.temperature > 0 else 0
        wanted = {"greedy": (play.replace(temperature=0), int(self.greedy)), "sampled": (play, sampled)}
        modes = {mode: (settings, count) for mode, (settings, count) in wanted.items() if count}
        if not modes:
            found = f"samples = {self.samples}, temperature = {self.temperature:g}, greedy = {str(self.greedy).lower()}"
            raise Refusal(found, "greedy = true, or samples at a temperature", "ask for one of them")
        return modes


@dataclass(frozen=True)
class Place:
    """Whose group it is."""

    task: str
    mode: str


def score(
    engine: Engine, tasks: Mapping[str, Task], settings: ScoreSettings, folder: Path | None = None
) -> dict[str, Score]:
    """Scores the engine's model on `tasks`; `settings.tasks`, `device`, `dtype` and `engine` are not looked at.

    folder: where records go, a folder per task, and where those of an earlier call are taken up; None: nowhere.
    """
    with ExitStack() as held:
        records = {}
        for name in tasks:
            if folder is not None:
                held.enter_context(locked(folder / name))
            records[name] = Records(None if folder is None else folder / name / RECORDS)
        wanted = {name: keys(task, settings) for name, task in tasks.items()}
        play_missing(engine, tasks, settings, wanted, records)
    return {name: score_of(name, [records[name].known[key] for key in wanted[name]], settings.seed) for name in tasks}


def keys(task: Task, settings: ScoreSettings) -> list[Key]:
    """The episodes asked for: (mode, number, sample)."""
    numbers = range(min(settings.n, task.size(settings.split) or settings.n))
    modes = settings.modes()
    return [(mode, number, sample) for number in numbers for mode in modes for sample in range(modes[mode][1])]


def play_missing(
    engine: Engine,
    tasks: Mapping[str, Task],
    settings: ScoreSettings,
    wanted: Mapping[str, Sequence[Key]],
    records: Mapping[str, Records],
) -> None:
    """Plays and records the episodes wanted that no record tells of."""
    places: list[Place] = []
    modes = settings.modes()
    missing = {name: {key for key in wanted[name] if key not in records[name].known} for name in tasks}

    def groups() -> Iterator[Group]:
        for name, task in tasks.items():
            for mode, number in dict.fromkeys((mode, number) for mode, number, _ in wanted[name]):
                play, samples = modes[mode]
                if any((mode, number, sample) in missing[name] for sample in range(samples)):
                    places.append(Place(name, mode))
                    yield Group(task, task.prompt(number, settings.split), play, samples, settings.seed)

    total, left = sum(map(len, wanted.values())), sum(map(len, missing.values()))
    with Progress(total, start=total - left, label="score") as progress:
        for played in Player(engine).play(groups()):
            place = places[played.group]
            if (place.mode, played.prompt.number, played.sample) in missing[place.task]:
                records[place.task].add(record_of(played, place.mode))
                left -= 1
                progress.update(total - left, tokens=played.tokens)


def main(target: str, overrides: Sequence[str] = (), tasks: str | None = None, json: bool = False) -> int:
    """Scores a folder's model, prints a table (or one JSON document), and returns 1 where episodes failed."""
    settings = settings_of(tasks, overrides)
    opened = settings.open()
    settings.modes()
    held = open_folder(target, FolderSettings(device=settings.device, dtype=settings.dtype))
    if held.base:
        put(sys.stderr, f"{target} is a base model ({held.base}): nobody has taught it to answer.\n")
    engine = Engine(held.model, held.tokenizer, settings.engine)
    home, weights = Path(target) / SCORES, model_digest(Path(target))
    labels = {name: f"{name}-{digest(task, settings, weights)}" for name, task in opened.items()}
    scores = score(engine, {labels[name]: task for name, task in opened.items()}, settings, home)
    scores = {name: scores[labels[name]] for name in opened}
    document = {"model": target, "settings": config.plain(settings), "made_on": environment(), "tasks": {}}
    for name, found in scores.items():
        place = home / labels[name]
        document["tasks"][name] = {"records": str(place / RECORDS), **found.document()}
        write_results(place / RESULTS, {**document, "tasks": {name: document["tasks"][name]}})
    if json:
        say(as_json.dumps(document, indent=1))
    else:
        say(f"{target}, {settings.split} problems\n{table(scores)}\nrecords in {home}")
    return int(total_failed(scores) > 0)


def settings_of(tasks: str | None, overrides: Sequence[str]) -> ScoreSettings:
    """Settings from a TOML file, or from a list of names; `overrides` laid over it."""
    if tasks is not None and tasks.endswith(".toml"):
        settings = config.load(ScoreSettings, tasks, overrides)
    else:
        named = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        tables = {"tasks": {name.rpartition(":")[2]: {"task": name} for name in named}}
        settings = ScoreSettings(**config.override(tables, overrides))
    if not settings.tasks:
        known = ", ".join([*sorted(names.TASKS), "package.module:Class", "a TOML file with [tasks.NAME] tables"])
        raise Refusal("no tasks to score", known, "name some, separated by commas: trimaran score RUN arithmetic")
    return settings


def digest(task: Task, settings: ScoreSettings, weights: str) -> str:
    """What the episodes of a task depend on, in ten signs."""
    play = settings.model_dump(mode="json", exclude=COUNTS)
    engine = settings.engine.model_dump(include={"ssm_dtype", "acceptance"})
    own = {"fields": task.model_dump(mode="json"), "source": source_of(task)}
    return digest_of(task=own, play=play, engine=engine, weights=weights)


def write_results(path: Path, document: Mapping[str, Any]) -> None:
    """Writes the results whole or not at all."""
    with writing(path):
        partial = path.with_name(path.name + ".partial")
        partial.write_text(as_json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
