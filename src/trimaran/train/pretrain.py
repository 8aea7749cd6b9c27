"""`trimaran train` with a recipe of stage "pretrain": text in, a run folder out, the same command again resumes."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimaran import config
from trimaran.errors import Refusal, writing
from trimaran.model import hub
from trimaran.model.size import count
from trimaran.ops.memory import keep_freed_memory
from trimaran.report import curve_png, environment, read_metrics, say, series
from trimaran.train.loop import Run, fit
from trimaran.train.prepare import Texts, begin, prepare
from trimaran.train.recipe import PretrainRecipe, check_same

RECIPE, RESULT, LOCK = "recipe.toml", "result.json", ".lock"


def main(recipe: PretrainRecipe, texts: Texts | None = None) -> int:
    """Carries out a recipe, or what is left of it; returns the exit code (see `loop.fit`).

    The run folder ends as a hub folder (config.json, safetensors, tokenizer, chat template) with recipe.toml,
    metrics.jsonl, curve.png and result.json, which is written last. `texts` stands in for those the recipe names.
    """
    keep_freed_memory()  # worth a tenth of a small model's step; whoever calls this owns the process
    recipe = located(recipe)
    folder = Path(recipe.run)
    begun_before = (folder / RECIPE).is_file()
    if begun_before:
        check_same(recipe, folder / RECIPE)
    elif folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
        raise Refusal(f"{folder} holds files but no {RECIPE}", "a new folder, or that of a run", "name another: run=…")
    with locked(folder):
        if finished(folder, recipe.train.steps):
            say(f"{folder} is finished after {recipe.train.steps} steps; continue a text: trimaran generate {folder}")
            return 0
        with undone_on_refusal(folder, begun_before):
            config.write(recipe, folder / RECIPE, "Every setting of this run. The same settings resume it.")
            run = begin(recipe, prepare(recipe, texts))
        code = fit(run)
        if code == 0:
            result = finish(run)
            say(f"held-out text: {result['bits_per_byte']:.3f} bits per byte")
            say(f"saved in {folder}; continue a text: trimaran generate {folder}")
    return code


def located(recipe: PretrainRecipe) -> PretrainRecipe:
    """The recipe with absolute paths, so that its copy in the run folder means the same from anywhere."""

    def absolute(path: str | None) -> str | None:
        return path and str(Path(path).expanduser().absolute())

    data = recipe.data.replace(
        path=absolute(recipe.data.path),
        sources={name: absolute(path) for name, path in recipe.data.sources.items()},
        held_out_path=absolute(recipe.data.held_out_path),
    )
    tokenizer = recipe.tokenizer.replace(path=absolute(recipe.tokenizer.path))
    return recipe.model_copy(update={"run": absolute(recipe.run), "data": data, "tokenizer": tokenizer})


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


def finish(run: Run) -> dict[str, Any]:
    """Makes the run folder a hub folder, draws the curve and writes result.json, which it returns."""
    folder = run.folder
    hub.save(run.model, folder)
    metrics = folder / "metrics.jsonl"
    curves = series(metrics, train="loss", **{"held out": "held_out_loss"})
    if curves:
        curve_png(folder / "curve.png", curves, title=folder.name, value="nats per token")
    last = (read_metrics(metrics) or [{}])[-1]
    kept = {name: last.get(name) for name in ("tokens", "loss", "held_out_loss", "bits_per_byte", "wall_s", "cpu_s")}
    sizes = count(run.model.config)
    result = {"steps": run.step, **kept, "parameters": sizes.total, "active": sizes.active, "made_on": environment()}
    with writing(folder / RESULT):
        temporary = folder / f".{RESULT}"
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, folder / RESULT)
    return result
