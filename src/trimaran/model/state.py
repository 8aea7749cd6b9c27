"""What a model remembers between passes: keys and values, convolution tails, SSM states, and where each row stands.

`advance` happens inside the model's forward. `mark()` opens a trial; `keep(n_B)` closes it: of the tokens since the
mark the first n of each row stay, the rest never happened. Attention forgets by shortening. Mamba cannot, so from the
mark on it keeps the state at the mark untouched and a ring of what the trial tokens wrote (x, B, dt and the raw inputs
of the convolution), and folds the accepted prefix when told how long it is. `fork` repeats, drops or reorders rows.

Under autograd every update makes new tensors. Without it keys and values are written in place, and outside of a trial
a single token's step updates the SSM state in place too.

A layer asks its memory for the two things that depend on how the memory is kept, `attend` for attention, `convolve`
and `scan` for Mamba, so that a memory of another shape (the engine's pages) needs no second model path.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import torch
from torch import Tensor

from trimaran.model.config import ATTENTION, ModelConfig
from trimaran.model.layout import Layout, lay_out
from trimaran.ops import conv, native, native_stack, ssd
from trimaran.ops.attention import attention, merge, partial_attention
from trimaran.ops.numbers import at_least_fp32

GROWTH = 256  # keys by which a buffer at least grows


class Convolution(Protocol):
    """What a Mamba layer's memory needs of the short convolution."""

    taps: int

    def few(self, x_BTC: Tensor, tail_BWC: Tensor) -> tuple[Tensor, Tensor]: ...

    def __call__(self, x_BTC: Tensor, tail_BWC: Tensor | None, seg_BT: Tensor | None) -> Tensor: ...


class Mixer(Protocol):
    """A Mamba layer that may do a few tokens at once between its projections."""

    def takes(self, projected_SKC: Tensor, tail_SWC: Tensor, ssm_SHPN: Tensor) -> bool: ...

    def few(
        self,
        projected_SKC: Tensor,
        tail_SWC: Tensor,
        ssm_SHPN: Tensor,
        slots_S: Tensor | None = None,
        trial: bool = False,
    ) -> tuple[Tensor, Tensor | None]: ...


class AttentionMemory(Protocol):
    """What an attention layer asks of its memory."""

    def reach(self, layout: Layout, keys: int, window: int | None) -> native.Reach | None:
        """Room for the pass's keys and values, and where each query's keys lie; None: only `attend` knows."""
        ...

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
        """Remembers the pass's keys and values, and looks at all that each query may see: [B, T, H, K]."""
        ...


class MambaMemory(Protocol):
    """What a Mamba layer asks of its memory, in this order, once per pass; the last two where `mix` gives nothing."""

    def slots(self, layout: Layout) -> native.Slots | None:
        """Where the pass's documents have their memory, one like the other and in order; None: not so."""
        ...

    def tried(self, left: native_stack.Tried) -> None:
        """Notes what a trial left."""
        ...

    def mix(self, mixer: Mixer, projected_BTC: Tensor, layout: Layout) -> Tensor | None:
        """All between the projections in one call per batch of tokens [B, T, H P], where the mixer and the pass allow.

        None, and nothing has moved, where they do not.
        """
        ...

    def convolve(self, conv1d: Convolution, inputs_BTC: Tensor, layout: Layout) -> Tensor:
        """The short convolution behind the remembered inputs, which move on: [B, T, C]."""
        ...

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
        """The recurrence from the remembered state, which moves on: y [B, T, H, P] in at least fp32."""
        ...


class StackMemory(Protocol):
    """What a stack of layers asks of the memory of all of them."""

    batch: int
    version: int

    @property
    def layers(self) -> Sequence[object]: ...

    def lay_out(self, length: int, doc_ids_BT: Tensor | None) -> Layout: ...

    def keys(self, layout: Layout) -> int: ...

    def advance(self, layout: Layout, doc_ids_BT: Tensor | None) -> None: ...


class PassMemory:
    """Marks the memory of one pass alone: a layer that asks again gets the same answer, so blocks may be recomputed."""

    def asked_twice(self) -> Self:
        """The memory as a block sees it that asks in its forward and again in its backward."""
        return self


class Over(Protocol):
    """Rows that lie over several processes: whoever runs a pass without a state asks it for that pass's memory."""

    def memory(self, batch: int, version: int, blocks: int) -> StackMemory: ...


