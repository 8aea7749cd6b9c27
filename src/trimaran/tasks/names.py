"""Tasks by name. A name, or `package.module:Class` for one's own, beside the task's settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimaran import config
from trimaran.tasks.task import Task

TASKS: dict[str, str] = {
    "arithmetic": "trimaran.tasks.arithmetic:Arithmetic",
    "calls": "trimaran.tasks.calls:Calls",
    "code": "trimaran.tasks.code:Code",
    "desk": "trimaran.tasks.desk:Desk",
    "gsm8k": "trimaran.tasks.gsm8k:Gsm8k",
    "gym": "trimaran.tasks.gym:Gym",
    "l0": "trimaran.tasks.l0:L0",
    "maths": "trimaran.tasks.maths:Maths",
    "recall": "trimaran.tasks.recall:Recall",
    "ruler_common": "trimaran.tasks.ruler_words:Common",
    "ruler_frequent": "trimaran.tasks.ruler_words:Frequent",
    "ruler_niah": "trimaran.tasks.ruler_niah:Niah",
    "ruler_qa": "trimaran.tasks.ruler_qa:Qa",
    "ruler_tracing": "trimaran.tasks.ruler_tracing:Tracing",
    "sorting": "trimaran.tasks.sorting:Sorting",
    "transforms": "trimaran.tasks.transforms:Transforms",
}


def task(name: str, settings: Mapping[str, Any] | None = None) -> Task:
    """The task called `name` with `settings`. Raises Refusal for an unknown name, and for settings it does not have."""
    found: type[Task] = config.named(name, TASKS, "task")
    return found(**dict(settings or {}))


def located(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with absolute paths, so that a recipe's copy means the same from anywhere. Raises as `task` does."""
    opened = task(name, settings)
    paths = {key for key in settings if isinstance(getattr(opened, key), Path)}
    return {key: str(Path(value).expanduser().absolute()) if key in paths else value for key, value in settings.items()}
