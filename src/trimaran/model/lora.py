"""LoRA: frozen weights, and beside each chosen one two narrow maps that learn (Hu et al., arXiv 2106.09685).

    y = W x + alpha / rank * B A x         A [rank, in] drawn small, B [out, rank] zero: nothing changes at first

A rewrite over layer kinds: every linear map of the model has a kind, a target is the name of a kind or a glob over the
names of the maps, and a target that matches nothing is refused. Routers, norms, convolutions and the scan's own
parameters are no linear maps and stay as they are. The weights keep their names; `lora_A` and `lora_B` stand under
them, as peft names them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from trimaran.config import SHOWN, Settings
from trimaran.errors import Refusal, nearest_first
from trimaran.model.attention import Attention
from trimaran.model.feedforward import FeedForward
from trimaran.model.hybrid import Block, HybridModel
from trimaran.model.linear import Head, Linear, StackedLinear
from trimaran.model.mamba import Mamba
from trimaran.model.moe import Experts, MoE
from trimaran.ops.experts import Plan
from trimaran.ops.numbers import at_least_fp32

# The module that a linear map belongs to -> its kind. `eh_proj` alone belongs to a block: the draft block's own input.
KINDS: dict[type[nn.Module], str] = {
    Attention: "attention",
    Mamba: "mamba",
    FeedForward: "feedforward",
    MoE: "latent",
    Experts: "experts",
    Block: "draft",
    HybridModel: "head",
}
ALL = "all"  # every kind but the head


class LoraSettings(Settings):
    """Which maps get adapters, and of what size. `targets`: kinds of layers ("attention", "mamba", "feedforward",
    "latent", "experts", "shared", "draft", "head"; "all" is all but the head), or globs over names ("*.q_proj")."""

    rank: int = Field(16, gt=0)
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field((ALL,), min_length=1)


@dataclass(frozen=True)
class Touched:
    """What a rewrite touched: the names of the maps, and how many numbers learn of how many there are."""

    names: tuple[str, ...]
    trainable: int
    total: int

    def __str__(self) -> str:
        share = self.trainable / self.total
        return f"lora: {len(self.names)} maps, {self.trainable:,} of {self.total:,} parameters learn ({share:.1%})"


class LowRank(Linear):
    """A linear map with an adapter. The adapter is held in at least fp32, whatever the frozen weight is held in."""

    def __init__(self, plain: Linear, rank: int, scale: float, dropout: float = 0.0):
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight = plain.weight
        self.rank, self.scale, self.dropout = rank, scale, dropout
        with torch.device(plain.weight.device):
            down, up = Linear(self.in_features, rank), Linear(rank, self.out_features)
        self.lora_A, self.lora_B = down.to(wide(plain.weight)), up.to(wide(plain.weight))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        low = F.dropout(x.to(self.lora_A.weight.dtype), self.dropout, self.training)
        return y + self.lora_B(self.lora_A(low) * self.scale).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank {self.rank}"


class LowRankHead(Head, LowRank):
    """The head with an adapter; `Head.forward` holds the sum in at least fp32."""

    def __init__(self, plain: Head, rank: int, scale: float, dropout: float = 0.0):
        LowRank.__init__(self, plain, rank, scale, dropout)
        self.s_z = plain.s_z


class StackedLowRank(StackedLinear):
    """One linear map per expert, each with its own adapter: A [E, rank, in], B [E, out, rank]."""

    def __init__(self, plain: StackedLinear, rank: int, scale: float, dropout: float = 0.0):
        nn.Module.__init__(self)
        self.count, self.in_features, self.out_features = plain.count, plain.in_features, plain.out_features
        self.weight = plain.weight
        self.rank, self.scale, self.dropout = rank, scale, dropout
        with torch.device(plain.weight.device):
            down = StackedLinear(self.count, self.in_features, rank)
            up = StackedLinear(self.count, rank, self.out_features)
        self.lora_A, self.lora_B = down.to(wide(plain.weight)), up.to(wide(plain.weight))

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        y = super().forward(x, plan)
        low = F.dropout(x.to(self.lora_A.weight.dtype), self.dropout, self.training)
        return y + self.lora_B(self.lora_A(low, plan) * self.scale, plan).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank {self.rank}"


Adapted = LowRank | StackedLowRank


def wide(weight: Tensor) -> torch.dtype:
    """What the adapter of a weight is held in."""
    return torch.promote_types(weight.dtype, torch.float32)


def apply(model: HybridModel, settings: LoraSettings, seed: int = 0) -> Touched:
    """Freezes `model` and gives the maps that `settings.targets` names adapters, drawn from `seed`; in place.

    The outputs stay what they were, bit for bit. Raises Refusal, with the model untouched, for a target that matches
    nothing, a model that has adapters, and nGPT, whose matrices are put back on the sphere after every update.
    """
    check_plain(model)
    names = chosen(model, settings.targets)
    model.requires_grad_(False)
    generator = torch.Generator(model.device).manual_seed(seed)
    for name in names:
        adapter = adapt(model, name, settings.rank, settings.alpha / settings.rank, settings.dropout)
        bound = 1 / math.sqrt(adapter.in_features)  # peft's choice: uniform with the variance 1 / (3 in)
        nn.init.uniform_(adapter.lora_A.weight, -bound, bound, generator=generator)
        nn.init.zeros_(adapter.lora_B.weight)
    model.version += 1
    return touched(model)


def check_plain(model: HybridModel) -> None:
    """Refuses what cannot be adapted."""
    if adapted(model):
        raise Refusal("a model that has adapters", "one without", "merge them first: trimaran.model.lora.merge")
    for name, module in model.named_modules():
        if isinstance(module, (Linear, StackedLinear)) and type(module) not in (Linear, Head, StackedLinear):
            found = f"{name}, a {type(module).__name__}: an adapter would take its numbers away"
            raise Refusal(found, "plain linear maps", "adapt the model before it is rewritten, or load it again")
    if model.config.residual == "ngpt":
        step = "fine-tune all weights: leave the table lora out"
        raise Refusal("lora for a model of residual = 'ngpt'", "residual = 'prenorm'", step)


def adapt(model: HybridModel, name: str, rank: int, scale: float, dropout: float = 0.0) -> Adapted:
    """Puts an adapter, its numbers not yet set, beside the map called `name`; returns it."""
    plain: Any = model.get_submodule(name)
    kind = LowRankHead if isinstance(plain, Head) else LowRank if isinstance(plain, Linear) else StackedLowRank
    adapter = kind(plain, rank, scale, dropout).train(plain.training)
    replace(model, name, adapter)
    return adapter


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where `name` is in `model`."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)


def kinds(model: HybridModel) -> dict[str, str]:
    """The kind of every linear map, by its name. Adapters' own maps are none of the model's."""
    found = {}
    for name, module in model.named_modules():
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, (Linear, StackedLinear)) and not isinstance(owner, Adapted):
            found[name] = "shared" if name.split(".")[-2:-1] == ["shared_experts"] else KINDS[type(owner)]
    return found


def chosen(model: HybridModel, targets: Iterable[str]) -> list[str]:
    """Names of the maps that any target matches, in the model's order. Refuses a target that matches none."""
    known = kinds(model)
    found: set[str] = set()
    for target in targets:
        matched = {name for name, kind in known.items() if matches(target, name, kind)}
        if not matched:
            names = dict.fromkeys([ALL, *known.values(), *(f"*.{name.rpartition('.')[2]}" for name in known), *known])
            allowed = ", ".join(nearest_first(target, names)[:SHOWN])
            step = "name kinds of layers that this model has, or globs over the names of its maps"
            raise Refusal(f"lora target {target!r} matches nothing in {model.config.pattern}", allowed, step)
        found |= matched
    return [name for name in known if name in found]


