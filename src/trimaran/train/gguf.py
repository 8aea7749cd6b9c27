"""`trimaran convert FILE.gguf OUT`: weights of llama.cpp's format, with their tokenizer, as a hub folder."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from trimaran import config
from trimaran.config import Settings
from trimaran.errors import Refusal, writing
from trimaran.model.gguf import GGUF
from trimaran.model.gguf_llama import save_llama
from trimaran.report import environment, say
from trimaran.text.gguf import tokenizer_of

RECORD = "import.json"  # beside the weights: where they come from and how narrow they were


class ImportSettings(Settings):
    """How the weights are kept. fp32 holds every number of a block format; bf16 is half of it and rounds."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    shard_bytes: int = Field(5_000_000_000, gt=0)  # of one file
    split: str | None = None  # how text is split before the merges, for a file that does not name it


def main(target: str, overrides: Sequence[str], out: str | None = None) -> int:
    """Imports the file `target` into the new folder `out`, there whole or not at all."""
    settings = config.load(ImportSettings, None, overrides)
    if out is None:
        raise Refusal("no folder to import into", "trimaran convert FILE.gguf OUT", "name a new folder after the file")
    folder = Path(out)
    if folder.exists():
        raise Refusal(f"{folder} is there already", "a new folder", "name another, or remove it")
    file = GGUF(target)
    tokenizer = tokenizer_of(file.metadata, settings.split)
    stage = folder.with_name(f".{folder.name}.importing")
    with writing(folder):
        shutil.rmtree(stage, ignore_errors=True)
        try:
            save_llama(file, stage, getattr(torch, settings.dtype), settings.shard_bytes)
            tokenizer.save(stage)
            (stage / RECORD).write_text(json.dumps(record(file), indent=1) + "\n", encoding="utf-8")
            stage.rename(folder)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    formats = ", ".join(f"{count} {name}" for name, count in file.formats().items())
    say(f"{formats} tensors saved as {settings.dtype} in {folder}; continue a text: trimaran generate {folder}")
    return 0


def record(file: GGUF) -> dict[str, Any]:
    """What the folder was made of: the file, what it says of itself, and its formats."""
    about = {key: value for key, value in file.metadata.items() if key.startswith("general.")}
    return {
        "file": file.path.name,
        "sha256": hashlib.sha256(file.bytes).hexdigest(),
        "formats": file.formats(),
        "about": {key: value for key, value in about.items() if isinstance(value, str | int | float)},
        "made_on": environment(),
    }
