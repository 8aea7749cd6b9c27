"""Adapters in and out, in peft's layout: adapter_config.json and adapter_model.safetensors.

    base_model.model.<the hub's name of the map>.lora_A.weight [rank, in]      .lora_B.weight [out, rank]

The hub's names, one entry per expert, as checkpoints have them: peft and vLLM rename those of Nemotron-H on reading.
Our own files also hold a fingerprint of the frozen weights, so that a run is never resumed on other ones.
"""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimaran.errors import Refusal, nearest_first, writing
from trimaran.model.dialects import model_type
from trimaran.model.hub import listed
from trimaran.model.hybrid import HybridModel
from trimaran.model.lora import Adapted, Touched, adapt, adapters, check_plain, kinds, touched
from trimaran.model.names import pieces

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
SAMPLED = 4096  # numbers of each frozen weight that its fingerprint looks at: other weights differ nearly everywhere
# Switches of peft that change what the tensors mean, and the values for which they mean what is written above.
MEANING: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None, []),
}


@dataclass(frozen=True)
class Part:
    """One pair of tensors of a file: `expert` is the place in a stack, None for a map of its own."""

    module: str
    expert: int | None
    hub_name: str


def parts(model: HybridModel, names: Mapping[str, Any]) -> Iterator[Part]:
    """The pairs of tensors that stand for the adapters of the maps called `names`."""
    for name in names:
        module: Any = model.get_submodule(name)
        for piece in pieces(f"{name}.weight", tuple(module.weight.shape), model_type(model.config)):
            yield Part(name, piece.expert, piece.hub_name.removesuffix(".weight"))


def save(model: HybridModel, folder: str | Path, base: str | None = None) -> Path:
    """Writes the adapters of `model` as a folder that peft opens; `base` names the model that they belong to.

    Tensors are as held, in at least fp32. Raises Refusal for a model without adapters and for a full disk.
    """
    folder, found = Path(folder), adapters(model)
    if not found:
        raise Refusal("a model without adapters", "one that lora.apply has rewritten", "save the model itself")
    tensors: dict[str, Tensor] = {}
    for part in parts(model, found):
        for letter, own in tensors_of(found[part.module]).items():
            tensor = own if part.expert is None else own[part.expert]
            tensors[f"{PREFIX}{part.hub_name}.lora_{letter}.weight"] = tensor.detach().cpu().contiguous()
    metadata = {"format": "pt", "frozen": fingerprint(model)}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps(peft_config(model, base), indent=2, sort_keys=True)
        (folder / CONFIG).write_text(config + "\n", encoding="utf-8")
        try:
            save_file(tensors, folder / WEIGHTS, metadata=metadata)
        except SafetensorError as problem:  # how that library reports a full disk
            step = "free some space"
            raise Refusal(f"cannot write {folder / WEIGHTS} ({problem})", "a disk with free space", step) from None
        (folder / WEIGHTS).chmod(0o644)  # the library writes 0600, and hub folders are shared
    return folder


def tensors_of(module: Adapted) -> dict[str, Tensor]:
    return {"A": module.lora_A.weight, "B": module.lora_B.weight}


def peft_config(model: HybridModel, base: str | None) -> dict[str, Any]:
    """What peft has to know. One rank and alpha for all, and patterns for the maps that differ.

    Targets leave out the first word of a name, which transformers renames (backbone -> model): peft compares ends.
    """
    found = adapters(model)
    sizes = {part.hub_name: found[part.module] for part in parts(model, found)}
    usual = next(iter(sizes.values()))
    ranks = {re.escape(tail(name)): one.rank for name, one in sizes.items() if one.rank != usual.rank}
    alphas = {
        re.escape(tail(name)): one.scale * one.rank
        for name, one in sizes.items()
        if one.scale * one.rank != usual.scale * usual.rank
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": usual.rank,
        "lora_alpha": usual.scale * usual.rank,
        "lora_dropout": usual.dropout,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": sorted(map(tail, sizes)),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
    }


def tail(name: str) -> str:
    """A hub name without the trunk's own word; names of the draft block stay whole."""
    return re.sub(r"^(backbone|model)\.", "", name)


