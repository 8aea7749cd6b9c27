"""Typed settings: pydantic models (frozen, nothing extra) <-> TOML recipe <-> dotted overrides.

A room owns the settings it uses and derives them from `Settings`. Every mistake becomes a `Refusal` that names the
dotted path, what was found, what is allowed (the nearest first) and the next step.
"""

import typing
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from trimaran.errors import Refusal, nearest_first


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, ser_json_inf_nan="constants")

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as problem:
            raise explain(type(self), problem) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return type(self)(**{**self.model_dump(), **changes})


def explain(settings: type[BaseModel], problem: ValidationError) -> Refusal:
    """Turns pydantic's report into one line; the first problem only, since later ones often follow from it."""
    first = problem.errors()[0]
    inner = first.get("ctx", {}).get("error")
    path = ".".join(str(part) for part in first["loc"])
    if isinstance(inner, Refusal):
        prefix = f"{path}: " if path and not inner.found.startswith(path) else ""
        return Refusal(f"{prefix}{inner.found}", inner.allowed, inner.next_step)
    if first["type"] == "extra_forbidden":
        owner, key = owner_of(settings, first["loc"]), str(first["loc"][-1])
        known = nearest_first(key, owner.model_fields)
        return Refusal(f"unknown key {path!r}", ", ".join(known), f"did you mean {known[0]!r}?" if known else "remove it")
    if first["type"] == "missing":
        return Refusal(f"{path!r} is missing", "a value", f"set {path} in the recipe or as {path}=VALUE")
    return Refusal(f"{path} = {first['input']!r}", lower_first(first["msg"]), f"set {path} to an allowed value")


def owner_of(settings: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The settings class that would hold the last part of `location`."""
    for part in location[:-1]:
        field = settings.model_fields.get(str(part))
        candidates = [] if field is None else [field.annotation, *typing.get_args(field.annotation)]
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not inner:
            break
        settings = inner[0]
    return settings


def lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def as_mapping(value: Any, what: str) -> Mapping[str, Any]:
    """`value` as a mapping, or a refusal that says what should have been one."""
    if not isinstance(value, Mapping):
        raise Refusal(f"{what} is {type(value).__name__}", "a table of keys and values", f"write {what} as a table")
    return value
