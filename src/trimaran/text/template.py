"""Chat templates: the one shipped with every run, and those that folders bring."""

import json
from pathlib import Path
from typing import Any

from trimaran.errors import Refusal

NEMOTRON_3 = Path(__file__).parent / "templates" / "nemotron_3.jinja"


def read_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template of a hub folder, in the places where folders of different years keep it; None without one.

    `config` is the folder's tokenizer_config.json. Of several named templates the one called "default" is taken.
    """
    source = folder / "chat_template.jinja"
    if source.exists():
        return source.read_text(encoding="utf-8")
    older = folder / "chat_template.json"
    value = json.loads(older.read_text(encoding="utf-8")) if older.exists() else config
    template = value.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise Refusal(f"chat templates {sorted(named)}", "one called 'default'", "write it to chat_template.jinja")
        return named["default"]
    return template