class AttentionState:
    """Keys and values [B, capacity, G, K] of one layer; how many are valid is the owner's `lengths_B`.

    room: tokens for which there is to be capacity from the first on: growing means copying.
    """

    def __init__(self, room: int = 0) -> None:
        self.room = room
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def reach(self, layout: Layout, keys: int, window: int | None) -> native.Reach | None:
        """Rows that are all as long, in one document each."""
        if self.k is None or self.v is None or layout.keys is None or layout.first_BT is not None:
            return None
        self.k, self.v = self._grown(self.k, self.k, keys), self._grown(self.v, self.v, keys)
        return native.Reach(self.k.flatten(0, 1), self.v.flatten(0, 1), layout.rows_in(self.k.shape[1]))

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
        """Stores the pass's keys and values and looks at all `keys` that queries may see."""
        self.k = self._write(self.k, k_BTGK, layout, keys)
        self.v = self._write(self.v, v_BTGK, layout, keys)
        if layout.keys is not None and layout.first_BT is None:
            q_NHK, pools = q_BTHK.flatten(0, 1), (self.k.flatten(0, 1), self.v.flatten(0, 1))
            if native.takes_attention(q_NHK, *pools, layout.length):
                return native.attend(q_NHK, *pools, layout.rows_in(self.k.shape[1]), window, scale).view_as(q_BTHK)
            if native.takes_long_attention(q_NHK, *pools):
                return native.attend_long(q_NHK, *pools, layout.rows_in(self.k.shape[1]), window, scale).view_as(q_BTHK)
        k_BSGK, v_BSGK = self.k[:, :keys], self.v[:, :keys]
        if layout.goes_on and window is None and q_BTHK.device.type == "cpu" and not torch.is_grad_enabled():
            # Past and block apart: the kernel skips what causality hides, but not what a mask hides.
            past, block = slice(0, layout.start), slice(layout.start, keys)
            seen = partial_attention(q_BTHK, k_BSGK[:, past], v_BSGK[:, past], None, False, scale)
            own = partial_attention(q_BTHK, k_BSGK[:, block], v_BSGK[:, block], None, True, scale)
            return merge(*seen, *own)[0].to(q_BTHK.dtype)
        return attention(q_BTHK, k_BSGK, v_BSGK, *layout.mask(keys, window), scale)

    def _write(self, held: Tensor | None, new: Tensor, layout: Layout, keys: int) -> Tensor:
        if layout.keys is not None and torch.is_grad_enabled():
            return new if held is None else torch.cat([held[:, : layout.start], new], 1)
        held = self._grown(held, new, keys)
        if layout.keys is not None:
            held[:, layout.start : keys] = new
            return held
        real_BT = layout.real_BT
        place_BT = layout.place_BT.expand(new.shape[0], -1)
        row_BT = torch.arange(new.shape[0], device=new.device)[:, None].expand_as(place_BT)
        rows, places = (row_BT, place_BT) if real_BT is None else (row_BT[real_BT], place_BT[real_BT])
        values = new if real_BT is None else new[real_BT]
        if torch.is_grad_enabled():
            return held.index_put((rows, places), values)
        held[rows, places] = values
        return held

    def _grown(self, held: Tensor | None, new: Tensor, keys: int) -> Tensor:
        capacity = 0 if held is None else held.shape[1]
        if held is not None and capacity >= keys:
            return held
        # Zeros, not uninitialised memory: a masked key still meets its value as 0 * value, and 0 * NaN is NaN.
        size = max(keys, self.room or GROWTH) if held is None else max(keys, capacity + max(capacity // 2, GROWTH))
        grown = new.new_zeros(new.shape[0], size, *new.shape[2:])
        if held is not None:
            grown[:, :capacity] = held
        return grown

    def fork(self, index: Tensor) -> "AttentionState":
        copy = AttentionState(self.room)
        copy.k, copy.v = (None if t is None else t.index_select(0, index) for t in (self.k, self.v))
        return copy

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.k, self.v) if t is not None]


def is_step(layout: Layout) -> bool:
    """Whether the pass is one token of a running document for every row."""
    return layout.length == 1 and layout.seg_BT is None and layout.count_B is None


