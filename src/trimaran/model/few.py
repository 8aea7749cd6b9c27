"""Passes of a few tokens: as many neighbouring parts of a stack as know how, in one call of ops.native_stack.

Decoding is so short a work that starting its steps from Python takes as long as a small model's work itself. What the
kernel needs to know of a stack is read once (`Sight`), and every pass looks whether all that was read is still so. A
part that the kernel cannot do takes its ordinary steps: one with a module that has been rewritten (LoRA, quantisation,
sharding) or that somebody listens to with a hook, always; one whose memory says so, in that pass.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from trimaran.model.attention import Attention
from trimaran.model.feedforward import FeedForward
from trimaran.model.layout import Layout
from trimaran.model.linear import Linear, StackedLinear
from trimaran.model.mamba import CausalConv, Mamba
from trimaran.model.moe import Experts, MoE, Router
from trimaran.model.norm import GatedRMSNorm, RMSNorm
from trimaran.ops import native, native_stack
from trimaran.ops.native_stack import ATTENTION, MAMBA, MEMORY, WORDS, Norm, Part


class Sight:
    """What was read of modules, and whether it is all still so: kinds, hooks, attributes, and where tensors lie."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.modules: list[nn.Module] = []
        self.kinds: list[type] = []
        self.hooks: list[dict[int, Any]] = []
        self.listeners: list[int] = []
        self.tables: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.found: list[Any] = []
        self.tensors: list[Tensor] = []
        self.places: list[int] = []

    def still(self) -> bool:
        """Whether a second look would find the same."""
        return (
            all(map(is_, map(dict.get, self.tables, self.names), self.found))
            and list(map(Tensor.data_ptr, self.tensors)) == self.places
            and list(map(len, self.hooks)) == self.listeners
            and list(map(type, self.modules)) == self.kinds
        )

    def read(self, table: dict[str, Any], name: str) -> Any:
        found = table.get(name)
        self.tables.append(table)
        self.names.append(name)
        self.found.append(found)
        return found

    def value(self, module: nn.Module, name: str) -> Any:
        """An attribute that is no module and no tensor."""
        return self.read(module.__dict__, name)

    def plain(self, module: nn.Module, kind: type[nn.Module]) -> bool:
        """Whether it is of the kind itself, and nobody listens to it or has put another forward in its place."""
        self.modules.append(module)
        self.kinds.append(type(module))
        hooks: list[dict[int, Any]] = [module._forward_hooks, module._forward_pre_hooks]
        self.hooks += hooks
        self.listeners += map(len, hooks)
        return type(module) is kind and not any(hooks) and self.value(module, "forward") is None

    def child(self, owner: nn.Module, name: str, kind: type[nn.Module]) -> nn.Module | None:
        """A plain child, or None."""
        module = self.read(owner._modules, name)
        return module if module is not None and self.plain(module, kind) else None

    def lacks(self, owner: nn.Module, *names: str) -> bool:
        """Whether there are no such children."""
        return all(self.read(owner._modules, name) is None for name in names)

    def tensor(self, module: nn.Module, name: str, dtype: torch.dtype | None = None) -> Tensor | None:
        """A parameter or buffer that a kernel can read: on the CPU, contiguous, of the dtype."""
        table: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
        found = self.read(table, name)
        if found is None:
            return None
        self.tensors.append(found)
        self.places.append(found.data_ptr())
        right = found.is_cpu and found.is_contiguous() and found.dtype is (dtype or self.dtype)
        return found if right else None

    def weight(self, owner: nn.Module, name: str, kind: type[nn.Module] = Linear) -> Tensor | None:
        """The weight of a plain child, or None."""
        module = self.child(owner, name, kind)
        return None if module is None else self.tensor(module, "weight")

    def norm(self, module: nn.Module | None) -> Norm | None:
        """Of a plain norm."""
        weight = None if module is None else self.tensor(module, "weight")
        return None if module is None or weight is None else (weight, self.value(module, "eps"))


