"""Context parallel: rows cut in `cp` contiguous pieces of L = T / cp tokens, one per process.

A pass over a piece is a pass like any other, whose layers ask a memory for what lies before it (`model.state`); here
that memory is the other processes. It holds nothing between passes. What crosses the cuts, per layer and process, in
numbers sent forward, with B rows, H heads, P x N states, G key-value heads of width K, W taps:

    *  R     keys and values of a piece to every later one: at most 2 (cp - 1) B L G K. Nothing goes to earlier pieces,
             which do not look ahead; the last piece has the most work
    W        the window - 1 last keys and values: 2 B (window - 1) G K
    M        the W - 1 last inputs of the convolution, and the state: 2 B H P N, whatever cp is. `arriving` turns the
             states so that a process combines all of one stretch of them, and turns the result back; gathering them
             would take (cp - 1) B H P N numbers and that much memory

Gradients come back by the adjoint exchanges. Whole rows of keys and values live in one layer at a time: backward brings
them again. Masks cost L x T bytes per row, once per pass; where that is more than `most`, each document of each row is
a call of its own, which needs none.

Documents may cross any number of cuts; positions count from a document's start in the whole row. Padding has to stand
at the end of a row.
"""

from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from trimaran.errors import Refusal
from trimaran.model.layout import Layout, lay_out
from trimaran.model.state import Convolution, Mixer, PassMemory
from trimaran.ops import native, ssd
from trimaran.ops.attention import attention, attention_of_last
from trimaran.ops.numbers import at_least_fp32
from trimaran.parallel.collectives import before, deal, gather, gathered

Run = tuple[int, int, int]  # tokens start .. stop of a piece, and the place of their document's first key


@dataclass(frozen=True)
class Context:
    """The processes that hold the pieces of this one's rows, in order: makes the memory of each pass."""

    group: dist.ProcessGroup
    device: torch.device
    most: int = 1 << 28  # bytes of a mask

    def memory(self, batch: int, version: int, blocks: int) -> "Piece":
        """For one pass of `batch` rows through `blocks` layers with weights of this version."""
        return Piece(self, batch, version, blocks)


class Piece(PassMemory):
    """The memory of one pass over one piece: of the stack, and of each of its layers."""

    def __init__(self, context: Context, batch: int, version: int, blocks: int):
        self.group, self.device, self.most = context.group, context.device, context.most
        self.batch, self.version, self.blocks = batch, version, blocks
        self.whole: Layout | None = None  # of whole rows; None: one document each
        self.runs: list[list[Run]] | None = None
        self.again = True  # whether backward brings keys and values again

    @property
    def layers(self) -> list["Piece"]:
        return [self] * self.blocks

    def asked_twice(self) -> "Piece":
        other = copy(self)
        other.again = False  # the block's second forward brings them
        return other

    def lay_out(self, length: int, doc_ids_BT: Tensor | None) -> Layout:
        """The piece's layout within its rows. Raises Refusal for padding with tokens behind it."""
        batch, device, start = self.batch, self.device, self.group.rank() * length
        if doc_ids_BT is None:
            return Layout(batch, length, device, start)
        self.whole = whole = lay_out(batch, length * self.group.size(), device, gathered(doc_ids_BT, self.group, 1))
        if whole.order_BT is not None:
            step = "move the padding, or leave parallel.cp out"
            raise Refusal("padding in front of tokens in a row cut by parallel.cp", "padding at a row's end", step)
        own = slice(start, start + length)
        return Layout(
            batch,
            length,
            device,
            start,
            count_B=None if whole.count_B is None else (whole.count_B - start).clamp(0, length),
            reset_BT=None if whole.reset_BT is None else whole.reset_BT[:, own],
            first_BT=None if whole.first_BT is None else whole.first_BT[:, own],
        )

    def keys(self, layout: Layout) -> int:
        assert layout.start is not None
        return layout.start + layout.length

    def advance(self, layout: Layout, doc_ids_BT: Tensor | None) -> None:
        """Nothing is remembered."""

    def reach(self, layout: Layout, keys: int, window: int | None) -> None:
        """None at once: keys come from other processes."""

    def attend(
        self,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGK: Tensor,
        layout: Layout,
        keys: int,
        window: int | None,
        scale: float,
    ) -> Tensor:
        """Own queries over the keys of this and earlier pieces, as many as `window` lets them see."""
        kv_BT2GK = torch.stack([k_BTGK, v_BTGK], 2)
        most = (self.group.size() - 1) * layout.length
        reach = Reach(kv_BT2GK.detach(), most if window is None else min(window - 1, most), self.group)
        kv_BS2GK = torch.cat([before(kv_BT2GK, reach.count, self.group), kv_BT2GK], 1)
        k_BSGK, v_BSGK = kv_BS2GK.unbind(2)

        def look() -> Tensor:
            if window is None and self.batch * layout.length * keys > self.most:
                return self.by_document(q_BTHK, k_BSGK, v_BSGK, layout, scale)
            mask, causal = layout.mask(keys, window, keys - kv_BS2GK.shape[1])
            return attention(q_BTHK, k_BSGK, v_BSGK, mask, causal, scale)

        if not (self.again and kv_BS2GK.requires_grad):
            return look()
        reach.whole = kv_BS2GK.detach()
        with saved_tensors_hooks(reach.leave, reach.find):
            out_BTHK = look()
        reach.forget()
        out_BTHK.register_hook(reach.bring)
        kv_BS2GK.register_hook(reach.forget)
        return out_BTHK

    def by_document(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, layout: Layout, scale: float) -> Tensor:
        """Attention without masks: a call for each document of each row, over its keys from its first one on."""
        if layout.first_BT is None:
            return attention_of_last(q_BTHK, k_BSGK, v_BSGK, scale)
        if self.runs is None:
            self.runs = [runs(first_T.tolist()) for first_T in layout.first_BT]
        rows, behind = [], k_BSGK.shape[1] - layout.length
        for row, documents in enumerate(self.runs):
            q_BTHK1, k_BSGK1, v_BSGK1 = (t[row : row + 1] for t in (q_BTHK, k_BSGK, v_BSGK))
            parts = []
            for start, stop, first in documents:
                keys = slice(first, behind + stop)
                parts.append(attention_of_last(q_BTHK1[:, start:stop], k_BSGK1[:, keys], v_BSGK1[:, keys], scale))
            rows.append(torch.cat(parts, 1))
        return torch.cat(rows)

    def slots(self, layout: Layout) -> None:
        """None at once: tails and states come from other processes."""

    def tried(self, slots: native.Slots, inputs_NC: Tensor, after_KSHPN: Tensor) -> None:
        """Never: `slots` gives nothing."""
        raise AssertionError("a pass over several processes has no trials")

    def mix(self, mixer: Mixer, projected_BTC: Tensor, layout: Layout) -> None:
        """None either."""

    def convolve(self, conv1d: Convolution, inputs_BTC: Tensor, layout: Layout) -> Tensor:
        """The short convolution behind the last inputs of earlier pieces."""
        tail_BWC = before(inputs_BTC, conv1d.taps - 1, self.group)
        missing = conv1d.taps - 1 - tail_BWC.shape[1]
        if self.whole is not None and self.whole.seg_BT is not None and layout.start:
            seg_BW = self.whole.seg_BT[:, layout.start - tail_BWC.shape[1] : layout.start]
            tail_BWC = tail_BWC.masked_fill((seg_BW != seg_BW[:, -1:])[..., None], 0)
        return conv1d(inputs_BTC, F.pad(tail_BWC, (0, 0, missing, 0)), layout.seg_BT)

    def scan(
        self,
        x_BTHP: Tensor,
        dt_BTH: Tensor,
        A_H: Tensor,
        B_BTGN: Tensor,
        C_BTGN: Tensor,
        layout: Layout,
        chunk: int,
    ) -> Tensor:
        """The recurrence from nothing, and what the state that arrives adds to it."""
        seg_BT = layout.seg_BT
        y_BTHP, own_BHPN = ssd.ssd(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, None, seg_BT, chunk)
        decay_BH = torch.exp((at_least_fp32(dt_BTH) * A_H).sum(1))
        if seg_BT is not None:
            decay_BH = decay_BH.masked_fill(seg_BT[:, -1:].ne(0), 0)  # its document has ended
        state_BHPN = arriving(own_BHPN, decay_BH, self.group)
        return y_BTHP + ssd.ssd_from_past(dt_BTH, A_H, C_BTGN, state_BHPN, seg_BT)