@dataclass
class Ring:
    """What the tokens of a trial wrote, pass by pass, and the tail and state they started from."""

    tail: Tensor
    ssm: Tensor
    inputs: list[Tensor] = field(default_factory=list)  # [B, T, C] before the convolution
    x: list[Tensor] = field(default_factory=list)  # [B, T, H, P]
    B: list[Tensor] = field(default_factory=list)  # [B, T, G, N]
    dt: list[Tensor] = field(default_factory=list)  # [B, T, H]

    def tensors(self) -> list[Tensor]:
        return [self.tail, self.ssm, *self.inputs, *self.x, *self.B, *self.dt]


class MambaState:
    """Convolution tail [B, W-1, C] in the model's dtype and SSM state [B, H, P, N] in at least fp32."""

    def __init__(self, batch: int, config: ModelConfig, device: torch.device, dtype: torch.dtype):
        heads, width, size = config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size
        self.tail = torch.zeros(batch, config.conv_kernel - 1, config.conv_width, device=device, dtype=dtype)
        self.ssm = at_least_fp32(torch.zeros(batch, heads, width, size, device=device, dtype=dtype))
        self.ring: Ring | None = None

    def slots(self, layout: Layout) -> native.Slots | None:
        """One token of a running document per row, outside of a trial."""
        if self.ring is not None or not is_step(layout) or self.ssm.requires_grad or self.tail.requires_grad:
            return None
        return native.Slots(self.tail, self.ssm, len(self.tail), 1)

    def tried(self, left: native_stack.Tried) -> None:
        """Never: `slots` knows no trial."""
        raise AssertionError("a trial of a State goes through its ring")

    def mix(self, mixer: Mixer, projected_BTC: Tensor, layout: Layout) -> Tensor | None:
        """As `slots`: tail and state move on in place."""
        if self.slots(layout) is None:
            return None
        if not mixer.takes(projected_BTC, self.tail, self.ssm):
            return None
        return mixer.few(projected_BTC, self.tail, self.ssm)[0]

    def convolve(self, conv1d: Convolution, inputs_BTC: Tensor, layout: Layout) -> Tensor:
        """The convolution behind the tail, which moves on; during a trial the inputs are noted too."""
        if self.ring is not None:
            self.ring.inputs.append(inputs_BTC)
        if is_step(layout):
            mixed_BTC, window_BXC = conv1d.few(inputs_BTC, self.tail)
            self.tail = window_BXC[:, 1:]
            return mixed_BTC
        mixed_BTC = conv1d(inputs_BTC, self.tail, layout.seg_BT)
        tail = conv.next_tail(inputs_BTC, conv1d.taps, self.tail, layout.seg_BT, layout.count_B)
        self.tail = self.tail.copy_(tail) if self.in_place(self.tail) else tail
        return mixed_BTC

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
        """The recurrence: stepwise for one token of a running document, chunked otherwise."""
        before, ring = self.ssm, self.ring
        if ring is not None:
            ring.x.append(x_BTHP)
            ring.B.append(B_BTGN)
            ring.dt.append(dt_BTH)
        if not is_step(layout):
            y_BTHP, after = ssd.ssd(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, before, layout.seg_BT, chunk)
            # New memory that stays, amid a block's scratch, would keep what is freed around it from becoming one piece.
            self.ssm = before.copy_(after) if self.in_place(before) else after
            return y_BTHP
        at = self.in_place(before)
        y, self.ssm = ssd.ssd_step(x_BTHP[:, 0], dt_BTH[:, 0], A_H, B_BTGN[:, 0], C_BTGN[:, 0], before, at)
        return y[:, None]

    def in_place(self, before: Tensor) -> bool:
        """During a trial what was at the mark must survive, and so must what gradients will flow through."""
        return self.ring is None and not torch.is_grad_enabled() and not before.requires_grad

    def mark(self) -> None:
        self.ring = Ring(self.tail, self.ssm)

    def keep(self, kept_BT: Tensor, seg_BT: Tensor | None, A_H: Tensor) -> None:
        """Folds the trial tokens where `kept_BT` is True into the state at the mark."""
        ring, self.ring = self.ring, None
        assert ring is not None
        self.tail, self.ssm = ring.tail, ring.ssm
        if not ring.inputs:
            return
        dt_BTH = torch.cat(ring.dt, 1) * kept_BT[..., None]
        B_BTGN = torch.cat(ring.B, 1)
        _, self.ssm = ssd.ssd(torch.cat(ring.x, 1), dt_BTH, A_H, B_BTGN, B_BTGN, self.ssm, seg_BT)
        # The kept tokens of each row, moved to the left, are a pass with padding on the right.
        order_BT = (~kept_BT).to(torch.int8).argsort(dim=1, stable=True)
        inputs_BTC = torch.cat(ring.inputs, 1)
        inputs_BTC = inputs_BTC.gather(1, order_BT[..., None].expand_as(inputs_BTC))
        if seg_BT is not None:  # what was not kept repeats the row's last document, as padding does
            seg_BT = seg_BT.gather(1, order_BT).cummax(1).values
        self.tail = conv.next_tail(inputs_BTC, self.tail.shape[1] + 1, self.tail, seg_BT, kept_BT.sum(1))

    def fork(self, index: Tensor) -> "MambaState":
        copy = object.__new__(MambaState)
        copy.tail, copy.ssm, copy.ring = self.tail.index_select(0, index), self.ssm.index_select(0, index), None
        return copy

    def tensors(self) -> list[Tensor]:
        return [self.tail, self.ssm, *(self.ring.tensors() if self.ring else [])]


