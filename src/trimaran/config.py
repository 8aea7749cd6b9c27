"""Typed settings: pydantic models (frozen, nothing extra) <-> TOML recipe <-> dotted overrides.

A room owns the settings it uses and derives them from `Settings`. Every mistake becomes a `Refusal` that names the
dotted path, what was found, what is allowed (the nearest first) and the next step.

    recipe = config.load(PretrainRecipe, "recipes/laptop/text.toml", ["train.steps=100", "data.path=notes"])
    config.write(recipe, "runs/notes/recipe.toml")       # every field; load gives the same settings back

TOML has no null: a field that may be left out is unset by the word "none" (`model.moe_latent_size=none`).
"""

import copy
import importlib
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidatorFunctionWrapHandler, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import ValidationInfo

from trimaran.disk import whole
from trimaran.errors import Refusal, nearest_first

S = TypeVar("S", bound="Settings")

OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=(?!=)")
SHOWN = 8  # names listed in a refusal before "and N more"


class SettingRefusal(Refusal):
    """A refusal about one setting. `at` is its dotted path, which grows while nested settings report to their owner.

    `found` and `next_step` are functions of that path.
    """

    def __init__(self, at: str, found: Callable[[str], str], allowed: str, next_step: Callable[[str], str]):
        self.at, self._found, self._next_step = at, found, next_step
        super().__init__(found(at), allowed, next_step(at))

    def under(self, owner: str) -> "SettingRefusal":
        """The same refusal seen from the settings that hold these under the name `owner`."""
        return SettingRefusal(f"{owner}.{self.at}", self._found, self.allowed, self._next_step)


class Settings(BaseModel):
    """Base of all settings: immutable, an unknown key is an error, and so is a value of another kind."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, ser_json_inf_nan="constants")

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as problem:
            raise explain(type(self), problem) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return type(self)(**{**self.model_dump(), **changes})

    @field_validator("*", mode="wrap")
    @classmethod
    def _same_kind(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, str) and value == "none" and type(None) in members(field.annotation):
            value = None
        accepted = handler(value)
        if changed_kind(value, accepted):
            raise PydanticCustomError("changed_kind", "a value of another kind")
        return accepted


def changed_kind(given: Any, accepted: Any) -> bool:
    """Whether pydantic turned text, truth and number into one another: 100 for "100", 1 for true."""
    if isinstance(given, (list, tuple)) and isinstance(accepted, (list, tuple)):
        return any(changed_kind(g, a) for g, a in zip(given, accepted))
    if isinstance(given, Mapping) and isinstance(accepted, Mapping):
        return any(changed_kind(given[key], accepted[key]) for key in given if key in accepted)
    scalars = (bool, int, float, str)
    if not (isinstance(given, scalars) and isinstance(accepted, scalars)):
        return False
    return kind(given) != kind(accepted)


def kind(value: bool | int | float | str) -> type:
    if isinstance(value, bool):
        return bool
    return str if isinstance(value, str) else float


def explain(settings: type[BaseModel], problem: ValidationError) -> Refusal:
    """Turns pydantic's report into one line; the first problem only, since later ones often follow from it."""
    errors = problem.errors()
    # A misspelt key comes before the missing one that it was meant to be.
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):  # a list too short: name the list
        first["loc"], first["type"] = first["loc"][:-1], "too_short"
    inner = first.get("ctx", {}).get("error")
    names, annotation, metadata = locate(settings, first["loc"])
    path = ".".join(names)
    if isinstance(inner, SettingRefusal):
        return inner.under(path) if path else inner
    if isinstance(inner, Refusal):
        prefix = f"{path}: " if path and not inner.found.startswith(path) else ""
        return Refusal(f"{prefix}{inner.found}", inner.allowed, inner.next_step)
    if first["type"] == "extra_forbidden":
        return unknown_key(settings, path)
    if first["type"] == "missing":
        return SettingRefusal(
            path,
            lambda at: f"{at!r} is missing",
            describe(annotation, metadata),
            lambda at: f"set {at} in the recipe or as {at}=VALUE",
        )
    value = first["input"]
    if inner:
        annotation, metadata = lower_first(str(inner)), ()
    return wrong_value(path, value, annotation, metadata)


