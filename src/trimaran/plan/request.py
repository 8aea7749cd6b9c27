"""What a command asks for: a model, rows of tokens, devices; read from a preset, a folder or a recipe, and flags."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from trimaran import config as settings
from trimaran.errors import Refusal, nearest_first
from trimaran.model.config import ModelConfig
from trimaran.model.dialects import read_config
from trimaran.model.presets import PRESETS, SIZE, preset, sized
from trimaran.model.size import ShapeOnly
from trimaran.plan.costs import Job
from trimaran.plan.hardware import Precision, find
from trimaran.train.recipe import Architecture

SEQUENCE, TOKENS, GPUS = "8192", "25M", "8"  # Nemotron 3's sequence and step: 3,072 rows of 8,192 tokens
COUNT = re.compile(r"(\d+(?:\.\d+)?)([kKmMbBgG]?)")
SCALE = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
NEAR = 0.02  # a round number of tokens stands for rows that differ by so little


@dataclass(frozen=True)
class Source:
    """What a target says of itself: the model, and where it is a recipe its own numbers and its file."""

    model: ModelConfig
    sequence: int | None = None
    rows: int | None = None
    precision: str | None = None
    recipe: Path | None = None


def source(target: str, overrides: Sequence[str]) -> Source:
    """A preset, a size, a folder with config.json, or a recipe. Overrides change fields of the model or the recipe."""
    path = Path(target)
    if path.is_dir() and not (path / "recipe.toml").is_file():
        return Source(changed(read_config(target), overrides))
    if path.suffix == ".toml" or path.is_dir():
        return of_recipe(path / "recipe.toml" if path.is_dir() else path, overrides)
    found = sized(target)[0] if SIZE.fullmatch(target) else preset(target)
    if isinstance(found, ShapeOnly):
        raise Refusal(
            f"{target} is a shape-only preset ({found.why})", "a model with layers we compute", "take another"
        )
    return Source(changed(found, overrides))


def changed(model: ModelConfig, overrides: Sequence[str]) -> ModelConfig:
    return ModelConfig(**settings.override(model.model_dump(), overrides)) if overrides else model


def of_recipe(path: Path, overrides: Sequence[str]) -> Source:
    """Model, rows and precision of a recipe of any stage that says them. Where the model is a folder that is not here
    yet (`start`), the command names it: model.preset=ultra-3. Of rows of several lengths the longest is planned for."""
    tables = settings.override(settings.read(path), overrides)
    data, train = table(tables, "data"), table(tables, "train")
    model = model_of(tables, path)
    sequence = number_of(data.get("sequence_length"), f"{path}: data.sequence_length")
    rows = number_of(train.get("batch_size"), f"{path}: train.batch_size")
    longest = max([sequence or 0, *lengths(data)])
    if sequence and rows and longest > sequence:  # steps of longer rows have fewer of them: as many tokens
        sequence, rows = longest, max(1, rows * sequence // longest)
    return Source(model, sequence, rows, train.get("precision"), path)


def lengths(data: dict[str, Any]) -> list[int]:
    """The lengths of rows that the phases of a recipe's mixture name."""
    phases = table(data, "mixture").get("phases", [])
    each = [one for phase in rows_in(phases, "phases") for one in rows_in(phase.get("lengths", []), "lengths")]
    found = [number_of(one.get("sequence_length"), "data.mixture.phases.lengths.sequence_length") for one in each]
    return [length for length in found if length]


def rows_in(value: Any, name: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list):
        found = f"data.mixture.{name} is {type(value).__name__}"
        raise Refusal(found, "a list of tables", f"write [[data.mixture.{name}]]")
    return [settings.as_mapping(one, f"a row of data.mixture.{name}") for one in value]


def table(tables: dict[str, Any], name: str) -> dict[str, Any]:
    return dict(settings.as_mapping(tables.get(name, {}), name))


def number_of(value: Any, name: str) -> int | None:
    if value is None or (isinstance(value, int) and value > 0):
        return value
    raise Refusal(f"{name} = {value!r}", "a number from 1 on", "correct the recipe")


def model_of(tables: dict[str, Any], path: Path) -> ModelConfig:
    fields = table(tables, "model")
    if not fields:
        start = tables.get("start")
        if isinstance(start, str) and Path(start).is_dir():
            return read_config(start)
        step = f"name the model: model.preset={nearest_first(Path(str(start)).name, PRESETS)[0]}"
        raise Refusal(
            f"{path} starts from {start!r}, which is not here", "a folder with config.json, or a preset", step
        )
    tokenizer = table(tables, "tokenizer")
    if "vocab_size" in tokenizer or not {"preset", "vocab_size"} & set(fields):
        fields.setdefault("vocab_size", tokenizer.get("vocab_size", 2048))
    return Architecture(**fields).model()


def number(text: str, flag: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise Refusal(f"{flag} {text}", "a number from 1 on", f"write {flag} 8")
    return int(text)


def amount(text: str, flag: str) -> float:
    """A number that may end with k, M or B (powers of a thousand)."""
    match = COUNT.fullmatch(text)
    if match is None or float(match[1]) <= 0:
        raise Refusal(f"{flag} {text}", "a number that may end with k, M or B", f"write {flag} 25M")
    return float(match[1]) * SCALE[match[2].lower()]


def rows_of(tokens: float, sequence: int) -> int:
    """Rows that make about `tokens`: exactly where they divide, else the roundest number of rows within 2 %: the one
    with the highest power of two, which most layouts divide (25M tokens of 8,192: 3,072 rows)."""
    exact = tokens / sequence
    if exact >= 1 and exact == int(exact):
        return int(exact)
    low, high = max(1, int(exact * (1 - NEAR)) + 1), int(exact * (1 + NEAR))
    if low > high:
        return max(1, round(exact))
    return min(range(low, high + 1), key=lambda rows: (-(rows & -rows), abs(rows - exact)))


def job_of(asked: Source, flags: dict[str, str | None]) -> Job:
    """The job; flags win over what the recipe says."""
    sequence = number(flags["seq"] or str(asked.sequence or SEQUENCE), "--seq")
    if flags["global_batch"] and flags["tokens_per_step"]:
        found = f"--global-batch {flags['global_batch']} beside --tokens-per-step {flags['tokens_per_step']}"
        raise Refusal(found, "one of the two", "leave one out")
    if flags["global_batch"]:
        rows = number(flags["global_batch"], "--global-batch")
    elif flags["tokens_per_step"] or asked.rows is None:
        rows = rows_of(amount(flags["tokens_per_step"] or TOKENS, "--tokens-per-step"), sequence)
    else:
        rows = asked.rows
    precision = flags["precision"] or asked.precision or "bf16"
    if precision not in get_args(Precision):
        near = nearest_first(precision, get_args(Precision))
        raise Refusal(f"--precision {precision}", ", ".join(near), f"did you mean --precision {near[0]}?")
    return Job(asked.model, sequence, rows, find(flags["hardware"] or "h100"), precision)  # type: ignore[arg-type]
