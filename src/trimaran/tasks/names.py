"""Tasks by name. A name, or `package.module:Class` for one's own, beside the task's settings."""

from collections.abc import Mapping
from typing import Any

from trimaran import config
from trimaran.tasks.task import Task

TASKS: dict[str, str] = {
    "arithmetic": "trimaran.tasks.arithmetic:Arithmetic",
    "calls": "trimaran.tasks.calls:Calls",
    "desk": "trimaran.tasks.desk:Desk",
    "sorting": "trimaran.tasks.sorting:Sorting",
    "transforms": "trimaran.tasks.transforms:Transforms",
}


def task(name: str, settings: Mapping[str, Any] | None = None) -> Task:
    """The task called `name` with `settings`. Raises Refusal for an unknown name, and for settings it does not have."""
    found: type[Task] = config.named(name, TASKS, "task")
    return found(**dict(settings or {}))