def wrong_value(path: str, value: Any, annotation: Any, metadata: Sequence[Any]) -> SettingRefusal:
    """Refuses a value of another kind, or outside the limits of the field."""
    text_wanted = str in members(annotation) or Path in members(annotation)
    if text_wanted and isinstance(value, (bool, int, float)):
        quoted = f'"{value_text(value)}"'
        return SettingRefusal(
            path,
            lambda at: f"{at} = {value!r}",
            describe(annotation, metadata),
            lambda at: f"put it in quotes: {at} = {quoted} in a recipe, {at}='{quoted}' in a shell",
        )
    allowed = annotation if isinstance(annotation, str) else describe(annotation, metadata, value)
    return SettingRefusal(path, lambda at: f"{at} = {value!r}", allowed, lambda at: f"set {at} to an allowed value")


def unknown_key(settings: type[BaseModel], key: str) -> SettingRefusal:
    """Refuses a key that `settings` has not; looks deeper for a key of that very name before guessing by likeness."""
    known = nearest_first(key, settings.model_fields)
    below = [path for path in paths(settings) if path.split(".")[-1] == key]
    guess = below[0] if below else known[0] if known else None
    allowed = ", ".join(known[:SHOWN]) + (f" and {len(known) - SHOWN} more" if len(known) > SHOWN else "")

    def next_step(at: str) -> str:
        return "remove it" if guess is None else f"did you mean {at.removesuffix(key)}{guess}?"

    return SettingRefusal(key, lambda at: f"unknown key {at!r}", allowed or "no keys here", next_step)


