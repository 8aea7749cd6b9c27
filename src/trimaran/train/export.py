"""`trimaran convert --export RUN OUT`: a checkpoint as a hub folder, whatever the number of processes that wrote it.

Needed for those of several processes, whose weights lie in pieces; read tensor by tensor, so a model that fits nowhere
whole is exported all the same.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from trimaran import config
from trimaran.config import Settings
from trimaran.errors import Refusal, writing
from trimaran.model.config import ModelConfig
from trimaran.report import say
from trimaran.text.tokenizer import Tokenizer
from trimaran.train import checkpoint, sharded


class ExportSettings(Settings):
    """How the hub folder is cut."""

    shard_bytes: int = Field(5_000_000_000, gt=0)  # of one file


def main(target: str, overrides: Sequence[str], out: str | None = None) -> int:
    """Exports the checkpoint `target`, or the newest of the run folder `target`, into the new folder `out`."""
    settings = config.load(ExportSettings, None, overrides)
    if out is None:
        raise Refusal("no folder to export to", "trimaran convert --export RUN OUT", "name a new folder after RUN")
    path, folder = chosen(Path(target)), Path(out)
    if folder.exists():
        raise Refusal(f"{folder} is there already", "a new folder", "name another, or remove it")
    manifest, problem = checkpoint.check(path)
    if manifest is None:
        raise Refusal(f"{path} is damaged: {problem}", "a whole checkpoint", f"name another of {path.parent}")
    model = ModelConfig(**manifest["model"])
    stage = folder.with_name(f".{folder.name}.exporting")
    with writing(folder):
        shutil.rmtree(stage, ignore_errors=True)
        try:
            sharded.export(path, model, stage, shard_bytes=settings.shard_bytes)
            if (path / "tokenizer.json").is_file():
                Tokenizer.load(path).save(stage)
            stage.rename(folder)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    say(f"step {manifest['step']} saved in {folder}; continue a text: trimaran generate {folder}")
    return 0


def chosen(target: Path) -> Path:
    """The checkpoint's folder."""
    if (target / checkpoint.MANIFEST).is_file():
        return target
    folder = target / "checkpoints"
    steps = checkpoint.candidates(folder) if folder.is_dir() else []
    if not steps:
        raise Refusal(f"{target} has no checkpoint", "a run folder, or one of its checkpoints/step-N", "name one")
    return folder / f"step-{steps[0]}"
