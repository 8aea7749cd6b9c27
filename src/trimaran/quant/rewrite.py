"""The rewrite: a model in fp32 -> the same model whose linear maps compute in narrow numbers.

Kinds of maps are those of LoRA (attention, mamba, feedforward, latent, experts, shared, draft), and `mtp`, all of the
draft block. The head stays high, as does everything that is no linear map: embedding, norms, routers, convolutions, the
scan, attention's own products. Weights keep their names and values; what is saved is what would have been.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from trimaran.config import SHOWN
from trimaran.errors import Refusal, nearest_first
from trimaran.model.hybrid import HybridModel
from trimaran.model.linear import Linear, StackedLinear
from trimaran.model.lora import adapted, kinds, replace
from trimaran.quant.formats import MXFP8, NVFP4, Formats, FP8Blocks, FP8Tensor
from trimaran.quant.linear import Draws, Manner, NarrowLinear, NarrowStackedLinear
from trimaran.quant.settings import FormatSettings, Low

KINDS = ("attention", "mamba", "feedforward", "latent", "experts", "shared", "draft", "mtp")
NAMES: dict[type, str] = {FP8Tensor: "fp8", FP8Blocks: "fp8 in blocks", MXFP8: "mxfp8", NVFP4: "nvfp4"}
MTP = "mtp."  # what names in the draft block begin with


@dataclass(frozen=True)
class Touched:
    """What the rewrite touched: the maps by what they compute in, how many numbers those hold, and whose draws they
    make."""

    names: dict[str, str]
    high: tuple[str, ...]
    numbers: dict[str, int]
    draws: Draws = field(compare=False)

    def __str__(self) -> str:
        total = sum(self.numbers.values())
        parts = []
        for name in sorted({*self.names.values()}, reverse=True):
            count = sum(self.numbers[one] for one, narrow in self.names.items() if narrow == name)
            parts.append(f"{count / total:.0%} of the linear maps' weights in {name}")
        return f"precision: {', '.join(parts)}; {len(self.high)} maps and the head stay high"


def narrow(model: HybridModel, precision: Low, settings: FormatSettings | None = None, seed: int = 0) -> Touched:
    """Puts the linear maps of `model` into narrow numbers, in place; what stays high is as `settings` say.

    Raises Refusal, with the model untouched, for weights that are not fp32, adapters, a model rewritten before, a kind
    or name that matches nothing, and where every map would stay high.
    """
    settings = settings or FormatSettings()
    check_plain(model)
    kept = settings.kept(precision, len(model.config.pattern))
    maps = {name: kind for name, kind in kinds(model).items() if kind != "head"}
    # What a user names is to be there; what a preset names may be of another shape of model.
    high = chosen(model, maps, kept.high, "high", strict=settings.high is not None)
    high |= {name for name in maps if in_ends(name, kept.first, kept.blocks - kept.last)}
    mxfp8 = chosen(model, maps, kept.mxfp8, "mxfp8", strict=settings.mxfp8 is not None) - high
    low = [name for name in maps if name not in high]
    if not low:
        found = f"every linear map of {model.config.pattern} stays high"
        raise Refusal(found, f"some in {precision}", "lower first and last, or shorten high")
    draws, formats = Draws(seed), settings.formats(precision)
    numbers = {name: model.get_submodule(name).get_parameter("weight").numel() for name in maps}
    narrowed = {name: MXFP8() if name in mxfp8 else formats for name in low}
    for name, one in narrowed.items():
        put(model, name, one, draws)
    model.version += 1
    names = {name: NAMES[type(one)] for name, one in narrowed.items()}
    return Touched(names, tuple(name for name in maps if name in high), numbers, draws)


def put(model: HybridModel, name: str, formats: Formats, draws: Draws) -> None:
    """One map in narrow numbers in the place of the plain one."""
    plain = model.get_submodule(name)
    manner = Manner(NAMES[type(formats)], formats, draws, zlib.crc32(name.encode()))
    new: NarrowLinear | NarrowStackedLinear
    if isinstance(plain, StackedLinear):
        new = NarrowStackedLinear(plain, manner)
    else:
        assert isinstance(plain, Linear)
        new = NarrowLinear(plain, manner)
    replace(model, name, new.train(plain.training))


def check_plain(model: HybridModel) -> None:
    """Refuses what cannot be rewritten."""
    if adapted(model):
        found, step = "a model with adapters", "merge them first, or train them with train.precision = bf16"
        raise Refusal(found, "a model without", step)
    if any(isinstance(module, (NarrowLinear, NarrowStackedLinear)) for module in model.modules()):
        raise Refusal("a model in narrow numbers", "one in fp32", "load it again")
    wrong = next((one for name, one in model.named_parameters() if one.dtype != torch.float32), None)
    if wrong is not None:
        found = f"weights in {str(wrong.dtype).removeprefix('torch.')}"
        raise Refusal(found, "float32: the weights that learn stay whole", "load the model with dtype=torch.float32")


def in_ends(name: str, first: int, last: int) -> bool:
    """Whether a map belongs to a block of the trunk before `first`, or from `last` on."""
    parts = name.split(".")
    return parts[:2] == ["backbone", "layers"] and not first <= int(parts[2]) < last


def chosen(
    model: HybridModel, maps: dict[str, str], targets: Sequence[str], field_name: str, *, strict: bool
) -> set[str]:
    """Names of the maps that any target matches. strict: refuses a target that matches none."""
    found: set[str] = set()
    for target in targets:
        matched = {name for name, kind in maps.items() if matches(target, name, kind)}
        if not matched and strict:
            raise unmatched(model, maps, target, field_name)
        found |= matched
    return found


def matches(target: str, name: str, kind: str) -> bool:
    """Whether a target is the kind, the draft block that the map is in, or a glob over the name or its end."""
    if target in KINDS:
        return target == kind or (target == "mtp" and name.startswith(MTP))
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")


def unmatched(model: HybridModel, maps: dict[str, str], target: str, field_name: str) -> Refusal:
    here: Iterable[str] = [*maps.values(), *(["mtp"] if model.mtp is not None else [])]
    names = dict.fromkeys([*here, *(name.rpartition(".")[2] for name in maps), *maps])
    allowed = ", ".join(nearest_first(target, names)[:SHOWN])
    found = f"formats.{field_name} = {target!r} matches no linear map of {model.config.pattern}"
    return Refusal(found, allowed, "name kinds of layers that this model has, or globs over the names of its maps")
