"""Checkpoints that are there whole or not at all.

    checkpoints/step-200/   config.json, model.safetensors (the hub's layout: trimaran.load opens it), tokenizer;
                            of a run with adapters those alone, in peft's layout
                            training.safetensors   optimizer state and random generators
                            checkpoint.json        step, position in the data, model, size and checksum of every file
    checkpoints/LATEST      the name of the newest; resuming starts from it, and editing it rolls a run back

A checkpoint is written into a folder of another name, synced and renamed; then LATEST is replaced. Killed at any point,
the run finds the previous one. Nothing is pickled. What a run on several processes writes is in `sharded`; either kind
of run goes on from either kind of checkpoint.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimaran.data.shards import checksum
from trimaran.disk import sync
from trimaran.errors import Refusal, writing
from trimaran.model import adapter, hub
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import HybridModel
from trimaran.model.lora import adapted
from trimaran.parallel.world import World
from trimaran.text.tokenizer import Tokenizer

FORMAT, SHARDED = 1, 2  # of one process, of several
LATEST, TRAINING, MANIFEST = "LATEST", "training.safetensors", "checkpoint.json"
STAGING, DISCARDED = ".saving-", ".discarded-"


@dataclass(frozen=True)
class Saved:
    """Where a run stood: `step` updates done, `position` in the data."""

    step: int
    position: Mapping[str, Any]


def save(
    folder: Path,
    step: int,
    model: HybridModel,
    optimizer: torch.optim.Optimizer,
    position: Mapping[str, Any],
    *,
    keep: int,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Writes `folder`/step-N and points LATEST at it, then removes all but the newest `keep`.

    Raises Refusal when the disk is full or may not be written; whatever was there before is then untouched.
    """
    target, stage = folder / f"step-{step}", folder / f"{STAGING}step-{step}"
    try:
        with writing(target):
            folder.mkdir(parents=True, exist_ok=True)
            save_model(model, stage)
            if tokenizer is not None:
                tokenizer.save(stage)
            save_tensors(training_state(model, optimizer), stage / TRAINING)
            write_manifest(stage, FORMAT, step, model.config, position, measured(stage.iterdir()))
            for path in stage.iterdir():
                sync(path)
            commit(stage, target, keep=keep)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return target


def commit(stage: Path, target: Path, *, keep: int) -> None:
    """Makes the synced files in `stage` the newest checkpoint, and removes all but the newest `keep`."""
    folder, step = target.parent, int(target.name.removeprefix("step-"))
    sync(stage)
    discard(target)
    stage.rename(target)
    sync(folder)
    point(folder, target.name)
    kept = [other for other in steps_in(folder) if other <= step][-keep:]
    for other in steps_in(folder):
        if other not in kept:  # too old, or of a time before a roll-back
            discard(folder / f"step-{other}")


def restore(
    folder: Path, model: HybridModel, optimizer: torch.optim.Optimizer, tell: Callable[[str], None]
) -> Saved | None:
    """Brings model, optimizer and random generators to the newest whole checkpoint; None where there is none yet.

    A damaged one is said and the one before it is taken. Raises Refusal when all are damaged, or are of another model.
    """
    if not folder.is_dir():
        return None
    tidy(folder)
    damaged: list[str] = []
    for step in candidates(folder):
        path = folder / f"step-{step}"
        manifest, problem = check(path)
        if manifest is None:
            damaged.append(f"{path} is damaged: {problem}")
            tell(f"{damaged[-1]}; going back to the checkpoint before it")
            continue
        check_model(path, manifest["model"], model.config)
        if manifest["format"] == SHARDED:
            from trimaran.train import sharded  # here: importing DCP takes a second

            sharded.load(path, manifest, model, optimizer, World(), {})
        else:
            load_model(path, model)
            load_training(load_file(path / TRAINING), model, optimizer)
        return Saved(manifest["step"], manifest["position"])
    if damaged:
        raise unusable(folder, damaged)
    return None


def unusable(folder: Path, damaged: Sequence[str]) -> Refusal:
    found = f"no usable checkpoint in {folder} ({damaged[0]})"
    return Refusal(found, "at least one whole checkpoint", f"delete {folder} to begin the run again")