@dataclass(frozen=True)
class Join:
    """How a draft block begins: W [norm(embedding) ; norm(hidden vector)], three modules that `owner` holds."""

    owner: nn.Module

    def __call__(self, x_BTD: Tensor, hidden_BTD: Tensor | None) -> Tensor:
        own: Any = self.owner
        assert hidden_BTD is not None
        return own.eh_proj(torch.cat([own.enorm(x_BTD), own.hnorm(hidden_BTD)], -1))


def described(sight: Sight, part: object) -> Part | None:
    """What the kernel needs to know of a part; None: it cannot do that."""
    if isinstance(part, Join):
        norms = [sight.norm(sight.child(part.owner, name, RMSNorm)) for name in ("enorm", "hnorm")]
        weight = sight.weight(part.owner, "eh_proj")
        if norms[0] is None or norms[1] is None or weight is None:
            return None
        return native_stack.join(norms[0], norms[1], weight)
    assert isinstance(part, nn.Module)
    if type(part) is RMSNorm:
        norm = sight.norm(part) if sight.plain(part, RMSNorm) else None
        return None if norm is None else native_stack.norm(*norm)
    if not sight.plain(part, type(part)) or "mixer" not in part._modules:
        return None
    norm = sight.norm(sight.child(part, "norm", RMSNorm))
    mixer: Any = sight.read(part._modules, "mixer")
    if norm is None or type(mixer) not in MIXERS or not sight.plain(mixer, type(mixer)):
        return None
    return MIXERS[type(mixer)](sight, mixer, norm)


def ffn(sight: Sight, mixer: FeedForward, norm: Norm) -> Part | None:
    """Squared ReLU between two maps."""
    up, down = sight.weight(mixer, "up_proj"), sight.weight(mixer, "down_proj")
    if not sight.lacks(mixer, "gate_proj", "s_u") or up is None or down is None:
        return None
    return native_stack.ffn(norm, up, down)


def mamba(sight: Sight, mixer: Mamba, norm: Norm) -> Part | None:
    """Between its two maps all is the mixer's own."""
    into, out = sight.weight(mixer, "in_proj"), sight.weight(mixer, "out_proj")
    conv1d, gated = sight.child(mixer, "conv1d", CausalConv), sight.child(mixer, "norm", GatedRMSNorm)
    if not sight.lacks(mixer, "s_in") or into is None or out is None or conv1d is None or gated is None:
        return None
    filters, scale, same = sight.tensor(conv1d, "weight"), sight.norm(gated), sight.value(gated, "groups")
    biased = conv1d._parameters.get("bias") is not None
    bias = sight.tensor(conv1d, "bias") if biased else None
    scalars = [t for name in ("A_log", "D", "dt_bias") if (t := sight.tensor(mixer, name, torch.float32)) is not None]
    if filters is None or scale is None or (biased and bias is None) or len(scalars) < 3:
        return None
    if same != mixer.groups or mixer.size % native.LANES:
        return None
    return native_stack.mamba(norm, into, out, mixer.heads, mixer.groups, mixer.size, filters, bias, scalars, scale)


def attention(sight: Sight, mixer: Attention, norm: Norm) -> Part | None:
    """Without positions and without norms of queries and keys."""
    weights = [w for name in "qkvo" if (w := sight.weight(mixer, f"{name}_proj")) is not None]
    window, scale = sight.value(mixer, "window"), sight.value(mixer, "scale")
    if len(weights) < 4 or not sight.lacks(mixer, "q_norm", "s_qk"):
        return None
    if sight.value(mixer, "rotary") or mixer.head_dim % native.LANES:
        return None
    return native_stack.attention(norm, weights, mixer.heads, mixer.groups, window, scale)


