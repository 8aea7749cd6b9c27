"""`trimaran plan`: the fastest layout that fits, the next best, why the rest fell out, where time and memory go."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from trimaran.errors import Refusal, writing
from trimaran.plan import show
from trimaran.plan.costs import Costs, Job
from trimaran.plan.layout import Layout, check, given
from trimaran.plan.memory import Room
from trimaran.plan.request import GPUS, Source, job_of, number, source
from trimaran.plan.search import NEED, Found, Plan, plan_of, search


def main(target: str, overrides: list[str] | tuple[str, ...] = (), json: bool = False, **flags: str | None) -> None:
    """Plans for a preset, a size, a folder or a recipe. `flags`: gpus, hardware, seq, global_batch, tokens_per_step,
    precision, given, measure, write, picture; None where the command does not say."""
    flags = {**dict.fromkeys(NAMES), **flags}
    console = Console(highlight=False)
    asked = source(target, list(overrides))
    gpus = number(flags["gpus"] or GPUS, "--gpus")
    if flags["measure"]:
        flags["hardware"] = measured(flags["measure"], gpus, flags["precision"] or asked.precision or "fp32")
    job = job_of(asked, flags)
    found = one(job, gpus, flags["given"]) if flags["given"] else search(job, gpus)
    content = document(target, job, gpus, found)
    if json:
        print_json(content)
    else:
        show.draw(console, content)
    leave(job, asked, found, content, flags)


NAMES = (
    *("gpus", "hardware", "seq", "global_batch", "tokens_per_step"),
    *("precision", "given", "measure", "write", "picture"),
)


def measured(path: str, gpus: int, precision: str) -> str:
    """Measures this machine and writes the file that stands for it from now on."""
    from trimaran.plan.measure import measure  # torch and processes, for this flag alone

    if not path.endswith(".json"):
        raise Refusal(f"--measure {path}", "a file whose name ends with .json", f"write --measure {path}.json")
    hardware = measure(max(2, min(gpus, 8)), "bf16" if precision == "bf16" else "fp32")
    with writing(path):
        Path(path).write_text(hardware.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return path


def one(job: Job, gpus: int, text: str) -> Found:
    """The one layout that the command names, whether it fits or not."""
    layout = given(text, job.config.pattern)
    check(job.config, layout, job.rows, job.sequence, gpus, job.hardware.domain)
    return Found(plans=[plan_of(Room(Costs(job)), layout)], looked_at=1)


def document(name: str, job: Job, gpus: int, found: Found) -> dict[str, Any]:
    """Everything that is shown, as one JSON document (docs/plan.md has the schema)."""
    best, *others = found.plans
    return {
        "model": name,
        "hardware": job.hardware.name,
        "gpus": gpus,
        "sequence": job.sequence,
        "rows": job.rows,
        "tokens_per_step": job.tokens,
        "precision": job.precision,
        "usable_bytes": int(job.hardware.usable),
        **row(job, gpus, best),
        "alternatives": [row(job, gpus, plan) for plan in others],
        "looked_at": found.looked_at,
        "fell_out": [
            {"reason": reason, "layouts": number, "example": example(job, reason, found.examples[reason])}
            for reason, number in found.fell.most_common()
        ],
    }


def example(job: Job, reason: str, layout: Layout) -> str:
    """One of the layouts that fell out, with its size where that was the reason."""
    if reason != NEED:
        return layout.words()
    size = Room(Costs(job)).needed(layout).total
    return f"{layout.words()}: {size / 1e9:.1f} of {job.hardware.usable / 1e9:.1f} GB"


def row(job: Job, gpus: int, plan: Plan) -> dict[str, Any]:
    """One plan: the figures that others compare with, the layout, and the parts of time and memory."""
    seconds = plan.seconds
    return {
        "step_seconds": seconds,
        "tokens_per_s_per_gpu": job.tokens / seconds / gpus,
        "model_tflops_per_gpu": job.model_flops / seconds / gpus / 1e12,
        "bytes_per_gpu": plan.memory.total,
        "fits": plan.memory.total <= job.hardware.usable,
        "layout": plan.layout.table() | {"words": plan.layout.words()},
        "micro_batches": job.rows // plan.layout.rows // plan.layout.micro_batch,
        "memory": vars(plan.memory),
        "time": vars(plan.times),
    }


def print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=2))


def leave(job: Job, asked: Source, found: Found, content: dict[str, Any], flags: dict[str, str | None]) -> None:
    """Writes what the command asked for: sections of a recipe, a picture."""
    if flags["write"]:
        from trimaran.plan.write import write

        write(Path(flags["write"]), job, found.plans[0].layout, asked.recipe)
    if flags["picture"]:
        from trimaran.plan.picture import picture  # matplotlib is slow to import

        picture(Path(flags["picture"]), content)
