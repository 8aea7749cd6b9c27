"""Where the tokens of one forward pass stand: which row, which document, which position, which are padding.

Worked out once per pass and shared by every layer. Padding anywhere in a row is moved to its right end first (and the
outputs moved back), so layers only meet rows that are shorter than T: left padding changes nothing by construction.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from trimaran.ops import native, rope

PADDING = -1  # the document id that marks padding


@dataclass
class Layout:
    """One pass over tokens [B, T] that follow the `start` tokens each row has already seen.

    start: tokens before this pass, when all rows agree (no device sync needed); start_B: the same per row.
    count_B: real tokens per row, or None when all T are. reset_BT: True where a new document begins, or None when no
    row begins one. first_BT: position in the row of the first token of each token's document, or None when it is 0.
    order_BT: the permutation that moved padding to the right, or None.
    """

    batch: int
    length: int
    device: torch.device
    start: int | None = 0
    start_B: Tensor | None = None
    count_B: Tensor | None = None
    reset_BT: Tensor | None = None
    first_BT: Tensor | None = None
    last_id_B: Tensor | None = None  # document id of each row after this pass
    order_BT: Tensor | None = None
    _rows: dict[int, native.Table] = field(default_factory=dict)
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)
    _tables: dict[tuple[float, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def seg_BT(self) -> Tensor | None:
        """Documents numbered from 0 = the one the carried state belongs to; padding repeats the last."""
        return None if self.reset_BT is None else self.reset_BT.cumsum(1)

    @property
    def real_BT(self) -> Tensor | None:
        """True on tokens, False on padding; None when there is no padding."""
        if self.count_B is None:
            return None
        return torch.arange(self.length, device=self.device) < self.count_B[:, None]

    @property
    def place_BT(self) -> Tensor:
        """Position of each token in its row, counted from the row's first token ever: [B, T] (or [1, T])."""
        steps = torch.arange(self.length, device=self.device)
        if self.start is not None:
            return (steps + self.start)[None]
        assert self.start_B is not None
        return self.start_B[:, None] + steps

    @property
    def keys(self) -> int | None:
        """Keys every row has after this pass, when all rows agree."""
        return None if self.start is None or self.count_B is not None else self.start + self.length

    @property
    def goes_on(self) -> bool:
        """Whether several tokens follow what all rows have read, in one document and without padding."""
        return bool(self.start) and self.length > 1 and self.keys is not None and self.first_BT is None

    def positions_BT(self) -> Tensor:
        """Position of each token within its document."""
        return self.place_BT if self.first_BT is None else self.place_BT - self.first_BT

    def rotary_table(self, freq_K: Tensor, key: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin for this pass's positions, computed once for all layers of the same `key`."""
        if key not in self._tables:
            self._tables[key] = rope.rotary_table(self.positions_BT(), freq_K, dtype)
        return self._tables[key]

    def rows_in(self, capacity: int) -> native.Table:
        """Where each row's keys lie in buffers [B, capacity, ...], computed once for all layers of that capacity."""
        if capacity not in self._rows:
            assert self.start is not None
            starts = [[row * capacity] for row in range(self.batch)]
            counts, before = [self.length] * self.batch, [self.start] * self.batch
            self._rows[capacity] = native.table(starts, counts, before, capacity)
        return self._rows[capacity]

    def mask(self, keys: int, window: int | None = None, first: int = 0) -> tuple[Tensor | None, bool]:
        """Which of the keys first .. keys each token may see, as (mask, causal) for ops.attention."""
        plain = self.first_BT is None and self.keys is not None and window is None
        if plain and self.length == 1:
            return None, False
        if plain and self.start == 0:
            return None, True
        if (window, first) not in self._masks:
            self._masks[window, first] = self._visible(keys, window, first)
        return self._masks[window, first], False

    def _visible(self, keys: int, window: int | None, first: int) -> Tensor:
        last_BT = self.place_BT
        first_BT = torch.zeros_like(last_BT) if self.first_BT is None else self.first_BT
        if window is not None:
            first_BT = torch.maximum(first_BT, last_BT - window + 1)
        real_BT = self.real_BT
        if real_BT is not None:  # padding looks at the first key: any finite answer will do, and NaN would not
            first_BT, last_BT = first_BT.where(real_BT, first), last_BT.where(real_BT, first)
        key_S = torch.arange(first, keys, device=self.device)
        mask = (key_S >= first_BT[..., None]) & (key_S <= last_BT[..., None])
        return mask[0] if len(mask) == 1 else mask

    def arrange(self, x_BT: Tensor) -> Tensor:
        """Moves padding to the right."""
        return x_BT if self.order_BT is None else x_BT.gather(1, self.order_BT)

    def restore(self, x_BTD: Tensor) -> Tensor:
        """Undoes `arrange`; padding comes out as zeros."""
        real_BT = self.real_BT
        if real_BT is not None:
            x_BTD = x_BTD.masked_fill(~real_BT[..., None], 0)
        if self.order_BT is None:
            return x_BTD
        return x_BTD.gather(1, self.order_BT.argsort(1)[..., None].expand_as(x_BTD))


def lay_out(
    batch: int,
    length: int,
    device: torch.device,
    doc_ids_BT: Tensor | None = None,
    start: int | None = 0,
    start_B: Tensor | None = None,
    first_B: Tensor | None = None,
    last_id_B: Tensor | None = None,
) -> Layout:
    """The layout of a pass over [batch, length] tokens.

    doc_ids_BT: the same id as the token before continues its document, another begins one, -1 is padding. None: every
    token is real and continues what the row was reading. start, start_B, first_B, last_id_B: what the state remembers.
    """
    layout = Layout(batch, length, device, start, start_B, last_id_B=last_id_B)
    if doc_ids_BT is None:
        if first_B is not None:
            layout.first_BT = first_B[:, None].expand(batch, length)
        return layout
    if doc_ids_BT.shape != (batch, length):
        raise ValueError(f"doc_ids have shape {tuple(doc_ids_BT.shape)}, tokens ({batch}, {length}): make them equal")
    pad_BT = doc_ids_BT == PADDING
    if bool(pad_BT.any()):
        layout.count_B = length - pad_BT.sum(1)
        if bool((pad_BT[:, :-1] & ~pad_BT[:, 1:]).any()):
            layout.order_BT = pad_BT.to(torch.int8).argsort(dim=1, stable=True)
            doc_ids_BT = doc_ids_BT.gather(1, layout.order_BT)
    find_documents(layout, doc_ids_BT, first_B)
    return layout


def find_documents(layout: Layout, doc_ids_BT: Tensor, first_B: Tensor | None) -> None:
    """Fills reset_BT, first_BT and last_id_B from ids whose padding stands on the right."""
    if layout.last_id_B is None:
        before_B = doc_ids_BT[:, 0] if layout.start == 0 else torch.zeros_like(doc_ids_BT[:, 0])
    else:
        before_B = layout.last_id_B
        if layout.start_B is not None:  # a row that has seen nothing begins with whatever comes
            before_B = torch.where(layout.start_B.eq(0), doc_ids_BT[:, 0], before_B)
    real_BT, count_B = layout.real_BT, layout.count_B
    reset_BT = doc_ids_BT != torch.cat([before_B[:, None], doc_ids_BT[:, :-1]], 1)
    if real_BT is None:
        layout.last_id_B = doc_ids_BT[:, -1]
    else:
        assert count_B is not None
        reset_BT &= real_BT
        final_B = doc_ids_BT.gather(1, (count_B - 1).clamp(min=0)[:, None])[:, 0]
        layout.last_id_B = torch.where(count_B > 0, final_B, before_B)
    began = bool(reset_BT.any())
    if began:
        layout.reset_BT = reset_BT
    if began or first_B is not None:
        carried_B1 = torch.zeros_like(before_B)[:, None] if first_B is None else first_B[:, None]
        # Places rise along the row, so the latest border at or before a token is a running maximum.
        layout.first_BT = torch.where(reset_BT, layout.place_BT, carried_B1).cummax(1).values