def moe(sight: Sight, mixer: MoE, norm: Norm) -> Part | None:
    """Sigmoid router without groups, relu^2 experts, latent space and shared expert where there are."""
    gate, experts = sight.child(mixer, "gate", Router), sight.child(mixer, "experts", Experts)
    if gate is None or experts is None or not sight.lacks(experts, "gate_proj"):
        return None
    config = sight.value(gate, "config")
    if config.router != "sigmoid" or config.n_group != config.topk_group:
        return None
    router, bias = sight.tensor(gate, "weight"), sight.tensor(gate, "e_score_correction_bias", torch.float32)
    up, down = (sight.weight(experts, name, StackedLinear) for name in ("up_proj", "down_proj"))
    if router is None or bias is None or up is None or down is None:
        return None
    latent: tuple[Tensor | None, Tensor | None] = (None, None)
    shared: tuple[Tensor | None, Tensor | None] = (None, None)
    if not sight.lacks(mixer, "fc1_latent_proj", "fc2_latent_proj"):
        latent = sight.weight(mixer, "fc1_latent_proj"), sight.weight(mixer, "fc2_latent_proj")
        if latent[0] is None or latent[1] is None:
            return None
    if not sight.lacks(mixer, "shared_experts"):
        own = sight.child(mixer, "shared_experts", FeedForward)
        if own is None or not sight.lacks(own, "gate_proj", "s_u"):
            return None
        shared = sight.weight(own, "up_proj"), sight.weight(own, "down_proj")
        if shared[0] is None or shared[1] is None:
            return None
    k, rule = config.num_experts_per_tok, (config.norm_topk_prob, config.routed_scaling_factor)
    return native_stack.moe(norm, (router, bias), latent, (up, down), shared, k, *rule)


MIXERS: dict[type, Callable[[Sight, Any, Norm], Part | None]] = {
    FeedForward: ffn,
    Mamba: mamba,
    Attention: attention,
    MoE: moe,
}


@dataclass(frozen=True)
class Known:
    """A stack as the kernel sees it: its parts, what was seen of them, and their words one after the other."""

    parts: list[Any]
    mixers: list[Any]  # of those parts that are blocks
    sight: Sight
    known: list[Part | None]
    words: "array[int]"
    room: int
    inner: int


def know(parts: list[Any], dtype: torch.dtype) -> Known:
    """Looks at every part."""
    sight = Sight(dtype)
    known = [described(sight, part) for part in parts]
    words = array("q", [word for part in known for word in ([0] * WORDS if part is None else part.words)])
    some = [part for part in known if part is not None]
    room, inner = max((part.room for part in some), default=0), max((part.inner for part in some), default=0)
    return Known(parts, [getattr(part, "mixer", None) for part in parts], sight, known, words, room, inner)