def tidy(folder: Path) -> None:
    """Removes what a killed run left half-written or half-removed."""
    for left_over in (*folder.glob(f"{STAGING}*"), *folder.glob(f"{DISCARDED}*")):
        if left_over.is_dir():
            shutil.rmtree(left_over)
        else:
            left_over.unlink()


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints there, rising."""
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted(int(name) for name in names if name.isdecimal())


def candidates(folder: Path) -> list[int]:
    """Steps to try, newest first: from the one that LATEST names, or from the highest where it names none."""
    steps = steps_in(folder)[::-1]
    pointer = folder / LATEST
    named = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    number = named.removeprefix("step-")
    if not number.isdecimal():
        return steps
    # A name without a folder happens when somebody deletes the newest: what is older still counts.
    return [step for step in steps if step <= int(number)] or steps


def point(folder: Path, name: str) -> None:
    """Replaces LATEST in one move."""
    pointer = folder / f"{STAGING}{LATEST}"
    pointer.write_text(name + "\n", encoding="utf-8")
    sync(pointer)
    os.replace(pointer, folder / LATEST)
    sync(folder)


def discard(path: Path) -> None:
    """Removes a checkpoint so that no half of it is ever seen under its name."""
    if path.exists():
        away = path.with_name(f"{DISCARDED}{path.name}")
        shutil.rmtree(away, ignore_errors=True)
        path.rename(away)
        shutil.rmtree(away)


# the manifest


Measured = Mapping[str, Sequence[int]]  # file -> bytes, checksum


def measured(files: Iterable[Path]) -> Measured:
    return {path.name: [path.stat().st_size, checksum(path)] for path in sorted(files)}


def write_manifest(
    stage: Path, kind: int, step: int, model: ModelConfig, position: Mapping[str, Any], files: Measured
) -> None:
    manifest = {"format": kind, "step": step, "position": position, "model": model.model_dump(mode="json")}
    text = json.dumps(manifest | {"files": files}, indent=1)
    (stage / MANIFEST).write_text(text, encoding="utf-8")


def check(path: Path, part: int = 0, parts: int = 1) -> tuple[dict[str, Any] | None, str]:
    """(manifest, "") of a whole checkpoint, (None, what is wrong) of a damaged one.

    Every file is read. parts: processes that share in that; `part` is this one.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = [*manifest["files"].items()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as problem:
        return None, f"{MANIFEST} cannot be read ({problem})"
    if manifest["format"] not in (FORMAT, SHARDED):
        told = f"{path} has format {manifest['format']!r}"
        raise Refusal(told, f"{FORMAT}, {SHARDED}", "resume with the version that wrote it")
    for name, (size, expected) in files[part::parts]:
        file = path / name
        found = file.stat().st_size if file.is_file() else -1
        if found != size:
            return None, f"{name} has {found} bytes instead of {size}" if found >= 0 else f"{name} is missing"
        if checksum(file) != expected:
            return None, f"{name} does not match its checksum"
    return manifest, ""


def check_model(path: Path, saved: Mapping[str, Any], config: ModelConfig) -> None:
    """Refuses the checkpoint of another architecture, naming the first field that differs."""
    for name, value in config.model_dump(mode="json").items():
        if saved.get(name) != value:
            found = f"{path} is of a model with {name} = {saved.get(name)!r}"
            raise Refusal(found, f"{name} = {value!r}, as the recipe has it", "use the recipe it was trained with")


# tensors


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as problem:  # how that library reports a full disk
        raise Refusal(f"cannot write {path} ({problem})", "a disk with free space", "free some space") from None


def save_model(model: HybridModel, stage: Path) -> None:
    """The weights in the hub's layout, or the adapters alone where the rest is frozen and lies where the run began."""
    if adapted(model):
        adapter.save(model, stage)
    else:
        hub.save(model, stage)


def load_model(path: Path, model: HybridModel) -> None:
    """Copies the weights into `model`, tensor by tensor; of a model with adapters, those."""
    if adapted(model):
        adapter.restore(model, path)
        return
    files = hub.weight_files(path)
    wanted = {piece.hub_name: piece for piece in (*hub.all_pieces(model), *hub.repeated_head(model))}
    hub.check(path, wanted, hub.read_headers(files))
    hub.fill(model, wanted, files)
    model.version += 1


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything but the weights, by name: optimizer.<parameter>.<entry>, rng.<device>."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"optimizer.{names[parameter]}.{entry}": value.detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for entry, value in state.items()
    }
    tensors["rng.cpu"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def load_training(tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The reverse of `training_state`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            name, _, entry = rest.rpartition(".")
            by_name.setdefault(name, {})[entry] = tensor
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {place: by_name[names[p]] for place, p in enumerate(ordered) if names[p] in by_name}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["rng.cpu"])
    device = next(model.parameters()).device
    if device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)
