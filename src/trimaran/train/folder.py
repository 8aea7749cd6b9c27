"""A run's folder: one process at a time, nothing left behind by what was refused, a hub folder at the end."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from trimaran import config
from trimaran.config import Settings
from trimaran.errors import Refusal, writing
from trimaran.model import hub
from trimaran.model.size import count
from trimaran.ops.backend import record
from trimaran.parallel.launch import in_turn
from trimaran.parallel.world import World
from trimaran.report import curve_png, environment, read_metrics, say, series
from trimaran.train.adapters import end_adapters
from trimaran.train.loop import Run, fit
from trimaran.train.recipe import TrainSettings, check_same

RECIPE, RESULT, LOCK = "recipe.toml", "result.json", ".lock"


class Recipe(Protocol):
    """What the recipes of all stages share."""

    @property
    def run(self) -> str: ...
    @property
    def train(self) -> TrainSettings: ...


def carry_out(
    recipe: Settings,
    begin: Callable[[], Run],
    finish: Callable[[Run], dict[str, Any]] | None = None,
    world: World | None = None,
) -> int:
    """Carries out what is left of a recipe in its run folder; returns the exit code (see `loop.fit`).

    recipe: as `Recipe`, its paths absolute. begin: makes the run at its first step; a Refusal of it leaves no folder
    behind. finish: writes the result once all steps are done, and returns it (`saved` where None). world: of the
    processes that carry it out together, the first one keeps the folder.
    """
    place: Any = recipe
    folder, steps, world = Path(place.run), place.train.steps, world or World()
    begun_before = in_turn(world, lambda: world.first and begun(recipe, folder))
    with locked(folder) if world.first else nullcontext():
        if in_turn(world, lambda: finished(folder, steps)):
            say(f"{folder} is finished after {steps} steps; continue a text: trimaran generate {folder}")
            return 0
        with undone_on_refusal(folder, begun_before) if world.first else nullcontext():
            if world.first:
                config.write(recipe, folder / RECIPE, "Every setting of this run. The same settings resume it.")
            run = begin()
        code = fit(run)
        if code == 0 and world.first:
            (finish or saved)(run)
            say(f"saved in {folder}; continue a text: trimaran generate {folder}")
    return code


def begun(recipe: Settings, folder: Path) -> bool:
    """Whether the folder holds this run already. Raises Refusal where it holds another one, or something else."""
    if (folder / RECIPE).is_file():
        check_same(recipe, folder / RECIPE)
        return True
    if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
        raise Refusal(f"{folder} holds files but no {RECIPE}", "a new folder, or that of a run", "name another: run=…")
    return False


def absolute(path: str | None) -> str | None:
    """A path that means the same from anywhere, for the copy of a recipe in its run folder."""
    return path and str(Path(path).expanduser().absolute())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process per run folder. The lock goes with the process, however that ends."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows: two processes in one folder are the user's to avoid
        yield
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refusal(
            f"{folder} is in use by another process", "one at a time", "wait, or name another: run=…"
        ) from None
    else:
        yield
    finally:
        os.close(handle)


@contextmanager
def undone_on_refusal(folder: Path, begun_before: bool) -> Iterator[None]:
    """Text that cannot be used leaves no run folder behind, unless there was one before."""
    try:
        yield
    except Refusal:
        if not begun_before:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def finished(folder: Path, steps: int) -> bool:
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return bool(result.get("steps") == steps)


def saved(run: Run, beside: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Makes the run folder a hub folder, draws the curve and writes result.json, which it returns. Adapters are saved
    by themselves, then merged. One process of the run does it.

    beside: what a stage has to add to the result.
    """
    folder = run.folder
    end_adapters(run.model, folder, config.read(folder / RECIPE).get("start"))
    if run.world.alone:
        hub.save(run.model, folder)
    else:
        from trimaran.train import sharded  # here: importing DCP takes a second

        sharded.export(run.checkpoints / f"step-{run.step}", run.model.config, folder)
    metrics = folder / "metrics.jsonl"
    curves = series(metrics, train="loss", **{"held out": "held_out_loss"})
    if curves:
        curve_png(folder / "curve.png", curves, title=folder.name, value="nats per token")
    last = (read_metrics(metrics) or [{}])[-1]
    kept = {name: last.get(name) for name in ("tokens", "loss", "held_out_loss", "bits_per_byte", "wall_s", "cpu_s")}
    sizes = count(run.model.config)
    made = {"parameters": sizes.total, "active": sizes.active, "made_on": environment(), "ops": record()}
    result = {"steps": run.step, **kept, **made}
    result |= beside or {}
    with writing(folder / RESULT):
        temporary = folder / f".{RESULT}"
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, folder / RESULT)
    return result