@dataclass
class Pass:
    """What one pass brings to the words: memories, and trials to be noted when it is over."""

    x_BTD: Tensor
    rows: int
    layout: Layout
    keys: int
    words: "array[int]"
    slots: native.Slots | None = None
    at: native.Table | None = None
    partial: int = 0
    trials: list[tuple[Any, native_stack.Tried]] = field(default_factory=list)

    def takes(self, index: int, part: Part, mixer: Any, memory: Any) -> bool:
        """Whether the kernel can do the part in this pass; its words are whole then."""
        if self.rows > part.most:
            return False
        kind = part.words[0]
        own: list[int] | None = []
        if kind == MAMBA:
            own = None if memory is None else self.mamba(mixer, memory)
        elif kind == ATTENTION:
            own = None if memory is None else self.attention(part, mixer, memory)
        if own is None:
            return False
        if own:
            first = index * WORDS + MEMORY
            self.words[first : first + len(own)] = array("q", own)
        return True

    def mamba(self, mixer: Mamba, memory: Any) -> list[int] | None:
        """The words of its memory, where that holds one token, or a short trial, of documents that are alike."""
        slots: native.Slots | None = memory.slots(self.layout)
        if slots is None or slots.ssm_SHPN.dtype is not torch.float32 or slots.tail_SWC.dtype is not self.x_BTD.dtype:
            return None
        whole = slots.tail_SWC.stride()[1:] == (mixer.conv_width, 1)
        if not whole or slots.ssm_SHPN.stride()[1:] != (mixer.head_dim * mixer.size, mixer.size, 1):
            return None
        if self.slots is not None and not alike(self.slots, slots):
            return None
        self.slots, after, window = slots, None, None
        if slots.trial:
            count, tokens = slots.documents, slots.tokens
            after = slots.ssm_SHPN.new_empty(tokens, count, *slots.ssm_SHPN.shape[1:])
            window = self.x_BTD.new_empty(count, slots.tail_SWC.shape[1] + tokens, mixer.conv_width)
            self.trials.append((memory, native_stack.Tried(slots, window, after)))
        return native_stack.mamba_memory(slots, after, window)

    def attention(self, part: Part, mixer: Attention, memory: Any) -> list[int] | None:
        """The words of its memory, where few queries read rows of their own."""
        reach: native.Reach | None = memory.reach(self.layout, self.keys, mixer.window)
        if reach is None or reach.at.most * (mixer.heads // mixer.groups) > native.MOST_QUERIES:
            return None
        if reach.k_XGK.dtype is not self.x_BTD.dtype or (self.at is not None and self.at is not reach.at):
            return None
        self.at = reach.at
        words = native_stack.attention_memory(reach, mixer.groups, mixer.window)
        self.partial = max(self.partial, part.partial * reach.at.sequences * words[-1])
        return words


def alike(one: native.Slots, other: native.Slots) -> bool:
    """Whether one list of slots serves both."""
    return (
        one.slots_S is other.slots_S and one.documents == other.documents and one.tokens == other.tokens
    ) and one.trial == other.trial


class Few:
    """Runs a stack's passes of few tokens. It keeps addresses, which no copy of the stack takes along."""

    def __init__(self) -> None:
        self.known: Known | None = None

    def __reduce__(self) -> tuple[type["Few"], tuple[()]]:
        return Few, ()

    def know(self, parts: list[Any], x_BTD: Tensor, beside_BTD: Tensor | None = None) -> Known | None:
        """The stack as the kernel sees it; None where there is nothing for a kernel in this pass."""
        if x_BTD.numel() > native.ROWS * x_BTD.shape[-1] or not native.runs("native.blocks", x_BTD):
            return None
        if torch.is_autocast_enabled("cpu") or _has_any_global_hook() or not x_BTD.numel():
            return None
        if beside_BTD is not None and beside_BTD.dtype is not x_BTD.dtype:
            return None
        known = self.known
        same = known is not None and parts == known.parts and known.sight.dtype is x_BTD.dtype
        if known is None or not same or not known.sight.still():
            self.known = known = know(parts, x_BTD.dtype)
        return known

    def run(
        self,
        known: Known,
        x_BTD: Tensor,
        layout: Layout,
        memories: Sequence[Any],
        keys: int,
        beside_BTD: Tensor | None,
        step: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        """The stream after all parts. memories: of each part; step: takes a part's ordinary steps."""
        rows = layout.batch * layout.length
        own = Pass(x_BTD, rows, layout, keys, known.words[:])
        beside_BTD = None if beside_BTD is None else beside_BTD.contiguous()
        takes = [
            part is not None and own.takes(index, part, known.mixers[index], memories[index])
            for index, part in enumerate(known.known)
        ]
        scratch, index = native_stack.Scratch(rows * known.room + own.partial, known.inner), 0
        while index < len(takes):
            if not takes[index]:
                x_BTD, index = step(index, x_BTD), index + 1
                continue
            first, index = index, takes.index(False, index) if False in takes[index:] else len(takes)
            x_BTD = x_BTD.contiguous()
            x_BTD = native_stack.stack(x_BTD, beside_BTD, own.words, first, index, scratch, own.slots, own.at)
        for memory, tried in own.trials:
            memory.tried(tried)
        return x_BTD
