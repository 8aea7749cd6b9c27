"""Tensor and sequence parallel: layers cut along heads and widths, the residual stream along the tokens.

Between mixers a process has its own T / tp tokens of every row. A mixer gathers all tokens on entry and works on its
own heads or channels of all of them; its outputs are partial sums, added up and cut along the tokens on leaving. Norms,
routers and experts see a process's own tokens alone, with whole weights.

    M          heads, and the groups of B and C: rows of in_proj in five pieces (z, x, B, C, dt), channels of the
               convolution, A_log, D, dt_bias, the gated norm's groups; columns of out_proj
    * R W      query heads, key-value heads; columns of o_proj. With fewer key-value heads than processes, k and v stay
               whole and a process reads the rows of the one head that its queries look at
    -, shared  channels of up and gate; columns of down
    ends       rows of embedding and head (see vocabulary.py); the final norm's outputs are gathered
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trimaran.errors import Refusal
from trimaran.model.attention import Attention
from trimaran.model.feedforward import FeedForward
from trimaran.model.hybrid import HybridModel
from trimaran.model.linear import Linear
from trimaran.model.mamba import Mamba
from trimaran.model.moe import MoE
from trimaran.parallel.collectives import gather, scatter_sum
from trimaran.parallel.places import Cut
from trimaran.parallel.stages import Elsewhere
from trimaran.parallel.vocabulary import CutEmbedding, stretch
from trimaran.parallel.world import World

Spans = tuple[tuple[int, int], ...]


class Knife:
    """Cuts parameters and notes what was left: by parameter in `cuts`, by module in `units` (what fsdp gathers at
    once)."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.cuts: dict[int, Cut] = {}  # id of the parameter that is left -> what it is of the whole
        self.units: list[list[nn.Module]] = []

    def each(self, what: str, count: int) -> int:
        """`count` things over all processes. Raises Refusal where they do not divide."""
        if count % self.size:
            found = f"{what} = {count} for parallel.tp = {self.size}"
            raise Refusal(found, f"a multiple of {self.size}", "choose a tp that divides it")
        return count // self.size

    def own(self, each: int, start: int = 0) -> tuple[int, int]:
        """This process's stretch of things that begin at `start`."""
        return start + self.rank * each, start + (self.rank + 1) * each

    def keep(self, module: nn.Module, name: str, dim: int, spans: Spans) -> None:
        """Leaves the module's parameter `name` these stretches of `dim`."""
        whole = getattr(module, name)
        pieces = [whole.detach().narrow(dim, start, stop - start) for start, stop in spans]
        left = nn.Parameter(torch.cat(pieces, dim).contiguous(), requires_grad=whole.requires_grad)
        setattr(module, name, left)
        self.cuts[id(left)] = Cut(tuple(whole.shape), dim, spans)

    def keep_rows(self, module: Any, *spans: tuple[int, int]) -> None:
        """Leaves a Linear these outputs."""
        self.keep(module, "weight", 0, spans)
        module.out_features = len(module.weight)

    def keep_columns(self, module: Any, *spans: tuple[int, int]) -> None:
        """Leaves a Linear these inputs: its outputs become partial sums."""
        self.keep(module, "weight", 1, spans)
        module.in_features = module.weight.shape[1]


def cut_layers(model: HybridModel, world: World) -> tuple[dict[str, Cut], list[list[nn.Module]]]:
    """Leaves this process its part of every layer of `model`, in place.

    Returns what is left of the parameters that were cut, by name, and the modules that hold them, as fsdp is to gather
    them. Raises Refusal where heads, groups, widths or vocabulary do not divide.
    """
    knife = Knife(world.group("tp"))
    blocks = [*model.backbone.layers, *(model.mtp.layers if model.mtp is not None else ())]
    for block in blocks:
        if not isinstance(block, Elsewhere):
            cut_mixer(knife, block.mixer)
    cut_ends(knife, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[key]: cut for key, cut in knife.cuts.items()}, knife.units


def cut_mixer(knife: Knife, mixer: nn.Module) -> None:
    """By its kind; with the exchanges in front and behind."""
    if isinstance(mixer, MoE):
        if mixer.shared_experts is not None:
            cut_feedforward(knife, mixer.shared_experts)
            exchange(knife.group, mixer.shared_experts, 0)
        return
    if isinstance(mixer, Mamba):
        cut_mamba(knife, mixer)
    elif isinstance(mixer, Attention):
        cut_attention(knife, mixer)
    else:
        assert isinstance(mixer, FeedForward)
        cut_feedforward(knife, mixer)
    exchange(knife.group, mixer, 1)


def exchange(group: dist.ProcessGroup, mixer: nn.Module, dim: int) -> None:
    """All tokens on entry, this process's on leaving; tokens lie along `dim`."""

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return gather(inputs[0], group, dim), *inputs[1:]

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return scatter_sum(output, group, dim)

    mixer.register_forward_pre_hook(enter)
    mixer.register_forward_hook(leave)


