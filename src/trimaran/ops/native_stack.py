"""Stacks of residual blocks for a few tokens in one call (ops/kernels/stack.h): the words that the kernel reads.

Each part of a stack is a list of 64-bit words, addresses and sizes in the kernel's order: `ffn`, `mamba`, `attention`
and `moe` are blocks, y = x + mixer(norm(x)); `join` and `norm` stand at the ends of some stacks. What a pass brings
besides, the memories of `mamba` and `attention`, has words of its own. Addresses are only as good as the tensors they
were taken from: who keeps words keeps the tensors too, and looks whether they are still where they were.
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimaran.ops.native import MOST_CHOICES, MOST_TOKENS, ROWS, TURNED, Reach, Slots, Table, function

Norm = tuple[Tensor, float]  # weight [D] and epsilon
WORDS, MEMORY = 32, 24  # of a part; the first of those that a pass brings
FFN, MAMBA, ATTENTION, MOE, JOIN, NORM = range(6)


@dataclass(frozen=True)
class Part:
    """What never changes of a part. room: numbers of scratch per row; inner: the widest input of its maps; most: rows
    that it takes; partial: numbers of scratch for each piece of each sequence's keys."""

    words: list[int]
    room: int
    inner: int
    most: int = ROWS
    partial: int = 0


def real(number: float) -> int:
    """The bits of a double, as a word."""
    return struct.unpack("q", struct.pack("d", number))[0]


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def part(
    kind: int,
    norm: Norm,
    words: Sequence[int],
    room: int,
    inner: int,
    most: int = ROWS,
    partial: int = 0,
) -> Part:
    """norm: of what the part begins with."""
    own = [kind, norm[0].data_ptr(), real(norm[1]), *words]
    assert len(own) <= MEMORY
    return Part(own + [0] * (WORDS - len(own)), room, inner, most, partial)


def ffn(norm: Norm, up_FD: Tensor, down_DF: Tensor) -> Part:
    """Squared ReLU between two maps."""
    between, width = up_FD.shape
    words = [up_FD.data_ptr(), down_DF.data_ptr(), between]
    return part(FFN, norm, words, between + 2 * width, max(between, width))