def arriving(own_BHPN: Tensor, decay_BH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The state before this process's piece [B, H, P, N]: what earlier pieces wrote, S <- decay S + own in their order.

    own_BHPN: the state a piece comes to from nothing; decay_BH: what it leaves of a state before it. A process sends
    1 / cp of its numbers to each, combines the stretch that it gets of all pieces, and sends the results back.
    """
    (batch, heads, width, size), parts = own_BHPN.shape, group.size()
    once = [1] * parts
    own_XY = own_BHPN.reshape(batch * heads, width * size)
    own_XRL = F.pad(own_XY, (0, -own_XY.shape[1] % parts)).unflatten(1, (parts, -1))
    pieces_RXL = deal(own_XRL.transpose(0, 1), once, once, group)
    decay_RX1 = gather(decay_BH.flatten()[None, :, None], group, 0)
    state_XL = torch.zeros_like(pieces_RXL[0])
    states = [state_XL]
    for decay_X1, piece_XL in zip(decay_RX1[:-1], pieces_RXL[:-1]):
        state_XL = torch.addcmul(piece_XL, state_XL, decay_X1)
        states.append(state_XL)
    found_XRL = deal(torch.stack(states), once, once, group).transpose(0, 1)
    return found_XRL.flatten(1)[:, : width * size].reshape(batch, heads, width, size)


def runs(firsts: list[int]) -> list[Run]:
    """Stretches of equal numbers: (start, stop, number). Of the first keys of tokens: the documents of a row."""
    borders = [0, *(place for place in range(1, len(firsts)) if firsts[place] != firsts[place - 1]), len(firsts)]
    return [(start, stop, firsts[start]) for start, stop in pairwise(borders)]


class Reach:
    """Keys and values of which backward needs more than this process holds: kept as the own ones, brought again.

    A kernel that saves views of the whole ones for backward (pack, unpack of saved_tensors_hooks) leaves a note of them
    and finds them where `bring` has put them. When they come and go is the graph's order, the same in all processes.
    """

    def __init__(self, own: Tensor, count: int, group: dist.ProcessGroup):
        self.own, self.count, self.group = own, count, group
        self.whole: Tensor | None = None

    def bring(self, grad: Tensor) -> None:
        """Before the kernel's backward."""
        self.whole = torch.cat([before(self.own, self.count, self.group), self.own], 1)

    def forget(self, grad: Tensor | None = None) -> None:
        """Behind the kernel's forward, and behind its backward."""
        self.whole = None

    def leave(self, tensor: Tensor) -> Any:
        """The tensor, or where it lies in the whole ones."""
        assert self.whole is not None
        if tensor.untyped_storage().data_ptr() != self.whole.untyped_storage().data_ptr():
            return tensor
        return tensor.shape, tensor.stride(), tensor.storage_offset()

    def find(self, left: Any) -> Tensor:
        """What `leave` was given."""
        if isinstance(left, Tensor):
            return left
        assert self.whole is not None
        return self.whole.as_strided(*left)