@dataclass
class Trial:
    """Where the rows stood at the mark, and the passes since."""

    start: int | None
    start_B: Tensor | None
    first_B: Tensor | None
    last_id_B: Tensor | None
    passes: list[tuple[Layout, Tensor | None]] = field(default_factory=list)  # layout and document ids, arranged


class State:
    """The memory of one stack of layers for `batch` rows. `mtp` is the draft block's own, one more stack.

    start: tokens seen, when all rows agree; start_B: per row otherwise. first_B: position of the first token of the
    document being read (None: 0). last_id_B: the id of that document. version: the model's weights it was made with.
    """

    def __init__(
        self, pattern: str, batch: int, config: ModelConfig, device: torch.device, dtype: torch.dtype, room: int = 0
    ):
        self.batch, self.device = batch, device
        self.layers: list[AttentionState | MambaState | None] = []
        for letter in pattern:
            if letter == "M":
                self.layers.append(MambaState(batch, config, device, dtype))
            else:
                self.layers.append(AttentionState(room) if letter in ATTENTION else None)
        self.decays: dict[int, Tensor] = {}  # A of each Mamba layer, set by the model: what `keep` folds with
        self.start: int | None = 0
        self.start_B: Tensor | None = None
        self.first_B: Tensor | None = None
        self.last_id_B: Tensor | None = None
        self.trial: Trial | None = None
        self.version = 0
        self.mtp: State | None = None

    @property
    def lengths_B(self) -> Tensor:
        """Tokens each row has seen, padding not counted."""
        if self.start_B is not None:
            return self.start_B
        return torch.full((self.batch,), self.start or 0, device=self.device)

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers, the draft block's included."""
        own = sum(t.nbytes for layer in self.layers if layer is not None for t in layer.tensors())
        return own + (self.mtp.nbytes if self.mtp is not None else 0)

    def lay_out(self, length: int, doc_ids_BT: Tensor | None) -> Layout:
        """The layout of the next pass."""
        return lay_out(
            self.batch, length, self.device, doc_ids_BT, self.start, self.start_B, self.first_B, self.last_id_B
        )

    def keys(self, layout: Layout) -> int:
        """Keys the longest row has after the pass."""
        if layout.keys is not None:
            return layout.keys
        return int((self.lengths_B + (layout.length if layout.count_B is None else layout.count_B)).max())

    def advance(self, layout: Layout, doc_ids_BT: Tensor | None) -> None:
        """Moves the rows past the pass just made."""
        if self.trial is not None:
            self.trial.passes.append((layout, None if doc_ids_BT is None else layout.arrange(doc_ids_BT)))
        if layout.keys is not None:
            self.start, self.start_B = layout.keys, None
        else:
            added = layout.length if layout.count_B is None else layout.count_B
            self.start, self.start_B = None, self.lengths_B + added
        self.last_id_B = layout.last_id_B
        if layout.first_BT is not None:
            place = (layout.count_B - 1).clamp(min=0) if layout.count_B is not None else None
            newest = layout.first_BT[:, -1] if place is None else layout.first_BT.gather(1, place[:, None])[:, 0]
            if layout.count_B is not None:
                before = torch.zeros_like(newest) if self.first_B is None else self.first_B
                newest = torch.where(layout.count_B > 0, newest, before)
            self.first_B = newest

    def mark(self) -> None:
        """Begins a trial: what follows can be taken back by `keep`."""
        if self.trial is not None:
            raise RuntimeError("mark() during a trial: close it with keep(n_B) first")
        self.trial = Trial(self.start, self.start_B, self.first_B, self.last_id_B)
        for layer in self.layers:
            if isinstance(layer, MambaState):
                layer.mark()

    def keep(self, count_B: Tensor | int) -> None:
        """Ends the trial: the first `count_B` tokens of each row since the mark stay, the rest never happened."""
        trial, self.trial = self.trial, None
        if trial is None:
            raise RuntimeError("keep(n_B) without a trial: call mark() before the tokens that may be taken back")
        passes = trial.passes
        made_BT = torch.cat([self._real(layout) for layout, _ in passes], 1) if passes else None
        made_B = torch.zeros(self.batch, dtype=torch.long, device=self.device) if made_BT is None else made_BT.sum(1)
        wanted_B = torch.as_tensor(count_B, device=self.device).expand(self.batch)
        if bool((wanted_B > made_B).any()) or bool((wanted_B < 0).any()):
            self.trial = trial
            raise ValueError(f"keep({wanted_B.tolist()}): the rows made {made_B.tolist()} tokens since the mark")
        self.start, self.start_B = trial.start, trial.start_B
        self.first_B, self.last_id_B = trial.first_B, trial.last_id_B
        if made_BT is None:
            made_BT = torch.zeros(self.batch, 0, dtype=torch.bool, device=self.device)
        kept_BT = made_BT & (made_BT.cumsum(1) <= wanted_B[:, None])
        seg_BT = self._settle(trial, kept_BT, wanted_B, count_B if isinstance(count_B, int) else None)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, MambaState):
                layer.keep(kept_BT, seg_BT, self.decays[index])

    def _settle(self, trial: Trial, kept_BT: Tensor, count_B: Tensor, uniform: int | None) -> Tensor | None:
        """Puts lengths and documents where the kept tokens end; returns the documents of the trial tokens."""
        if trial.start is not None and uniform is not None:
            self.start = trial.start + uniform
        else:
            self.start, self.start_B = None, self.lengths_B + count_B
        if all(ids is None for _, ids in trial.passes):
            return None
        shape = kept_BT.shape[0]
        resets, firsts, ids = [], [], []
        for layout, ids_BT in trial.passes:
            empty = torch.zeros(shape, layout.length, dtype=torch.long, device=self.device)
            resets.append(empty.bool() if layout.reset_BT is None else layout.reset_BT)
            firsts.append(empty if layout.first_BT is None else layout.first_BT)
            if ids_BT is None:  # what the row was reading goes on; without any ids so far that is document 0
                ids_BT = empty if layout.last_id_B is None else layout.last_id_B[:, None].expand_as(empty)
            ids.append(ids_BT)
        # Kept tokens are a prefix of each row's real tokens, so the last kept one is the latest kept column.
        column_BT = torch.arange(kept_BT.shape[1], device=self.device)
        last_B1 = torch.where(kept_BT, column_BT, -1).max(1, keepdim=True).values
        some_B = last_B1[:, 0] >= 0
        first_B, id_B = (torch.cat(t, 1).gather(1, last_B1.clamp(min=0))[:, 0] for t in (firsts, ids))
        before_first = torch.zeros_like(first_B) if trial.first_B is None else trial.first_B
        before_id = torch.zeros_like(id_B) if trial.last_id_B is None else trial.last_id_B
        self.first_B = torch.where(some_B, first_B, before_first)
        self.last_id_B = torch.where(some_B, id_B, before_id)
        return (torch.cat(resets, 1) & kept_BT).cumsum(1)

    def _real(self, layout: Layout) -> Tensor:
        real_BT = layout.real_BT
        return (
            torch.ones(self.batch, layout.length, dtype=torch.bool, device=self.device) if real_BT is None else real_BT
        )

    def fork(self, index: Tensor) -> "State":
        """A state whose row i is this state's row index[i]: repeats, drops or reorders rows."""
        if self.trial is not None:
            raise RuntimeError("fork() during a trial: close it with keep(n_B) first")
        copy = object.__new__(State)
        copy.batch, copy.device, copy.decays, copy.version = len(index), self.device, self.decays, self.version
        copy.layers = [None if layer is None else layer.fork(index) for layer in self.layers]
        copy.start, copy.trial = self.start, None
        copy.start_B, copy.first_B, copy.last_id_B = (
            None if t is None else t.index_select(0, index) for t in (self.start_B, self.first_B, self.last_id_B)
        )
        copy.mtp = None if self.mtp is None else self.mtp.fork(index)
        return copy