def fingerprint(model: HybridModel) -> str:
    """Of all that is frozen: buffers, and some numbers of every parameter that does not learn."""
    value = 0
    for name, tensor in model.state_dict().items():
        if ".lora_A." not in name and ".lora_B." not in name:
            flat = tensor.detach().flatten()
            seen = flat[:: max(1, len(flat) // SAMPLED)].double().cpu().numpy()
            value = zlib.crc32(seen.tobytes(), zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def load(model: HybridModel, folder: str | Path) -> Touched:
    """Gives a plain `model` the adapters in a folder, ours or peft's; in place, everything else frozen.

    Raises Refusal, with the model untouched, for tensors that the model has no place for, and for what is not LoRA as
    written above (DoRA, biases, adapted embeddings or stacked parameters, modules saved whole).
    """
    check_plain(model)
    folder = Path(folder)
    settings, tensors = read_config(folder), read_tensors(folder, model)
    wanted = {part.hub_name: part for part in parts(model, kinds(model))}
    strangers = [name for name in tensors if name not in wanted]
    if strangers:
        found = f"{folder}: {len(strangers)} adapters for maps that the model has not: {listed(strangers)}"
        raise Refusal(found, ", ".join(nearest_first(strangers[0], wanted)[:3]), "load the base it was trained on")
    shapes = {name: check_shapes(folder, name, tensors[name], model, wanted[name]) for name in tensors}
    plan: dict[str, tuple[int, float]] = {}
    for name, rank in shapes.items():
        module, size = wanted[name].module, (rank, scale_of(settings, name, rank))
        if plan.setdefault(module, size) != size:
            raise Refusal(f"{folder}: experts of {module} differ in rank or alpha", "one for all", "retrain it")
    absent = [part.hub_name for part in parts(model, plan) if part.hub_name not in tensors]
    if absent:
        raise Refusal(f"{folder}: {len(absent)} experts without: {listed(absent)}", "all of a layer or none", "retrain")
    model.requires_grad_(False)
    for module, (rank, scale) in plan.items():
        adapt(model, module, rank, scale, float(settings.get("lora_dropout") or 0.0))
    fill(model, tensors)
    return touched(model)


def restore(model: HybridModel, folder: str | Path) -> None:
    """Sets the adapters that `model` has to those in a folder which it wrote. Refuses another base or other maps."""
    folder = Path(folder)
    with opened(folder / WEIGHTS) as file:
        frozen = (file.metadata() or {}).get("frozen")
    if frozen != fingerprint(model):
        found = f"{folder} holds adapters of other frozen weights"
        raise Refusal(found, "the model that the run began with", "put the folder `start` back as it was")
    tensors = read_tensors(folder, model)
    wanted = {part.hub_name: part for part in parts(model, adapters(model))}
    differing = sorted(set(wanted) ^ set(tensors))
    if differing:
        raise Refusal(f"{folder}: other adapters than the model's: {listed(differing)}", "the same", "resume as begun")
    for name, part in wanted.items():
        check_shapes(folder, name, tensors[name], model, part)
    fill(model, tensors)


@torch.no_grad()
def fill(model: HybridModel, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    found = adapters(model)
    for part in parts(model, found):
        for letter, own in tensors_of(found[part.module]).items():
            (own if part.expert is None else own[part.expert]).copy_(tensors[part.hub_name][letter])
    model.version += 1


def read_config(folder: Path) -> dict[str, Any]:
    """peft's settings; refused where they give the tensors another meaning."""
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise Refusal(f"no {CONFIG} in {folder}", f"a folder with {CONFIG} and {WEIGHTS}", "name another") from None
    except ValueError as problem:
        raise Refusal(f"{folder / CONFIG} is damaged ({problem})", "JSON", "fetch the file again") from None
    for name, allowed in MEANING.items():
        if settings.get(name, allowed[0]) not in allowed:
            found = f"{folder}: {name} = {settings[name]!r}"
            raise Refusal(found, f"{allowed[0]!r}", "train a plain LoRA, or merge it where it was trained")
    return dict(settings)


def read_tensors(folder: Path, model: HybridModel) -> dict[str, dict[str, Tensor]]:
    """{hub name of a map: {"A": tensor, "B": tensor}}."""
    found: dict[str, dict[str, Tensor]] = {}
    with opened(folder / WEIGHTS) as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            match = KEY.fullmatch(key)
            if match is not None and not match[1].endswith((".experts", ".base_layer")):
                found.setdefault(match[1], {})[match[2]] = file.get_tensor(key)
            elif not repeats(key, file.get_tensor(key), model):
                allowed = "base_model.model.NAME.lora_A.weight and .lora_B.weight, one pair for each map or expert"
                raise Refusal(f"{folder}: {key}", allowed, "train it with target_modules that are linear maps")
    odd = [name for name, pair in found.items() if len(pair) != 2]
    if odd or not found:
        raise Refusal(f"{folder}: {listed(odd) or 'no adapters'}", "A and B of each map", "fetch the file again")
    return {re.sub(r"^model\.(?=layers\.\d+\.mixer\.)", "backbone.", name): pair for name, pair in found.items()}


def repeats(key: str, tensor: Tensor, model: HybridModel) -> bool:
    """Whether a tensor is the model's own head or embedding, which peft saves beside the adapter of a head."""
    ends: dict[str, Any] = {"lm_head.base_layer.weight": model.head, "lm_head.weight": model.head}
    ends |= dict.fromkeys(("embeddings.weight", "embed_tokens.weight"), model.backbone.embeddings)
    owner = next((owner for end, owner in ends.items() if key.endswith(f".{end}")), None)
    own = getattr(owner, "weight", None)
    return own is not None and own.shape == tensor.shape and torch.equal(own, tensor.to(own))


def opened(file: Path) -> safe_open:
    """A safetensors file for reading; Refusal where it is missing or damaged."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as problem:
        raise Refusal(f"{file} cannot be read ({problem})", "whole safetensors", "fetch it again") from None


def check_shapes(folder: Path, name: str, pair: Mapping[str, Tensor], model: HybridModel, part: Part) -> int:
    """The rank of a pair; refused where it does not fit the map."""
    module: Any = model.get_submodule(part.module)
    rank = int(getattr(module, "rank", len(pair["A"])))
    shapes = [list(pair[letter].shape) for letter in "AB"]
    wanted = [[rank, module.in_features], [module.out_features, rank]]
    if shapes != wanted:
        raise Refusal(f"{folder}: {name} is {shapes}", f"{wanted}", "load the base it was trained on")
    return rank


def scale_of(settings: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / rank of a map, or alpha / sqrt(rank) where peft's `use_rslora` says so; patterns as peft matches them."""
    spellings = {name, name.replace("backbone.", "model.", 1)}
    alpha = settings.get("lora_alpha", 8)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", one) for one in spellings):
            alpha = value
            break
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)
