"""What a hub folder says beside tokenizer.json: the roles of its tokens, its chat template."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimaran.errors import Refusal

GENERATION = "generation_config.json"


def content_of(token: Any) -> str | None:
    """tokenizer_config.json writes a token as its text or as a table with a `content`."""
    return token.get("content") if isinstance(token, dict) else token


def fill_roles(config: dict[str, Any], document: dict[str, Any], folder: Path) -> None:
    """Roles that tokenizer_config.json leaves open are read from the files that name ids or texts beside it."""
    texts = read_json(folder / "special_tokens_map.json") or {}
    by_id = {token["id"]: token["content"] for token in document.get("added_tokens", [])}
    by_id |= {identity: token for token, identity in document.get("model", {}).get("vocab", {}).items()}
    for role in ("bos_token", "eos_token", "pad_token"):
        config[role] = content_of(config.get(role)) or content_of(texts.get(role))
        for name in (GENERATION, "config.json"):
            if config[role] is None:
                identity = (read_json(folder / name) or {}).get(f"{role}_id")
                first = identity[0] if isinstance(identity, list) and identity else identity
                config[role] = by_id.get(first)


def read_generation(folder: Path) -> dict[str, Any]:
    """generation_config.json of a hub folder; where there is none, the ids that end a text by its config.json."""
    own = read_json(folder / GENERATION)
    if own is not None:
        return own
    ends = (read_json(folder / "config.json") or {}).get("eos_token_id")
    return {} if ends is None else {"eos_token_id": ends}


def with_ends(given: dict[str, Any], roles: dict[str, int], ends: Sequence[int]) -> dict[str, Any]:
    """generation_config.json with every id of `ends` among those that stop, and the `roles` that it leaves open: by it
    other programs stop where a turn ends, for config.json often names the end of a document alone."""
    listed = given.get("eos_token_id")
    theirs = listed if isinstance(listed, list) else [] if listed is None else [listed]
    more = {f"{role}_id": identity for role, identity in roles.items() if given.get(f"{role}_id") is None}
    return {**given, **more, "eos_token_id": list(dict.fromkeys([*theirs, *ends]))}


def read_json(path: Path) -> dict[str, Any] | None:
    """The table in a JSON file, None where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise Refusal(f"{path}: {problem}", "a JSON file", "copy the file again") from None
    if not isinstance(value, dict):
        raise Refusal(f"{path} holds a {type(value).__name__}", "a table of keys and values", "copy the file again")
    return value


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def read_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template of a hub folder, in the places where folders of different years keep it; None without one.

    `config` is the folder's tokenizer_config.json. Of several named templates the one called "default" is taken.
    """
    source = folder / "chat_template.jinja"
    if source.exists():
        return source.read_text(encoding="utf-8")
    template = (read_json(folder / "chat_template.json") or config).get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise Refusal(f"chat templates {sorted(named)}", "one called 'default'", "write it to chat_template.jinja")
        return named["default"]
    return template