def matches(target: str, name: str, kind: str) -> bool:
    """Whether a target is the kind, "all", or a glob over the whole name or its end."""
    if target in (*KINDS.values(), "shared", ALL):
        return target == kind or (target == ALL and kind != "head")
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")


def adapters(model: nn.Module) -> dict[str, Adapted]:
    """The maps with adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def adapted(model: nn.Module) -> bool:
    """Whether any map has an adapter."""
    return any(isinstance(module, Adapted) for module in model.modules())


def touched(model: HybridModel) -> Touched:
    """What has adapters now."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    learns = sum(size for size, trainable in sizes if trainable)
    return Touched(tuple(adapters(model)), learns, sum(size for size, _ in sizes))


@torch.no_grad()
def merge(model: HybridModel) -> Touched:
    """Adds every adapter to its weight and takes it away: a plain model again, all of which may learn; in place.

    W + alpha / rank B A is computed in at least fp32 and rounded once, to the weight's dtype.
    """
    found = adapters(model)
    if not found:
        raise Refusal("a model without adapters", "one that lora.apply has rewritten", "nothing is left to merge")
    done = touched(model)
    for name, module in found.items():
        weight = module.weight
        weight.copy_(at_least_fp32(weight) + module.scale * (module.lora_B.weight @ module.lora_A.weight))
        replace(model, name, without(module))
    model.requires_grad_(True)
    model.version += 1
    return done


def without(module: Adapted) -> Linear | StackedLinear:
    """The plain map with the same weight."""
    plain: Linear | StackedLinear
    with torch.device("meta"):
        if isinstance(module, StackedLowRank):
            plain = StackedLinear(module.count, module.in_features, module.out_features)
        else:
            kind = Head if isinstance(module, Head) else Linear
            plain = kind(module.in_features, module.out_features)
    plain.weight = module.weight
    return plain.train(module.training)