def cut_mamba(knife: Knife, mixer: Mamba) -> None:
    """Heads and groups."""
    heads, groups = knife.each("mamba_num_heads", mixer.heads), knife.each("n_groups", mixer.groups)
    width, all_groups = mixer.width, mixer.groups * mixer.size
    own_width, own_groups = width // knife.size, groups * mixer.size

    def convolved(start: int) -> Spans:
        """x, B and C, of which x begins at `start`."""
        x, b, c = start, start + width, start + width + all_groups
        return knife.own(own_width, x), knife.own(own_groups, b), knife.own(own_groups, c)

    rows = (knife.own(own_width), *convolved(width), knife.own(heads, width + mixer.conv_width))
    knife.keep_rows(mixer.in_proj, *rows)
    if mixer.s_in is not None:
        knife.keep(mixer.s_in, "weight", 0, rows)
    knife.keep(mixer.conv1d, "weight", 0, convolved(0))
    if mixer.conv1d.bias is not None:
        knife.keep(mixer.conv1d, "bias", 0, convolved(0))
    for name in ("A_log", "D", "dt_bias"):
        knife.keep(mixer, name, 0, (knife.own(heads),))
    knife.keep(mixer.norm, "weight", 0, (knife.own(own_width),))
    knife.keep_columns(mixer.out_proj, knife.own(own_width))
    mixer.heads, mixer.groups, mixer.norm.groups = heads, groups, groups
    mixer.width, mixer.conv_width = own_width, own_width + 2 * own_groups
    knife.units.append([mixer])


class SomeRows(Linear):
    """A linear map that stays whole, of which a process reads the outputs [first, last) alone."""

    def __init__(self, whole: Linear, first: int, last: int):
        nn.Module.__init__(self)  # not Linear's, which would make another weight
        self.in_features, self.out_features, self.first, self.last = whole.in_features, last - first, first, last
        self.weight = whole.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[self.first : self.last])


def cut_attention(knife: Knife, mixer: Attention) -> None:
    """Query heads and key-value heads."""
    heads, groups, size = knife.each("num_attention_heads", mixer.heads), mixer.groups, mixer.head_dim
    cut: list[nn.Module] = [mixer.q_proj, mixer.o_proj]
    knife.keep_rows(mixer.q_proj, knife.own(heads * size))
    knife.keep_columns(mixer.o_proj, knife.own(heads * size))
    if groups % knife.size == 0:
        for proj in (mixer.k_proj, mixer.v_proj):
            knife.keep_rows(proj, knife.own(groups // knife.size * size))
            cut.append(proj)
        if mixer.s_qk is not None:
            knife.keep(mixer.s_qk, "weight", 0, (knife.own(groups // knife.size * size),))
            cut.append(mixer.s_qk)
        mixer.groups = groups // knife.size
    elif knife.size % groups == 0 and mixer.s_qk is None:
        first = knife.rank * groups // knife.size * size
        mixer.k_proj, mixer.v_proj = (SomeRows(one, first, first + size) for one in (mixer.k_proj, mixer.v_proj))
        mixer.groups = 1
    else:
        found = f"num_key_value_heads = {groups} for parallel.tp = {knife.size}"
        allowed = "a multiple of tp" + ("" if mixer.s_qk is not None else ", or a divisor of it")
        raise Refusal(found, allowed, "choose another tp")
    mixer.heads = heads
    knife.units.append(cut)


def cut_feedforward(knife: Knife, mixer: FeedForward) -> None:
    """Channels."""
    own = knife.own(knife.each("a feed-forward's width", mixer.up_proj.out_features))
    knife.keep_rows(mixer.up_proj, own)
    if mixer.gate_proj is not None:
        knife.keep_rows(mixer.gate_proj, own)
    for scale in (mixer.s_u, mixer.s_v):
        if scale is not None:
            knife.keep(scale, "weight", 0, (own,))
    knife.keep_columns(mixer.down_proj, own)
    knife.units.append([mixer])


def cut_ends(knife: Knife, model: HybridModel) -> None:
    """Embedding and head by vocabulary; all tokens behind the final norms, own tokens where the draft block reads."""
    group, embeddings = knife.group, model.backbone.embeddings
    own_ids = stretch(model.config.vocab_size, group)
    span = (own_ids.first, own_ids.last)
    if not isinstance(embeddings, Elsewhere):
        knife.keep(embeddings, "weight", 0, (span,))
        model.backbone.embeddings = CutEmbedding(own_ids, model.config.vocab_size, embeddings.weight)
    if not model.ends:
        return
    if not model.config.tie_embeddings:
        model.lm_head.stretch = own_ids
        knife.keep_rows(model.lm_head, span)
        if model.lm_head.s_z is not None:
            knife.keep(model.lm_head.s_z, "weight", 0, (span,))

    def all_ids(module: nn.Module, inputs: tuple[Any, ...], logits_BTV: Tensor) -> Tensor:
        each = -(-model.config.vocab_size // knife.size)  # the last process may have fewer
        padded_BTV = F.pad(logits_BTV, (0, each - logits_BTV.shape[-1]))
        return gather(padded_BTV, group, 2)[..., : model.config.vocab_size]

    def behind(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return gather(output, group, 1)

    def own(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].chunk(knife.size, 1)[knife.rank],)

    model.register_forward_hook(all_ids)  # of model(tokens); the loss asks for `hidden`, and the head for its own
    model.backbone.norm_f.register_forward_hook(behind)
    if model.mtp is not None:
        first, last = model.mtp.ends()
        first.hnorm.register_forward_pre_hook(own)
        last.final_layernorm.register_forward_hook(behind)
