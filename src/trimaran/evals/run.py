"""`trimaran score`: how well a model does its tasks, every prompt, output and score on record.

    trimaran score runs/sft arithmetic,transforms n=200 samples=4 tasks.arithmetic.settings.digits=3
    trimaran score runs/sft tasks.toml thinking=false
    trimaran score runs/sft ruler --lengths 1k,2k              a suite: several tasks, and what they say together
    trimaran score runs/sft representation                     an analysis, which has settings of its own

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
from trimaran.errors import Refusal, nearest_first, writing
from trimaran.evals.endpoint import Endpoint, EndpointSettings
from trimaran.evals.play import Group, Player, PlaySettings
from trimaran.evals.records import Key, Records, digest_of, model_digest, record_of, source_of
from trimaran.evals.suites import ANALYSES, SUITES, Result, Row, Suite, context_of, lengths_of, suite
from trimaran.evals.table import table, total_failed
from trimaran.evals.tally import Score, score_of
from trimaran.ops import backend
from trimaran.ops.backend import OpsSettings
from trimaran.report import Progress, environment, say
from trimaran.report.terminal import put
from trimaran.tasks import names
from trimaran.tasks.task import Split, Task
from trimaran.train.folder import locked

SCORES, RECORDS, RESULTS = "scores", "records.jsonl", "results.json"
COUNTS = {
    "n",
    "samples",
    "greedy",
    "tasks",
    "suites",
    "engine",
    "device",
    "ops",
    "endpoint",
}  # settings that no single episode depends on


class Subject(Settings):
    """A task to score. task: its name, or `package.module:Class`; None: the name of its table."""

    task: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)


class ScoreSettings(PlaySettings):
    """What is scored, how often, and how the model answers."""

    tasks: dict[str, Subject] = Field(default_factory=dict)
    suites: dict[str, dict[str, Any]] = Field(default_factory=dict)  # settings of each suite
    n: int = Field(200, ge=1)  # problems of each task
    split: Split = "held_out"
    samples: int = Field(4, ge=0)  # episodes of each problem at `temperature`
    greedy: bool = True  # also one episode of each problem at temperature 0
    seed: int = Field(0, ge=0)
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    engine: EngineSettings = EngineSettings()
    endpoint: EndpointSettings | None = None  # a server to ask instead of the folder's own model
    ops: OpsSettings = OpsSettings()

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
    engine: Engine | Endpoint, tasks: Mapping[str, Task], settings: ScoreSettings, folder: Path | None = None
) -> dict[str, Score]:
    """Scores the engine's or a server's model on `tasks`. What `settings` say of tasks, suites, device, dtype, engine
    and endpoint is not looked at.

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
    engine: Engine | Endpoint,
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
            lacking: dict[int, list[str]] = {}  # modes by number, in the order asked
            for mode, number, sample in wanted[name]:
                if (mode, number, sample) in missing[name] and mode not in lacking.setdefault(number, []):
                    lacking[number].append(mode)
            for number, of_number in lacking.items():
                prompt = task.prompt(number, settings.split)  # once for all modes: some take long to draw
                for mode in of_number:
                    places.append(Place(name, mode))
                    yield Group(task, prompt, *modes[mode], settings.seed)

    total, left = sum(map(len, wanted.values())), sum(map(len, missing.values()))
    with Progress(total, start=total - left, label="score") as progress:
        player = Player(engine) if isinstance(engine, Engine) else engine
        for played in player.play(groups()):
            place = places[played.group]
            if (place.mode, played.prompt.number, played.sample) in missing[place.task]:
                records[place.task].add(record_of(played, place.mode))
                left -= 1
                progress.update(total - left, tokens=played.tokens)


def main(
    target: str,
    overrides: Sequence[str] = (),
    tasks: str | None = None,
    json: bool = False,
    compare: bool = False,
    lengths: str | None = None,
    endpoint: str | None = None,
) -> int:
    """Scores a folder's model, prints a table (or one JSON document), and returns 1 where episodes failed."""
    if endpoint is not None:
        overrides = [f"endpoint.url={as_json.dumps(endpoint)}", *overrides]
    if compare:
        return compared(target, tasks, overrides, lengths, json)
    if tasks in ANALYSES:
        for flag, given in (("--endpoint", endpoint), ("--lengths", lengths)):
            if given is not None:
                raise Refusal(f"{flag} for {tasks}", "a folder's own model, and settings", f"leave out {flag}")
        return int(config.imported(ANALYSES[tasks])(target, overrides, json))
    settings = settings_of(tasks, overrides, lengths)
    bench = Bench(target, settings)
    scores = bench.tasks()
    document = {**bench.document(), "tasks": scores[0]}
    told = [table(scores[1])] if scores[1] else []
    for name, values in settings.suites.items():
        found, lines = bench.suite(suite(name, values))
        document.setdefault("suites", {})[name] = found
        told.append(lines)
    if json:
        say(as_json.dumps(document, indent=1))
    else:
        say(f"{target}, {settings.split} problems\n" + "\n\n".join(told) + f"\nrecords in {bench.home}")
    return int(bench.failed > 0)


def compared(target: str, other: str | None, overrides: Sequence[str], lengths: str | None, json: bool) -> int:
    """`--compare`: hands two folders on."""
    from trimaran.evals.compare import main as side_by_side

    if other is None or overrides or lengths is not None:
        found = "--compare with " + ("one folder" if other is None else "settings")
        raise Refusal(found, "two folders that were scored", f"trimaran score --compare {target} OTHER")
    return side_by_side(target, other, json)


