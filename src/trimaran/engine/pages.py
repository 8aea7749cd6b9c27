"""Where running sequences keep what they remember: keys and values in pages, Mamba's states in slots.

A page holds the keys and values of `page` tokens in every attention layer, the draft block's (MTP's) included, so that
one list of page numbers describes a sequence. Pages are counted references: sequences with a common beginning share
them. A slot holds the convolution tails and SSM states of one sequence in every Mamba layer; a snapshot is a slot set
aside. Everything is allocated once.

The draft block's pair t joins the hidden vector of token t with token t+1, so its keys and values lie at the place of
token t+1: a page then depends on no token outside of it and before it, and can be shared whole.

    memory = Memory(model, bytes=1 << 30, rows=16)
    sequence = memory.open()
    if sequence is not None and memory.reserve(sequence, len(tokens)):
        hidden = model.hidden(torch.tensor([tokens]), state=memory.view([Segment(sequence, len(tokens))]))
"""

import heapq
import re
from collections import abc
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimaran.errors import Refusal
from trimaran.model.config import ATTENTION, ModelConfig
from trimaran.model.hybrid import HybridModel
from trimaran.ops import native

if TYPE_CHECKING:
    from trimaran.engine.paged import PagedState, Segment

Stack = Literal["trunk", "mtp"]

# Bytes of states that could be moved in the time that the calls for looking and folding take beyond those for stepping.
STEPPED_BYTES = 1 << 20
STEPS = 8  # tokens of a trial up to which steps are considered


@dataclass(eq=False)
class Sequence:
    """One running sequence. length: tokens the trunk has read; mtp_length: pairs the draft block has read.

    Taking back what the draft block read is setting `mtp_length`: it has attention only.
    """

    slot: int
    pages: list[int] = field(default_factory=list)
    length: int = 0
    mtp_length: int = 0


@dataclass(eq=False)
class Snapshot:
    """Mamba's states as they were after `length` tokens."""

    slot: int
    length: int


class Pages:
    """Which pages are taken, and by how many. Neighbours are preferred: a run of pages is read without a copy."""

    def __init__(self, total: int):
        self.total, self.free = total, total
        self.counts = [0] * total
        self._taken = bytearray(total)

    def take(self, count: int, after: int | None) -> list[int] | None:
        """`count` pages with one reference each, next to page `after` where that is free; None: too few are left."""
        if count > self.free:
            return None
        found: list[int] = []
        while after is not None and len(found) < count and after + 1 < self.total and not self._taken[after + 1]:
            after += 1
            found.append(self._claim(after))
        while len(found) < count:
            found += map(self._claim, self._room(count - len(found)))
        return found

    def _claim(self, page: int) -> int:
        self._taken[page], self.counts[page] = 1, 1
        self.free -= 1
        return page

    def _room(self, count: int) -> Iterable[int]:
        """Up to `count` pages of the longest gap, from its middle: who lives before it may want to grow too."""
        gaps = (match.span() for match in re.finditer(rb"\x00+", self._taken))
        start, end = max(gaps, key=lambda gap: gap[1] - gap[0])
        spare = max(0, end - start - count)
        start += spare // 2 if start else 0
        return range(start, min(end, start + count))

    def hold(self, page: int) -> None:
        if not self.counts[page]:
            raise RuntimeError(f"page {page} is free: take it before holding it")
        self.counts[page] += 1

    def drop(self, page: int) -> None:
        if not self.counts[page]:
            raise RuntimeError(f"page {page} is dropped more often than it was held")
        self.counts[page] -= 1
        if not self.counts[page]:
            self._taken[page] = 0
            self.free += 1


class Slots:
    """Numbers given out lowest first, so that the slots of running rows stay neighbours."""

    def __init__(self, numbers: range):
        self.total = len(numbers)
        self._free = list(numbers)

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int | None:
        return heapq.heappop(self._free) if self._free else None

    def give(self, number: int) -> None:
        heapq.heappush(self._free, number)


