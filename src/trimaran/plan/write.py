"""A layout as the sections of a recipe: [parallel], and of [train] what belongs to it."""

import re
from pathlib import Path

from trimaran.config import value_text
from trimaran.errors import writing
from trimaran.plan.costs import Job
from trimaran.plan.layout import Layout

MARK = "# trimaran plan"


def sections(job: Job, layout: Layout) -> dict[str, dict[str, int | str]]:
    """Tables and their keys. micro_batches is a pipeline's; without one train.accumulate cuts a step."""
    count = job.rows // layout.rows // layout.micro_batch
    axes = ("replicate", "fsdp", "cp", "tp", "ep", "pp")
    parallel: dict[str, int | str] = {name: getattr(layout, name) for name in axes}
    if layout.pp > 1:
        parallel["micro_batches"] = count
    train: dict[str, int | str] = {"accumulate": 1 if layout.pp > 1 else count, "recompute": layout.recompute}
    return {"parallel": parallel, "train": train}


def write(path: Path, job: Job, layout: Layout, recipe: Path | None) -> None:
    """Writes the sections to `path`: into a copy of the recipe that was planned, or alone. The rest of the recipe, its
    comments too, stays as it is. Raises Refusal where the disk is full or the folder may not be written."""
    text = recipe.read_text(encoding="utf-8") if recipe else ""
    tables = sections(job, layout)
    if recipe is None:  # a recipe keeps its own, which may count rows of another length
        tables["train"] = {"batch_size": job.rows, **tables["train"]}
    for name, keys in tables.items():
        text = with_section(text, name, keys)
    with writing(path):
        path.write_text(text, encoding="utf-8")


def with_section(text: str, name: str, keys: dict[str, int | str]) -> str:
    """The text with these keys under [name], replaced where they stand, added after the section's last line else."""
    lines = text.splitlines()
    header = f"[{name}]"
    if not any(line.split("#")[0].strip() == header for line in lines):
        lines += [*([""] if lines else []), header]
    start = next(i for i, line in enumerate(lines) if line.split("#")[0].strip() == header) + 1
    stop = next((i for i in range(start, len(lines)) if lines[i].lstrip().startswith("[")), len(lines))
    body, rest = lines[start:stop], lines[stop:]
    for key, value in keys.items():
        written = f"{key} = {value_text(value)}  {MARK}"
        places = [i for i, line in enumerate(body) if re.match(rf"\s*{key}\s*=", line)]
        if places:
            body[places[0]] = written
        else:
            last = max((i for i, line in enumerate(body) if line.strip()), default=-1)
            body.insert(last + 1, written)
    return "\n".join([*lines[:start], *body, *rest]) + "\n"
