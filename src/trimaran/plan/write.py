"""A layout as the sections of a recipe: [parallel], and of [train] what belongs to it."""

import re
import tomllib
from pathlib import Path
from typing import Any

from trimaran.config import value_text
from trimaran.disk import whole
from trimaran.errors import Refusal
from trimaran.plan.costs import Job
from trimaran.plan.layout import Layout

MARK = "# trimaran plan"


Keys = dict[str, int | str | None]


def sections(job: Job, layout: Layout) -> dict[str, Keys]:
    """Tables and their keys; None: there must be no such key. micro_batches is a pipeline's; without one
    train.accumulate cuts a step."""
    count = job.rows // layout.rows // layout.micro_batch
    axes = ("replicate", "fsdp", "cp", "tp", "ep", "pp")
    parallel: Keys = {name: getattr(layout, name) for name in axes}
    parallel["micro_batches"] = count if layout.pp > 1 else None
    train: Keys = {"accumulate": 1 if layout.pp > 1 else count, "recompute": layout.recompute}
    return {"parallel": parallel, "train": train}


def write(path: Path, job: Job, layout: Layout, recipe: Path | None) -> None:
    """Writes the sections to `path`: into a copy of the recipe that was planned, or alone. The rest of the recipe, its
    comments too, stays as it is. Raises Refusal where the disk is full, the folder may not be written, or the recipe
    spells these sections in a way that lines cannot be put into (an inline table, an array over several lines)."""
    text = recipe.read_text(encoding="utf-8") if recipe else ""
    tables = sections(job, layout)
    if recipe is None:  # a recipe keeps its own, which may count rows of another length
        tables["train"] = {"batch_size": job.rows, **tables["train"]}
    wanted = tomllib.loads(text)
    for name, keys in tables.items():
        text = with_section(text, name, keys)
        merged = {**wanted.get(name, {}), **keys}
        wanted[name] = {key: value for key, value in merged.items() if value is not None}
    if said(text) != wanted:
        step = "write these two as plain sections, every key on a line of its own, or leave them out"
        raise Refusal(f"{recipe} spells [parallel] or [train] in other ways", "[parallel] and [train]", step)
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def said(text: str) -> dict[str, Any] | None:
    """The tables of a TOML text; None: it is none."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None


def with_section(text: str, name: str, keys: Keys) -> str:
    """The text with these keys under [name], replaced where they stand (None: left out), added after the section's last
    line else."""
    lines = text.splitlines()
    header = f"[{name}]"
    if not any(line.split("#")[0].strip() == header for line in lines):
        lines += [*([""] if lines else []), header]
    start = next(i for i, line in enumerate(lines) if line.split("#")[0].strip() == header) + 1
    stop = next((i for i in range(start, len(lines)) if lines[i].lstrip().startswith("[")), len(lines))
    body, rest = lines[start:stop], lines[stop:]
    for key, value in keys.items():
        written = [] if value is None else [f"{key} = {value_text(value)}  {MARK}"]
        places = [i for i, line in enumerate(body) if re.match(rf"\s*{key}\s*=", line)]
        if places:
            body[places[0] : places[0] + 1] = written
        else:
            last = max((i for i, line in enumerate(body) if line.strip()), default=-1)
            body[last + 1 : last + 1] = written
    return "\n".join([*lines[:start], *body, *rest]) + "\n"