@dataclass(frozen=True)
class Unit:
    """Bytes of one page, one row and one snapshot of a model's memory."""

    page: int  # tokens
    kv_token: int
    tail: int
    ssm: int
    ring: int  # what a row's trial tokens leave behind until they are kept or not

    @property
    def page_bytes(self) -> int:
        return self.page * self.kv_token

    @property
    def row_bytes(self) -> int:
        return self.snapshot_bytes + self.ring

    @property
    def snapshot_bytes(self) -> int:
        return self.tail + self.ssm

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype, ssm_dtype: torch.dtype, page: int, draft: int) -> "Unit":
        attention = sum(letter in ATTENTION for letter in config.pattern + config.mtp_pattern)
        mamba = config.pattern.count("M")
        inner, heads = config.mamba_width, config.mamba_num_heads
        written = (config.conv_width + inner + config.n_groups * config.ssm_state_size) * dtype.itemsize
        written += heads * torch.promote_types(dtype, torch.float32).itemsize
        return cls(
            page,
            attention * 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize,
            mamba * (config.conv_kernel - 1) * config.conv_width * dtype.itemsize,
            mamba * inner * config.ssm_state_size * ssm_dtype.itemsize,
            mamba * (draft + 1) * written if draft else 0,
        )


class Memory:
    """Pages and slots of one model, and views of them that its layers can work with.

    Give `bytes` or `pages`. From bytes, rows are served first (each with one page), then snapshots from at most half of
    the rest, pages take what remains; `Refusal` when not even one row fits. draft: tokens per row that a trial may
    hold. ssm_dtype: None (at least fp32), or torch.float16, rounded stochastically at every write.

    bytes_read counts the bytes of keys and values that entered products. ragged: how rows of different length attend
    ("pad", "split", or "auto" by cost); sharing: whether a common beginning is read once for all rows that have it.
    """

    def __init__(
        self,
        model: HybridModel,
        *,
        rows: int,
        bytes: int | None = None,
        pages: int | None = None,
        page: int = 32,
        snapshots: int = 0,
        draft: int = 0,
        ssm_dtype: torch.dtype | None = None,
    ):
        config, dtype, device = model.config, model.dtype, model.device
        self.config, self.device, self.dtype, self.page = config, device, dtype, page
        self.ssm_dtype = checked_ssm_dtype(ssm_dtype, dtype)
        for name, value, least in (("page", page, 1), ("rows", rows, 1), ("snapshots", snapshots, 0)):
            if value < least:
                raise Refusal(f"{name} = {value}", f"{least} or more", f"raise {name}")
        if (bytes is None) == (pages is None):
            raise Refusal(f"bytes = {bytes} with pages = {pages}", "exactly one of them", "leave the other out")
        self.unit, self.draft = Unit.of(config, dtype, self.ssm_dtype, page, draft), draft
        self.asked = (rows, snapshots)
        if bytes is not None:
            rows, snapshots, pages = share_out(self.unit, bytes, rows, snapshots)
        assert pages is not None
        self.budget, self.version = bytes, model.version
        self.places = {
            "trunk": [i for i, letter in enumerate(config.pattern) if letter in ATTENTION],
            "mtp": [i for i, letter in enumerate(config.mtp_pattern) if letter in ATTENTION],
        }
        layers, mamba = len(self.places["trunk"]) + len(self.places["mtp"]), config.pattern.count("M")
        self.kv = torch.zeros(
            2, layers, pages, page, config.num_key_value_heads, config.head_dim, dtype=dtype, device=device
        )
        flat_k, flat_v = self.kv.flatten(2, 3).unbind(0)
        self._flat = list(zip(flat_k.unbind(0), flat_v.unbind(0), strict=True))
        kept = rows + snapshots
        self.tail = torch.zeros(mamba, kept, config.conv_kernel - 1, config.conv_width, dtype=dtype, device=device)
        shape = (mamba, kept, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        self.ssm = torch.zeros(shape, dtype=self.ssm_dtype, device=device)
        self._pages = Pages(pages)
        self._slots, self._snapshots = Slots(range(rows)), Slots(range(rows, kept))
        self.bytes_read = 0
        self.ragged: Literal["auto", "pad", "split"] = "auto"
        self.sharing: Literal["auto", "always", "never"] = "auto"

    # what is there

    @property
    def free_pages(self) -> int:
        return self._pages.free

    @property
    def total_pages(self) -> int:
        return self._pages.total

    @property
    def free_slots(self) -> int:
        return self._slots.free

    @property
    def total_slots(self) -> int:
        return self._slots.total

    @property
    def free_snapshots(self) -> int:
        return self._snapshots.free

    @property
    def total_snapshots(self) -> int:
        return self._snapshots.total

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.kv.nbytes + self.tail.nbytes + self.ssm.nbytes

    @property
    def trial_bytes(self) -> int:
        """The most that a pass with drafts keeps of states after each token on trial, beside what is allocated."""
        if not self.draft:
            return 0
        wide = torch.promote_types(self.dtype, torch.float32)
        layers, each = self.ssm.shape[0], self.ssm[:1, :1].numel() * wide.itemsize
        return layers * min(STEPPED_BYTES, self.total_slots * min(self.draft + 1, STEPS) * each)

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens need: none in a model without attention."""
        return -(-tokens // self.page) if self.unit.kv_token else 0

    def arithmetic(self) -> list[str]:
        """Where the bytes go, a line each."""
        unit, rows, snapshots = self.unit, self.total_slots, self.total_snapshots
        lines = []
        if self.budget is not None:
            lines.append(f"budget {readable(self.budget)}")
        parts = f"convolution {readable(unit.tail)}, SSM {readable(unit.ssm)}, draft {readable(unit.ring)}"
        fewer = f" ({self.asked[0]} asked)" if rows < self.asked[0] else ""
        lines.append(f"{rows} rows{fewer} x {readable(unit.row_bytes)} ({parts}) = {readable(rows * unit.row_bytes)}")
        fewer = f" ({self.asked[1]} asked)" if snapshots < self.asked[1] else ""
        each = readable(unit.snapshot_bytes)
        lines.append(f"{snapshots} snapshots{fewer} x {each} = {readable(snapshots * unit.snapshot_bytes)}")
        if unit.kv_token:
            each = f"{self.page} tokens x {readable(unit.kv_token)}"
            total = f"{readable(self.total_pages * unit.page_bytes)} for {self.total_pages * self.page} tokens"
            lines.append(f"{self.total_pages} pages x {each} = {total}")
        else:
            lines.append("no pages: the model has no attention")
        if self.trial_bytes:
            lines.append(
                f"while drafts are verified up to {readable(self.trial_bytes)} more, for the states after each"
            )
        return lines

    # sequences

    def open(self) -> Sequence | None:
        """A new sequence in a zeroed slot; None: no slot is free."""
        slot = self._slots.take()
        if slot is None:
            return None
        self.tail[:, slot] = 0
        self.ssm[:, slot] = 0
        return Sequence(slot)

    def reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Makes room for `tokens` more tokens; False: too few pages are free, and nothing has changed."""
        missing = self.pages_for(sequence.length + tokens) - len(sequence.pages)
        if missing <= 0:
            return True
        found = self._pages.take(missing, sequence.pages[-1] if sequence.pages else None)
        if found is None:
            return False
        sequence.pages += found
        return True

    def close(self, sequence: Sequence) -> None:
        """Gives back the slot and the sequence's references to pages."""
        self._check_open(sequence)
        for page in sequence.pages:
            self._pages.drop(page)
        self._slots.give(sequence.slot)
        sequence.slot, sequence.pages = -1, []

    def fork(self, sequence: Sequence) -> Sequence | None:
        """A second sequence that has read the same: full pages are shared, the rest copied. None: no slot or pages."""
        self._check_open(sequence)
        # Where the draft block lags, it will write into pages that the trunk has filled: those are copied too.
        settled = min(sequence.length, sequence.mtp_length + 1) if sequence.mtp_length else sequence.length
        used = max(sequence.length, sequence.mtp_length + 1 if sequence.mtp_length else 0)
        shared, end = settled // self.page if self.unit.kv_token else 0, self.pages_for(used)
        copies = self._pages.take(end - shared, None) if self.free_slots else None
        if copies is None:
            return None
        if copies:
            self.kv[:, :, copies] = self.kv[:, :, sequence.pages[shared:end]]
        slot = self._slots.take()
        assert slot is not None
        self._copy_slot(sequence.slot, slot)
        for page in sequence.pages[:shared]:
            self._pages.hold(page)
        return Sequence(slot, sequence.pages[:shared] + copies, sequence.length, sequence.mtp_length)

    # pages shared between sequences and whoever keeps them

    def hold(self, page: int) -> None:
        """One more reference to a page in use."""
        self._pages.hold(page)

    def drop(self, page: int) -> None:
        """One reference less; without any the page is free."""
        self._pages.drop(page)

    def references(self, page: int) -> int:
        return self._pages.counts[page]

    def copy_page(self, page: int, rows: int) -> int | None:
        """A new page, held once, with the first `rows` tokens of another; None: no page is free."""
        copies = self._pages.take(1, None)
        if copies is None:
            return None
        self.kv[:, :, copies[0], :rows] = self.kv[:, :, page, :rows]
        return copies[0]

    # snapshots

    def snapshot(self, sequence: Sequence) -> Snapshot | None:
        """Mamba's states as they are now; None: no snapshot slot is free."""
        self._check_open(sequence)
        slot = self._snapshots.take()
        if slot is None:
            return None
        self._copy_slot(sequence.slot, slot)
        return Snapshot(slot, sequence.length)

    def release(self, snapshot: Snapshot) -> None:
        if snapshot.slot < 0:
            raise RuntimeError("the snapshot has been released already")
        self._snapshots.give(snapshot.slot)
        snapshot.slot = -1

    def restore(self, snapshot: Snapshot | None, pages: abc.Sequence[int], length: int) -> Sequence | None:
        """A sequence that has read `length` tokens whose keys and values lie in `pages`; None: no slot is free.

        The sequence takes over one reference to each page, so hold shared pages first; a last page that is not full
        will be written to, so give a copy of it. snapshot: of the same length (None in a model without Mamba). The
        draft block counts as having read all pairs within those tokens (`mtp_length = length - 1`).
        """
        if self.config.pattern.count("M") and length and (snapshot is None or snapshot.length != length):
            at = "no snapshot" if snapshot is None else f"a snapshot after {snapshot.length} tokens"
            raise ValueError(f"restore at {length} tokens from {at}: Mamba's states must be those of that place")
        if len(pages) != self.pages_for(length):
            raise ValueError(f"{length} tokens lie in {self.pages_for(length)} pages, not {len(pages)}")
        slot = self._slots.take()
        if slot is None:
            return None
        if snapshot is not None:
            self._copy_slot(snapshot.slot, slot)
        else:
            self.tail[:, slot] = 0
            self.ssm[:, slot] = 0
        return Sequence(slot, list(pages), length, max(0, length - 1) if self.places["mtp"] else 0)

    def view(self, segments: abc.Sequence["Segment"], stack: Stack = "trunk") -> "PagedState":
        """The state of one pass over the segments' tokens, one segment after the other in a batch of one row."""
        from trimaran.engine.paged import PagedState

        return PagedState(self, segments, stack)

    def _copy_slot(self, source: int, target: int) -> None:
        self.tail[:, target] = self.tail[:, source]
        self.ssm[:, target] = self.ssm[:, source]

    def _check_open(self, sequence: Sequence) -> None:
        if sequence.slot < 0:
            raise RuntimeError("the sequence is closed")

    def flat_kv(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one attention layer (trunk first, then MTP) by place: [pages * page, G, K] each."""
        return self._flat[layer]

    def reads_long(self) -> bool:
        """Whether ops.native reads the keys of a prompt's many queries where they lie."""
        return bool(self._flat) and native.takes_long_attention(self._flat[0][0], *self._flat[0])


def checked_ssm_dtype(asked: torch.dtype | None, model: torch.dtype) -> torch.dtype:
    """The dtype of SSM states: at least fp32, or fp16 where that is asked for."""
    wide = torch.promote_types(model, torch.float32)
    if asked in (None, wide):
        return wide
    if asked is not torch.float16:
        raise Refusal(f"ssm_dtype = {asked}", f"{wide} or torch.float16", "leave ssm_dtype out")
    return torch.float16


def share_out(unit: Unit, budget: int, rows: int, snapshots: int) -> tuple[int, int, int]:
    """Rows, snapshots and pages that fit into `budget` bytes."""
    row = unit.row_bytes + unit.page_bytes
    fits = budget // row if row else rows
    if not fits:
        needed = f"{readable(row)} for one row ({readable(unit.row_bytes)}) and its first page ({unit.page} tokens x "
        raise Refusal(
            f"a memory of {readable(budget)}",
            f"at least {needed}{readable(unit.kv_token)})",
            "raise the budget, or lower page or draft",
        )
    rows = min(rows, fits)
    left = budget - rows * row
    if unit.snapshot_bytes:
        half = left // 2 if unit.page_bytes else left
        snapshots = min(snapshots, half // unit.snapshot_bytes)
        left -= snapshots * unit.snapshot_bytes
    pages = rows + left // unit.page_bytes if unit.page_bytes else 0
    return rows, snapshots, pages


def readable(count: int) -> str:
    """Bytes with a fitting unit."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