def mamba(
    norm: Norm,
    in_CD: Tensor,
    out_DC: Tensor,
    heads: int,
    groups: int,
    size: int,
    conv_C1W: Tensor,
    conv_bias_C: Tensor | None,
    scalars: Sequence[Tensor],
    gated: Norm,
) -> Part:
    """A Mamba-2 block. scalars: A_log, D and dt_bias [H], fp32; gated: weight and epsilon of the gated norm."""
    (width, inner), projected = out_DC.shape, in_CD.shape[0]
    words = [in_CD.data_ptr(), out_DC.data_ptr(), heads, inner // heads, groups, size, conv_C1W.shape[-1]]
    words += [conv_C1W.data_ptr(), address(conv_bias_C), *(t.data_ptr() for t in scalars)]
    words += [gated[0].data_ptr(), real(gated[1])]
    # a thread's scratch counts with a row, for there are never more threads than documents times groups
    return part(MAMBA, norm, words, 2 * width + inner + projected + 2 * (inner + groups * size), max(width, inner))


def attention(norm: Norm, weights: Sequence[Tensor], heads: int, groups: int, window: int | None, scale: float) -> Part:
    """Attention without positions; weights: q, k, v, o."""
    wide, width = weights[0].shape
    words = [*(w.data_ptr() for w in weights), heads, groups, wide // heads, window or 0, real(scale)]
    head = wide // heads
    room = 2 * (width + wide + groups * head)
    return part(ATTENTION, norm, words, room, max(width, wide), partial=groups * 64 * (2 + head))


def moe(
    norm: Norm,
    router: tuple[Tensor, Tensor],
    latent: tuple[Tensor | None, Tensor | None],
    experts: tuple[Tensor, Tensor],
    shared: tuple[Tensor | None, Tensor | None],
    k: int,
    normalise: bool,
    factor: float,
) -> Part:
    """Sigmoid router with its bias (fp32), relu^2 experts up and down, what a model has of a latent space (into, from)
    and a shared expert (up, down)."""
    (count, ffn, inner), width = experts[0].shape, router[0].shape[1]
    between = 0 if shared[0] is None else shared[0].shape[0]
    words = [address(t) for t in (*router, *latent, *experts, *shared)]
    words += [count, k, inner, ffn, between, int(normalise), real(factor)]
    room = 4 * width + between + 4 * inner + 2 * count + k * (ffn + inner + 2)
    most = min(MOST_TOKENS, MOST_CHOICES // k)
    return part(MOE, norm, words, room, max(width, inner, between), most)


def join(norm: Norm, beside: Norm, weight_DE: Tensor) -> Part:
    """W [norm(x) ; norm(what lies beside x)]: how a draft block begins."""
    width = len(weight_DE)
    words = [beside[0].data_ptr(), real(beside[1]), weight_DE.data_ptr()]
    return part(JOIN, norm, words, 2 * width, 2 * width)


def norm(weight_D: Tensor, eps: float) -> Part:
    """A norm alone."""
    return part(NORM, (weight_D, eps), [], 0, 0)


def mamba_memory(slots: Slots, after_KSHPN: Tensor | None, window_SXC: Tensor | None) -> list[int]:
    """The words of a Mamba block's memory; after, window: room for a trial's states, and for the tails with the
    convolution's inputs behind them."""
    tail, ssm = slots.tail_SWC, slots.ssm_SHPN
    own = [tail.data_ptr(), tail.stride(0), ssm.data_ptr(), ssm.stride(0)]
    return [*own, address(after_KSHPN), address(window_SXC)]


def attention_memory(reach: Reach, groups: int, window: int | None) -> list[int]:
    """The words of an attention block's memory."""
    return [reach.k_XGK.data_ptr(), reach.v_XGK.data_ptr(), reach.at.pieces(groups, window)]


def scratch(numbers: int) -> Tensor:
    """Room for `numbers` numbers of at most 8 bytes in up to 16 pieces, each of which begins at 64 bytes."""
    return torch.empty(numbers + 16 * 16, dtype=torch.int64)


def turned(rows: int, inner: int) -> Tensor:
    """Room for x with its rows as lanes: 4 bytes a number, rows rounded up to 32."""
    return torch.empty(-(-rows // 32) * 32 * inner if rows > TURNED else 1, dtype=torch.int32)


@dataclass(frozen=True)
class Scratch:
    """What parts need beside their words. numbers: of scratch; inner: the widest input of a map."""

    numbers: int
    inner: int


def pass_words(
    x: Tensor, beside: Tensor | None, y: Tensor, slots: Slots | None, at: Table | None, lanes: Tensor, room: Tensor
) -> "array[int]":
    """The words of a pass, in the kernel's order. slots and at: what the documents and the keys of Mamba and attention
    blocks are, alike in all of them."""
    width = x.shape[-1]
    words = [x.data_ptr(), address(beside), y.data_ptr(), x.numel() // width, width]
    words += [0, 0, 0] if slots is None else [address(slots.slots_S), slots.documents, slots.tokens]
    if at is None:
        words += [0] * 8
    else:
        starts, queries, before, places = at.addresses()
        words += [places, starts, queries, before, at.sequences, at.deepest, at.page, at.shift]
    return array("q", [*words, torch.get_num_threads(), lanes.data_ptr(), room.data_ptr()])


def stack(
    x_BTD: Tensor,
    beside_BTD: Tensor | None,
    parts: "array[int]",
    first: int,
    last: int,
    room: Scratch,
    slots: Slots | None,
    at: Table | None,
) -> Tensor:
    """The stream after the parts `first` to before `last` [B, T, D]. parts: the words of all."""
    y_BTD, rows = torch.empty_like(x_BTD), x_BTD.numel() // x_BTD.shape[-1]
    lanes, own = turned(rows, room.inner), scratch(room.numbers)
    of_pass = pass_words(x_BTD, beside_BTD, y_BTD, slots, at, lanes, own)
    begin = parts.buffer_info()[0] + first * WORDS * parts.itemsize
    function("stack", x_BTD.dtype)(of_pass.buffer_info()[0], begin, last - first)
    return y_BTD


@dataclass(slots=True)
class Tried:
    """What a trial left of one layer: its slots as they were, the tails with the trial's inputs behind them, and the
    state after each token."""

    slots: Slots
    window_SXC: Tensor
    after_KSHPN: Tensor


def keep(layers: Sequence[Tried], kept: Sequence[int]) -> None:
    """Ends a trial in all layers: of document d the first kept[d] tokens stay."""
    one = layers[0].slots
    words, stays = array("q"), array("q", kept)
    for own in layers:
        tail, ssm = own.slots.tail_SWC, own.slots.ssm_SHPN
        words.extend((tail.data_ptr(), tail.stride(0), ssm.data_ptr(), ssm.stride(0)))
        words.extend((own.window_SXC.data_ptr(), own.after_KSHPN.data_ptr()))
    _, before, channels = one.tail_SWC.shape
    _, heads, head, size = one.ssm_SHPN.shape
    function("keep", one.tail_SWC.dtype)(
        *(words.buffer_info()[0], len(layers), address(one.slots_S), stays.buffer_info()[0]),
        *(one.documents, one.tokens, before, channels, heads * head * size),
    )


def drafts(
    hidden_ND: Tensor,
    following: Sequence[int],
    parts: "array[int]",
    room: Scratch,
    at: Table,
    ends: tuple[Tensor, Tensor],
    ids: int,
    depth: int,
) -> tuple[Tensor, list[list[int]]]:
    """Of S sequences the draft block's output at their newest pairs [S, D], and `depth` greedy drafts behind them.

    hidden, following: the pairs to read first, those of one sequence after those of the other. parts: of the draft
    block, a `join` first. at: of each sequence's pairs and depth - 1 keys more. ends: the weights of embedding and head
    [V, D]. ids: tokens from there on are never drafted. Where the model gives no number all drafts end with -1s.
    """
    (pairs, width), rows = hidden_ND.shape, at.sequences
    x, y = (hidden_ND.new_empty(max(pairs, rows), width) for _ in range(2))
    newest_SD, logits = hidden_ND.new_empty(rows, width), hidden_ND.new_empty(rows, ids)
    lanes, own = turned(max(pairs, rows), max(room.inner, width)), scratch(room.numbers)
    of_pass = pass_words(x, hidden_ND, y, None, at, lanes, own)
    tokens, after = array("q", [-1]) * (rows * depth), array("q", following)
    more = [*(t.data_ptr() for t in ends), ids, depth, after.buffer_info()[0]]
    more += [newest_SD.data_ptr(), logits.data_ptr(), tokens.buffer_info()[0]]
    of_drafts = array("q", more)
    function("drafts", hidden_ND.dtype)(
        of_pass.buffer_info()[0], parts.buffer_info()[0], len(parts) // WORDS, of_drafts.buffer_info()[0]
    )
    return newest_SD, [list(tokens[row : row + depth]) for row in range(0, rows * depth, depth)]
