"""Checkpoints in and out: a folder with config.json and safetensors, in the layout of the hub.

`load` reads tensor by tensor into a model whose storage is already where it will stay, so no second copy of the model
exists; `save` writes beside the old files and swaps them in at the end, so a full disk costs nothing but the attempt.
Every tensor is accounted for: what is missing, unexpected or misshapen is one refusal that lists it.
"""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimaran.disk import sync
from trimaran.errors import Refusal, nearest_first
from trimaran.model.dialects import dump_json, model_type, read_config, write_config
from trimaran.model.hybrid import HybridModel, allocate, build
from trimaran.model.names import Piece, pieces
from trimaran.model.presets import PRESETS, SIZE, preset
from trimaran.model.size import ShapeOnly

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
STAGING = ".saving-"
FLOATS = ("F64", "F32", "F16", "BF16")
SHOWN = 4  # names listed per kind of mismatch

__all__ = ["Saved", "load", "read_config", "save", "write_config"]


def load(
    path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> HybridModel:
    """The model in a folder with config.json and safetensors, or a freshly drawn one for the name of a preset, in
    evaluation mode.

    dtype: of the weights; A_log, D, dt_bias and the routers' correction biases stay in at least fp32 whatever is asked.
    Raises Refusal for anything but a complete checkpoint of an architecture we compute, and when it cannot fit.
    """
    folder = Path(path)
    if not folder.is_dir():
        return draw(os.fspath(path), dtype, device)
    config = read_config(folder)
    model = build(config, "meta", dtype)
    files = weight_files(folder)
    found = read_headers(files)
    wanted = {piece.hub_name: piece for piece in all_pieces(model)}
    tied_head = found.pop("lm_head.weight", None) if config.tie_embeddings else None
    found = {name: entry for name, entry in found.items() if not name.endswith("rotary_emb.inv_freq")}
    check(folder, wanted, found)
    check_memory(str(folder), model, device)
    for module in model.modules():
        allocate(module, device, dtype)
    fill(model, wanted, files)
    if tied_head is not None:
        check_tied(model, tied_head.file)
    return model.eval()


def draw(name: str, dtype: torch.dtype, device: str | torch.device) -> HybridModel:
    """A preset with random weights."""
    if name not in PRESETS and not SIZE.fullmatch(name) and ":" not in name:
        known = f"a folder with {CONFIG} and safetensors, or a preset: {', '.join(nearest_first(name, PRESETS))}"
        raise Refusal(f"no folder and no preset called {name!r}", known, "check the path")
    config = preset(name)
    if isinstance(config, ShapeOnly):
        whole = [known for known, target in PRESETS.items() if ".shapes:" not in target]
        raise Refusal(f"{name} is a shape-only preset ({config.why})", ", ".join(whole), f"trimaran show {name}")
    check_memory(name, build(config, "meta", dtype), device)
    return build(config, device, dtype).eval()


def all_pieces(model: HybridModel) -> Iterator[Piece]:
    kind = model_type(model.config)
    for name, tensor in model.state_dict().items():
        yield from pieces(name, tuple(tensor.shape), kind)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that make up the checkpoint in `folder`."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if (folder / "tensors.json").is_file():  # see train/chunks
        step = f"trimaran convert --export {folder} OUT, and open OUT"
        raise Refusal(f"{folder} is a checkpoint of several processes, in pieces", "a hub folder", step)
    if not index.is_file():
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        found = f"only {pickles[0].name} (pickle) in {folder}" if pickles else f"no {WEIGHTS} or {INDEX} in {folder}"
        raise Refusal(found, "safetensors", "convert or fetch the checkpoint as safetensors")
    try:
        names = sorted(set(map(os.fspath, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (ValueError, KeyError, AttributeError, TypeError) as problem:
        raise Refusal(f"{index} is damaged ({problem!r})", "a weight_map", "fetch the file again") from None
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise Refusal(f"{len(absent)} of {len(names)} shards are not there: {listed(absent)}", "all", "fetch them")
    return [folder / name for name in names]


@dataclass(frozen=True)
class Entry:
    """One tensor as a file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    kind: str


def read_headers(files: list[Path]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for file in files:
        with opened(file) as shard:
            for name in shard.keys():  # noqa: SIM118 (not a mapping)
                if name in found:
                    raise Refusal(f"{name} is in {found[name].file.name} and {file.name}", "one of them", "remove one")
                part = shard.get_slice(name)
                found[name] = Entry(file, tuple(part.get_shape()), part.get_dtype())
    return found


def opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as problem:
        raise Refusal(f"{file} is truncated or corrupt ({problem})", "whole safetensors", "fetch it again") from None


def check(folder: Path, wanted: dict[str, Piece], found: dict[str, Entry]) -> None:
    """One refusal for everything that does not match."""
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    odd = []
    for name, entry in found.items():
        if name in wanted and entry.shape != wanted[name].shape:
            odd.append(f"{name} is {list(entry.shape)} instead of {list(wanted[name].shape)}")
        elif name in wanted and entry.kind not in FLOATS:
            odd.append(f"{name} holds {entry.kind}")
    if not missing and not unexpected and not odd:
        return
    kinds = (("missing", missing), ("unexpected", unexpected), ("misshapen", odd))
    told = "; ".join(f"{len(names)} tensors {kind}: {listed(names)}" for kind, names in kinds if names)
    raise Refusal(
        f"{folder}: {told}", f"exactly the {len(wanted)} tensors config.json implies", advice(missing, unexpected)
    )


def advice(missing: list[str], unexpected: list[str]) -> str:
    if missing and not unexpected and all(name.startswith("mtp.") for name in missing):
        return "the draft block was not saved: set num_nextn_predict_layers to 0 in config.json"
    if unexpected and not missing and all(name.startswith("mtp.") for name in unexpected):
        return "there is a draft block: set num_nextn_predict_layers to 1 in config.json"
    return "check that config.json and the safetensors belong together"


def listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


@torch.no_grad()
def fill(model: HybridModel, wanted: dict[str, Piece], files: list[Path]) -> None:
    """Copies each file's tensors into the model, one at a time."""
    targets = model.state_dict()
    for file in files:
        with opened(file) as shard:
            for name in shard.keys():  # noqa: SIM118
                piece = wanted.get(name)
                if piece is None:  # a tied head or a table of rotary frequencies
                    continue
                target = targets[piece.name]
                (target if piece.expert is None else target[piece.expert]).copy_(shard.get_tensor(name))


def check_tied(model: HybridModel, file: Path) -> None:
    """A tied checkpoint may repeat the embedding as its head, and nothing else."""
    embedding = model.backbone.embeddings.weight
    with opened(file) as shard:
        head = shard.get_tensor("lm_head.weight")
    if head.shape != embedding.shape or not torch.equal(head.to(embedding), embedding):
        raise Refusal(
            f"{file} has an lm_head.weight of its own but config.json ties it to the embedding",
            "one of the two",
            "set tie_word_embeddings to false",
        )


def check_memory(name: str, model: HybridModel, device: str | torch.device) -> None:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    free = free_bytes(torch.device(device))
    if free is not None and needed > free:
        raise Refusal(
            f"{name} needs {needed:,} bytes of weights on {device}",
            f"{free:,} bytes are free there",
            "use a smaller model, dtype=torch.bfloat16 or another device",
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on `device`; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    if device.type != "cpu" or not table.exists():
        return None
    lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


@dataclass(frozen=True)
class Saved:
    """What `save` wrote. `note` is empty when the hub knows the architecture."""

    folder: Path
    model_type: str
    files: list[str] = field(default_factory=list)
    bytes: int = 0
    note: str = ""


def save(
    model: HybridModel,
    path: str | os.PathLike[str],
    *,
    shard_bytes: int = 5_000_000_000,
    read: Callable[[Piece], Tensor] | None = None,
) -> Saved:
    """Writes config.json and the weights, in one file or in shards of at most `shard_bytes` with an index.

    read: gives each tensor's values when its shard is written, for a model on "meta"; None: the model's own.

    Everything is written beside the old files first and renamed at the end. A model that no hub architecture computes
    is saved as model_type `trimaran`, which only this library opens, and a warning says so. Raises Refusal when the
    folder cannot be written or the disk is full; the previous checkpoint is then untouched.
    """
    folder, config = Path(path), model.config
    check_savable(model)
    stage = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(f"{STAGING}*"):  # of a save that was killed
            shutil.rmtree(left_over)
        stage = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
        total = write_shards(model, stage, shard_bytes, read)
        write_synced(stage / CONFIG, dump_json(write_config(config, str(model.dtype).removeprefix("torch."))))
        files = swap_in(stage, folder)
    except (OSError, SafetensorError) as problem:
        raise Refusal(
            f"cannot write {folder} ({problem})",
            "a writable folder with room for the model",
            "free some space or save elsewhere; what was there before is untouched",
        ) from None
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
    kind, note = model_type(config), ""
    if kind == "trimaran":
        note = f"no hub architecture computes this model ({config.pattern}): {folder} opens in trimaran only"
        warnings.warn(note, stacklevel=2)
    return Saved(folder, kind, files, total, note)


def check_savable(model: HybridModel) -> None:
    """A rewritten model (quantised, with adapters) has other tensors than its config.json would promise."""
    plain, own = build(model.config, "meta").state_dict(), model.state_dict()
    differing = [name for name in {**plain, **own} if name not in plain or name not in own]
    differing += [name for name in plain if name in own and plain[name].shape != own[name].shape]
    if differing:
        raise Refusal(
            f"the model differs from its configuration in {len(differing)} tensors: {listed(differing)}",
            "the plain layers of the configuration",
            "merge or undo the rewrite before saving",
        )


def write_shards(
    model: HybridModel, stage: Path, shard_bytes: int, read: Callable[[Piece], Tensor] | None = None
) -> int:
    """Weights, and the index when there are several files. Returns the bytes of all tensors."""
    shards: list[list[tuple[Piece, Tensor]]] = [[]]
    sizes = [0]
    weights = model.state_dict()
    for piece in [*all_pieces(model), *repeated_head(model)]:
        tensor = weights[piece.name] if piece.expert is None else weights[piece.name][piece.expert]
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and sizes[-1] + size > shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append((piece, tensor))
        sizes[-1] += size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        values = ((piece, tensor if read is None else read(piece)) for piece, tensor in shard)
        tensors: dict[str, Tensor] = {piece.hub_name: tensor.cpu().contiguous() for piece, tensor in values}
        if "lm_head.weight" in tensors and model.config.tie_embeddings:
            tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()  # the format shares no memory
        save_file(tensors, stage / name, metadata={"format": "pt"})
        (stage / name).chmod(0o644)  # the library writes 0600, and hub folders are shared
        sync(stage / name)
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        write_synced(stage / INDEX, dump_json({"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}))
    return sum(sizes)


def repeated_head(model: HybridModel) -> list[Piece]:
    """The embedding once more as the head, for transformers, whose Nemotron-H never ties them (5.23)."""
    if not model.config.tie_embeddings or model_type(model.config) != "nemotron_h":
        return []
    name = "backbone.embeddings.weight"
    return [Piece("lm_head.weight", name, None, tuple(model.backbone.embeddings.weight.shape))]


def swap_in(stage: Path, folder: Path) -> list[str]:
    """Renames the staged files into place and removes what the old checkpoint leaves over.

    Killed in between, the folder opens as the old checkpoint or as the new one, or is refused; it is never a mixture.
    That is why the index goes first where new shards take the names of old ones, and why `load` prefers a single file.
    """
    names = sorted(file.name for file in stage.iterdir())
    stale = {file.name for file in folder.glob("model*.safetensors*")} - set(names)
    if INDEX in names and any((folder / name).exists() for name in names if name.startswith("model-")):
        (folder / INDEX).unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: (name == CONFIG, name == INDEX, name)):
        os.replace(stage / name, folder / name)
    for name in sorted(stale, key=lambda name: name != INDEX):
        (folder / name).unlink()
    sync(folder)
    return names


def write_synced(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    sync(file)