def paths(settings: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted path that can be set, tables inside tables included."""
    found = []
    for name, field in settings.model_fields.items():
        found.append(prefix + name)
        for member in members(field.annotation):
            if isinstance(member, type) and issubclass(member, BaseModel):
                found += paths(member, f"{prefix}{name}.")
    return found


def locate(settings: type[BaseModel], location: Sequence[int | str]) -> tuple[list[str], Any, Sequence[Any]]:
    """The names on the way to `location`, and the type and constraints there. Labels of union members are no names."""
    names: list[str] = []
    annotation: Any = settings
    metadata: Sequence[Any] = ()
    for part in location:
        step = inside(annotation, part)
        if step is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
            names.append(str(part))  # a key the settings do not have
            break
        if step is None:
            continue
        annotation, metadata = step
        names.append(str(part))
    return names, annotation, metadata


def inside(annotation: Any, part: int | str) -> tuple[Any, Sequence[Any]] | None:
    """Type and constraints of `part` inside a value of type `annotation`; None when there is no such place."""
    for member in members(annotation):
        arguments = typing.get_args(member)
        if isinstance(member, type) and issubclass(member, BaseModel) and part in member.model_fields:
            field = member.model_fields[str(part)]
            return field.annotation, field.metadata
        if typing.get_origin(member) in (list, tuple, set, Sequence) and isinstance(part, int):
            one = (
                arguments[0] if len(arguments) < 2 or arguments[1] is ... else arguments[min(part, len(arguments) - 1)]
            )
            return one, ()
        if typing.get_origin(member) in (dict, Mapping) and len(arguments) == 2:
            return arguments[1], ()
    return None


def members(annotation: Any) -> tuple[Any, ...]:
    """The types a value may have: the members of a union, or the type itself; constraints taken off."""
    if typing.get_origin(annotation) is typing.Annotated:
        return members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(inner for member in typing.get_args(annotation) for inner in members(member))
    return (annotation,)


NOUNS = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("a string", "strings"),
    Path: ("a path", "paths"),
}
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}


def describe(annotation: Any, metadata: Iterable[Any] = (), given: Any = None) -> str:
    """What a field takes, in words: "an integer >= 1", "'relu2' or 'swiglu'". Choices nearest to `given` first."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation, *more = typing.get_args(annotation)
        metadata = [*metadata, *(c for one in more for c in (one.metadata if isinstance(one, FieldInfo) else [one]))]
    choices = [member for member in members(annotation) if member is not type(None)]
    words = " or ".join(dict.fromkeys(noun(member, given) for member in choices))
    limits = [f"{sign} {getattr(c, name)}" for c in metadata for name, sign in SIGNS.items() if hasattr(c, name)]
    lengths = [
        f"{sign} {getattr(c, name)} long"
        for c in metadata
        for name, sign in (("min_length", "at least"), ("max_length", "at most"))
        if getattr(c, name, None) is not None
    ]
    optional = ["or left out"] if len(choices) < len(members(annotation)) else []
    return ", ".join([f"{words} {' and '.join(limits)}".strip(), *lengths, *optional])


def noun(member: Any, given: Any = None, many: bool = False) -> str:
    """A type in words, in the singular or the plural."""
    origin, arguments = typing.get_origin(member), typing.get_args(member)
    if origin is Literal:
        choices = nearest_first(str(given), [str(choice) for choice in arguments]) if given is not None else arguments
        quoted = {str(choice): repr(choice) for choice in arguments}
        return " or ".join(quoted[str(choice)] for choice in choices)
    if origin in (list, set, Sequence) or (origin is tuple and arguments[-1] is ...):
        return f"{'lists' if many else 'a list'} of {' or '.join(noun(m, many=True) for m in members(arguments[0]))}"
    if origin is tuple:
        return f"a list of {len(arguments)} values ({', '.join(describe(one) for one in arguments)})"
    if isinstance(member, type) and issubclass(member, BaseModel):
        return "tables" if many else f"a table with keys among {', '.join(list(member.model_fields)[:SHOWN])}"
    if origin in (dict, Mapping):
        return "tables" if many else f"a table of {' or '.join(noun(m, many=True) for m in members(arguments[1]))}"
    return NOUNS[member][many] if member in NOUNS else getattr(member, "__name__", str(member))


def lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def as_mapping(value: Any, what: str) -> Mapping[str, Any]:
    """`value` as a mapping, or a refusal that says what should have been one."""
    if not isinstance(value, Mapping):
        raise Refusal(f"{what} is {type(value).__name__}", "a table of keys and values", f"write {what} as a table")
    return value


def load(settings: type[S], path: str | os.PathLike[str] | None = None, overrides: Iterable[str] = ()) -> S:
    """Settings from a TOML file (or from defaults alone), with `dotted.key=value` overrides laid over it."""
    overrides = list(overrides)
    tables = {} if path is None else read(path)
    try:
        return settings(**override(tables, overrides))
    except SettingRefusal as problem:
        said = any(problem.at == key or problem.at.startswith(key + ".") for key in map(key_of, overrides))
        if path is None or said:
            raise
        raise Refusal(f"{os.fspath(path)}: {problem.found}", problem.allowed, problem.next_step) from None


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tables of a TOML file. A missing file, a folder, other bytes and bad syntax are refusals."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise Refusal(f"no file {str(path)!r}", *nearby(path)) from None
    except IsADirectoryError:
        raise Refusal(f"{str(path)!r} is a folder", *nearby(path / "recipe.toml")) from None
    except PermissionError:
        raise Refusal(f"{str(path)!r} may not be read", "a readable TOML file", "change its permissions") from None
    except UnicodeDecodeError as problem:
        raise Refusal(
            f"{str(path)!r} is not text (byte {problem.start})", "a TOML file in UTF-8", "give a recipe"
        ) from None
    except tomllib.TOMLDecodeError as problem:
        raise Refusal(f"{path}: {lower_first(str(problem))}", "TOML 1.0", "correct that line") from None


def nearby(path: Path) -> tuple[str, str]:
    """What is allowed and the next step where `path` should be a recipe."""
    recipes = {str(found) for found in (*path.parent.glob("*.toml"), *Path("recipes").glob("*/*.toml"))}
    found = nearest_first(str(path), sorted(recipes - {"pyproject.toml"}))[:SHOWN]
    if not found:
        return "the path of a TOML recipe", "give one, such as recipes/laptop/text.toml of the repository"
    return f"a recipe, such as {', '.join(found)}", f"did you mean {found[0]}?"


def key_of(text: str) -> str:
    return text.split("=", 1)[0]


def override(tables: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `tables` with each `dotted.key=value` set, in order; a number walks into a list."""
    result = copy.deepcopy(dict(tables))
    for text in overrides:
        if not OVERRIDE.match(text):
            raise Refusal(f"{text!r}", "dotted.key=value, such as train.steps=100", "write the key, =, then the value")
        key, value = text.split("=", 1)
        *outer, last = key.split(".")
        place: Any = result
        for depth, part in enumerate(outer):
            place = descend(place, part, ".".join(outer[: depth + 1]))
        if isinstance(place, list):
            place[index_of(place, last, key)] = parse(value)
        else:
            place[last] = parse(value)
    return result


def descend(place: Any, part: str, at: str) -> Any:
    """The table or list under `part`, made when there is none yet."""
    inner = place[index_of(place, part, at)] if isinstance(place, list) else place.setdefault(part, {})
    if not isinstance(inner, (dict, list)):
        raise Refusal(f"{at} = {inner!r} holds no keys", f"{at}=VALUE", f"set {at} itself")
    return inner


def index_of(place: list[Any], part: str, at: str) -> int:
    if part.isdecimal() and int(part) < len(place):
        return int(part)
    raise Refusal(
        f"{at}: the list there has no place {part!r}", f"0 to {len(place) - 1}", "give the whole list instead"
    )


def parse(text: str) -> Any:
    """A value from the command line: TOML when it is TOML, else the text itself."""
    try:
        tables = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = tables["value"]
    # A line break can smuggle in a second key, and a date is nothing that a setting takes: both are plain text.
    return value if len(tables) == 1 and isinstance(value, (bool, int, float, str, list, dict)) else text


def write(settings: Settings, path: str | os.PathLike[str], comment: str = "") -> None:
    """Writes every field to a TOML file, whole or not at all."""
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    with whole(path) as temporary:
        temporary.write_text(lines + toml(settings), encoding="utf-8")


def toml(settings: Settings) -> str:
    """The settings as TOML. Fields that are None by default and None now are left out."""
    return "\n".join(table_lines(plain(settings), ())).lstrip("\n") + "\n"


def plain(value: Any) -> Any:
    """Settings as dicts, lists and scalars; None becomes "none" where the default would be something else."""
    if isinstance(value, BaseModel):
        pairs = ((name, getattr(value, name), field) for name, field in type(value).model_fields.items())
        return {name: plain(inner) for name, inner, field in pairs if inner is not None or not starts_none(field)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(inner) for inner in value]
    return "none" if value is None else value


def starts_none(field: FieldInfo) -> bool:
    return field.default is None and field.default_factory is None


def table_lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """Lines of one table: its own values first, then its tables, each under a [header]."""
    lines, below = [], []
    for key, value in table.items():
        name = ".".join(name_text(part) for part in (*path, key))
        if isinstance(value, Mapping):
            inner = table_lines(value, (*path, key))
            below += inner if inner and not inner[0] else ["", f"[{name}]", *inner]  # only tables inside: no header
        elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            for one in value:
                below += ["", f"[[{name}]]", *table_lines(one, (*path, key))]
        else:
            lines.append(f"{name_text(key)} = {value_text(value)}")
    return lines + below


def name_text(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else string_text(key)


def string_text(text: str) -> str:
    """A TOML basic string. JSON's escapes are TOML's, but for DEL, which TOML wants escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def value_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)  # inf and nan are spelt the same in TOML
    if isinstance(value, list):
        return f"[{', '.join(value_text(one) for one in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name_text(k)} = {value_text(v)}" for k, v in value.items()) + "}"
    return string_text(os.fspath(value))


def named(name: str, registry: Mapping[str, Any], what: str) -> Any:
    """The object that `name` stands for in a registry of objects or "module:object" strings.

    `package.module:object` is accepted wherever a registered name is. `what` says what the registry holds.
    """
    entry = name if ":" in name else registry.get(name)
    if entry is None:
        known = [*nearest_first(name, registry), "package.module:object"]
        raise Refusal(f"unknown {what} {name!r}", ", ".join(known[:SHOWN]), f"did you mean {known[0]!r}?")
    return imported(entry) if isinstance(entry, str) else entry


def imported(place: str) -> Any:
    """Imports `package.module:object`."""
    module, _, attribute = place.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as problem:
        if problem.name is None or not (module + ".").startswith(problem.name + "."):
            raise  # the module exists; something that it needs does not
        raise Refusal(
            f"no module {problem.name!r} for {place!r}", "package.module:object", "correct the name"
        ) from None
    if not hasattr(found, attribute):
        known = nearest_first(attribute, [n for n in vars(found) if not n.startswith("_")])
        raise Refusal(f"{module!r} has no {attribute!r}", ", ".join(known[:SHOWN]), "correct the name after the colon")
    return getattr(found, attribute)