class Bench:
    """A folder's model, opened to be scored. failed: episodes and rows without a score so far."""

    def __init__(self, target: str, settings: ScoreSettings):
        self.opened = settings.open()
        for name, values in settings.suites.items():
            suite(name, values)
        settings.modes()
        self.target, self.settings, self.failed = target, settings, 0
        self.home = Path(target) / SCORES
        self.engine: Engine | Endpoint
        if settings.endpoint is not None:
            self.engine = Endpoint(settings.endpoint)
            self.weights = f"{settings.endpoint.url} {self.engine.model}"  # nobody can look at a server's weights
            return
        held = open_folder(target, FolderSettings(device=settings.device, dtype=settings.dtype, ops=settings.ops))
        if held.base:
            put(sys.stderr, f"{target} is a base model ({held.base}): nobody has taught it to answer.\n")
        self.engine, self.weights = Engine(held.model, held.tokenizer, settings.engine), model_digest(Path(target))

    def document(self) -> dict[str, Any]:
        plain, ops = config.plain(self.settings), backend.record()
        return {"model": self.target, "settings": plain, "made_on": environment(), "ops": ops}

    def label(self, name: str, task: Task, settings: ScoreSettings) -> str:
        return f"{name}-{digest(task, settings, self.weights)}"

    def tasks(self) -> tuple[dict[str, Any], dict[str, Score]]:
        """The plain tasks, together: their results as JSON, and their scores."""
        labels = {name: self.label(name, task, self.settings) for name, task in self.opened.items()}
        by_label = {labels[name]: task for name, task in self.opened.items()}
        found = score(self.engine, by_label, self.settings, self.home) if by_label else {}
        scores = {name: found[labels[name]] for name in self.opened}
        self.failed += total_failed(scores)
        return {name: self.written(name, self.opened[name], self.settings, one) for name, one in scores.items()}, scores

    def written(self, name: str, task: Task, settings: ScoreSettings, found: Score) -> dict[str, Any]:
        """Writes a task's results beside its records, and returns them. asked: a digest of all but the weights."""
        place = self.home / self.label(name, task, settings)
        document = {"records": str(place / RECORDS), "asked": digest(task, settings, ""), **found.document()}
        write_results(place / RESULTS, {**self.document(), "tasks": {name: document}})
        return document

    def row(self, name: str, row: Row) -> tuple[Result, dict[str, Any]]:
        """A suite's row: its score, and its results as JSON. Raises Refusal where it cannot be run."""
        if isinstance(row.task, Refusal):
            raise row.task
        settings = self.settings.replace(**row.play)
        label = self.label(name, row.task, settings)
        row.task.check(1)
        (found,) = score(self.engine, {label: row.task}, settings, self.home).values()
        kept = Records(self.home / label / RECORDS).known
        self.failed += found.failed
        records = [kept[key] for key in keys(row.task, settings) if key in kept]
        return Result(found, records), self.written(name, row.task, settings, found)

    def suite(self, asked: Suite) -> tuple[dict[str, Any], str]:
        """A suite's rows, one after the other: the results as JSON, and as lines."""
        context, results, told = context_of(self.target), dict[str, Result](), dict[str, Any]()
        for name, row in asked.rows(context).items():
            try:
                results[name], told[name] = self.row(f"{asked.name}-{name}", row)
            except Refusal as fault:
                results[name], told[name] = Result(None, fault=fault), {"error": str(fault)}
                self.failed += 1
        report = asked.report(context, results)
        document = {**report.document, "trained_length": context.trained, "rows": told}
        home = self.home / f"{asked.name}-{digest_of(suite=asked.model_dump(mode='json'), weights=self.weights)}"
        home.mkdir(parents=True, exist_ok=True)
        write_results(home / RESULTS, {**self.document(), "suites": {asked.name: document}})
        if report.picture is not None:
            report.picture.savefig(home / f"{asked.name}.png", format="png")
        return document, f"{report.text}\nresults in {home}"


def settings_of(tasks: str | None, overrides: Sequence[str], lengths: str | None = None) -> ScoreSettings:
    """Settings from a TOML file, or from a list of names; `overrides` laid over it."""
    known = [*sorted(names.TASKS.keys() - SUITES.keys()), *SUITES, *ANALYSES]
    if tasks is not None and tasks.endswith(".toml"):
        if lengths is not None:
            raise Refusal("--lengths with a TOML file", "lengths in its [suites.NAME]", "write them there")
        settings = config.load(ScoreSettings, tasks, overrides)
    else:
        named = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        for name in named:
            if ":" not in name and name not in names.TASKS and name not in SUITES:
                near = [one for one in nearest_first(name, known) if one not in ANALYSES or len(named) == 1]
                found = f"{name!r} beside others" if name in ANALYSES else f"unknown task {name!r}"
                raise Refusal(found, ", ".join([*near, "package.module:Class"]), f"did you mean {near[0]!r}?")
        plain = [name for name in named if name not in SUITES]
        tables: dict[str, dict[str, Any]] = {"tasks": {name.rpartition(":")[2]: {"task": name} for name in plain}}
        tables["suites"] = {name: {} for name in named if name in SUITES}
        if lengths is not None:
            if not tables["suites"]:
                raise Refusal(f"--lengths without a suite: {tasks}", ", ".join(SUITES), "name a suite, or no --lengths")
            tables["suites"] = {name: {"lengths": lengths_of(lengths)} for name in tables["suites"]}
        settings = ScoreSettings(**config.override(tables, overrides))
    if not settings.tasks and not settings.suites:
        allowed = ", ".join([*known, "package.module:Class", "a TOML file with [tasks.NAME] tables"])
        raise Refusal("no tasks to score", allowed, "name some, separated by commas: trimaran score RUN arithmetic")
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
