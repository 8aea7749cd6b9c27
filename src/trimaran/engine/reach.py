"""Which stored keys the queries of one pass read, and in how few pieces.

A pass holds spans: `count` queries each, one span after the other in the flat batch, that see the sequence's `before`
earlier keys and themselves causally. Three rules, each by cost, decide how they are read; the numbers agree:

    share   rows whose tables begin with the same pages read those once, their queries stacked (bifurcated attention,
            arXiv 2403.08845, as a tree); what is their own is read on its own and merged by log-sum-exp
    split   a product per row over its true length, without a copy where its pages are neighbours
    pad     rows with as many queries each as one batched product, gathered and padded to the longest (the two variants
            of BASS, arXiv 2404.15778)

Many queries of one row, a prompt's, are a part of their own, which ops.native reads page by page where it can.

Places are places in the pool of keys, page number * page size + offset. `shift` is 1 for the draft block, whose key i
lies where token i + 1 does.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from trimaran.ops import native
from trimaran.ops.attention import attention, merge, partial_attention, plain_products, worth_sharing

# Bytes of keys and values that could be read in the time that one more attention call takes to start. On a CPU as
# measured on one Zen 4 core: 20 us per call, 14 GB/s.
LAUNCH_BYTES = {"cpu": 1 << 18, "cuda": 1 << 25}
# What a gathered key costs beside one read where it lies: it is read, written and read again, and padded batches are
# large enough to leave the cache.
GATHERED, PADDED = 2, 2.5
SHORT = 64  # queries per row up to which rows are worth sharing and padding


@dataclass(frozen=True)
class Span:
    """One segment's queries: places start .. start + count of the flat batch, behind `before` keys in `pages`."""

    start: int
    count: int
    before: int
    pages: list[int]


@dataclass(frozen=True)
class Rules:
    """What planning knows of the pool, and the choices that settings and tests may force."""

    page: int
    shift: int
    key_bytes: int  # of one key and its value
    device: torch.device
    ragged: Literal["auto", "pad", "split"] = "auto"
    sharing: Literal["auto", "always", "never"] = "auto"
    long: bool = False  # whether ops.native reads the keys of more than SHORT queries where they lie

    @property
    def launch_keys(self) -> float:
        """What one more attention call costs, in keys read."""
        return LAUNCH_BYTES.get(self.device.type, LAUNCH_BYTES["cuda"]) / self.key_bytes


@dataclass(frozen=True)
class Part:
    """`rows` rows of equally many queries, and the places of the keys they look at.

    keys: a slice or [S], read by all; or [rows, S]. merged: the queries look at keys of other parts too.
    table: the only row's pages, for ops.native instead, which wants to know of the window.
    """

    queries: slice | Tensor
    rows: int
    keys: slice | Tensor
    mask: Tensor | None = None
    causal: bool = False
    merged: bool = False
    table: native.Table | None = None
    window: int | None = None

    def operands(self, q_NHK: Tensor, k_SGK: Tensor, v_SGK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Its queries, keys and values, with an axis of rows."""
        q_BTHK = q_NHK[self.queries].unflatten(0, (self.rows, -1))
        k_BSGK, v_BSGK = (taken(t, self.keys) for t in (k_SGK, v_SGK))
        return (q_BTHK, k_BSGK, v_BSGK) if k_BSGK.ndim == 4 else (q_BTHK, k_BSGK[None], v_BSGK[None])


def taken(x_SGK: Tensor, at: slice | Tensor) -> Tensor:
    """x_SGK[at]; for a tensor of places several times quicker on a CPU than indexing with it."""
    return x_SGK[at] if isinstance(at, slice) else x_SGK.index_select(0, at.flatten()).unflatten(0, at.shape)


@dataclass(frozen=True)
class Plan:
    """own: for each query the one part that ends with its own key; common: what several rows, or few, read besides."""

    own: list[Part]
    common: list[Part]

    def read(self, q_NHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, scale: float) -> tuple[Tensor, int]:
        """Attention of all queries over the pool [N, H, K], and the bytes of keys and values that were read."""
        if len(self.own) == 1 and not self.common and isinstance(self.own[0].queries, slice):  # nothing to put together
            return alone(self.own[0], q_NHK, k_SGK, v_SGK, scale)
        dtype, count = q_NHK.dtype, 0
        wide = torch.promote_types(dtype, torch.float32) if self.common else dtype
        out_NHK = torch.empty_like(q_NHK, dtype=wide)
        lse_NH = q_NHK.new_empty(q_NHK.shape[:2], dtype=wide)
        for part in self.own:
            at = part.queries
            if not part.merged:
                own_NHK, read = alone(part, q_NHK, k_SGK, v_SGK, scale)
                out_NHK[at], count = own_NHK.to(wide), count + read
                continue
            q_BTHK, k_BSGK, v_BSGK = part.operands(q_NHK, k_SGK, v_SGK)
            count += k_BSGK.nbytes + v_BSGK.nbytes
            out_BTHK, lse_BTH = partial_attention(q_BTHK, k_BSGK, v_BSGK, part.mask, part.causal, scale)
            out_NHK[at], lse_NH[at] = out_BTHK.flatten(0, 1).to(wide), lse_BTH.flatten(0, 1)
        for part in self.common:
            at, (q_BTHK, k_BSGK, v_BSGK) = part.queries, part.operands(q_NHK, k_SGK, v_SGK)
            count += k_BSGK.nbytes + v_BSGK.nbytes
            more_BTHK, more_BTH = partial_attention(q_BTHK, k_BSGK, v_BSGK, None, False, scale)
            out_NHK[at], lse_NH[at] = merge(out_NHK[at], lse_NH[at], more_BTHK.flatten(0, 1), more_BTH.flatten(0, 1))
        return out_NHK.to(dtype), count


def alone(part: Part, q_NHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, scale: float) -> tuple[Tensor, int]:
    """Attention of queries that look at this part only [N, H, K], and the bytes that were read."""
    if part.table is not None:
        keys = part.table.longest if part.window is None else min(part.table.longest, part.window - 1 + part.table.most)
        out_NHK = native.attend_long(q_NHK[part.queries], k_SGK, v_SGK, part.table, part.window, scale)
        return out_NHK, keys * (k_SGK[0].nbytes + v_SGK[0].nbytes)
    q_BTHK, k_BSGK, v_BSGK = part.operands(q_NHK, k_SGK, v_SGK)
    if plain_products(q_BTHK, k_BSGK):
        out_BTHK = partial_attention(q_BTHK, k_BSGK, v_BSGK, part.mask, part.causal, scale)[0].to(q_BTHK.dtype)
    else:
        out_BTHK = attention(q_BTHK, k_BSGK, v_BSGK, part.mask, part.causal, scale)
    return out_BTHK.flatten(0, 1), k_BSGK.nbytes + v_BSGK.nbytes


def plan(spans: Sequence[Span], window: int | None, rules: Rules) -> Plan:
    """The parts of one pass, for attention over everything before or over a sliding window."""
    own = [many(span, window, rules) for span in spans if rules.long and span.count > SHORT]
    spans = [span for span in spans if not rules.long or span.count <= SHORT]
    common: list[Part] = []
    own_from = [0 if window is None else max(0, span.before - window + 1) for span in spans]  # keys, not places
    merged: set[int] = set()  # rows that look at other parts than their own
    if window is None:
        for rows, first, end in shared_runs(spans, rules):
            keys = places(spans[rows[0]].pages, first, end, rules)
            common.append(Part(queries([spans[row] for row in rows], rules), 1, keys))
            merged.update(rows)
            own_from = [end if row in rows else key for row, key in enumerate(own_from)]
        for row, span in enumerate(spans):
            for end in leading_runs(span, own_from[row], rules):
                common.append(Part(queries([span], rules), 1, places(span.pages, own_from[row], end, rules)))
                merged.add(row)
                own_from[row] = end
    groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for row, span in enumerate(spans):
        groups[span.count, row in merged].append(row)
    for (_, also), rows in groups.items():
        ends = [(spans[row], own_from[row]) for row in rows]
        if pays_to_pad(ends, rules):
            own.append(padded(ends, window, also, rules))
        else:
            own += [single(span, first, window, also, rules) for span, first in ends]
    return Plan(own, common)


def shared_runs(spans: Sequence[Span], rules: Rules) -> Iterator[tuple[list[int], int, int]]:
    """(rows, first key, end key) of every stretch that several rows read and that is worth reading once for them."""
    full = [(span.before + rules.shift) // rules.page if span.count <= SHORT else 0 for span in spans]

    def descend(rows: list[int], page: int, first: int) -> Iterator[tuple[list[int], int, int]]:
        """Rows whose tables agree before `page`, and whose keys from `first` on nobody has been told to read."""
        families: dict[int, list[int]] = defaultdict(list)
        for row in rows:
            if page < full[row]:
                families[spans[row].pages[page]].append(row)
        for family in families.values():
            if len(family) < 2:
                continue
            table, same = spans[family[0]].pages, min(full[row] for row in family)
            for row in family[1:]:
                same = agree_until(table, spans[row].pages, page, same)
            end, begun = same * rules.page - rules.shift, first
            if end > first and (
                rules.sharing == "always" or worth_sharing(len(family), end - first, rules.launch_keys)
            ):
                yield family, first, end
                begun = end
            yield from descend(family, same, begun)

    if rules.sharing != "never" and len(spans) > 1:
        yield from descend(list(range(len(spans))), 0, 0)


def agree_until(one: list[int], other: list[int], start: int, end: int) -> int:
    """The first place in start .. end where the lists differ, or end."""
    if one[start:end] == other[start:end]:
        return end
    return next(i for i in range(start, end) if one[i] != other[i])


def leading_runs(span: Span, first: int, rules: Rules) -> list[int]:
    """Where to cut the keys from `first` on so that each piece but the last lies behind all queries.

    Few queries: pieces that are runs of neighbours, where that is worth more calls, for gathering costs a read and a
    write of every key. Many queries on a CPU: their past from themselves, for its kernel skips what causality hides,
    but not what a mask hides.
    """
    if span.count > SHORT:
        return [span.before] if first < span.before and rules.device.type == "cpu" else []
    page = (first + rules.shift) // rules.page
    last = (span.before + span.count + rules.shift - 1) // rules.page
    if neighbours(span.pages[page : last + 1]):
        return []
    cuts = [
        place * rules.page - rules.shift
        for place in range(page + 1, last + 1)
        if span.pages[place] != span.pages[place - 1] + 1
    ]
    worth = cuts[-1] <= span.before and cuts[-1] - first > len(cuts) * rules.launch_keys
    return cuts if worth else []


def places(pages: list[int], first: int, end: int, rules: Rules) -> slice | Tensor:
    """Places in the pool of keys first .. end of a table: a slice where the pages are neighbours."""
    size, first, end = rules.page, first + rules.shift, end + rules.shift
    run = pages[first // size : -(-end // size)]
    offset = first % size
    if neighbours(run):
        return slice(run[0] * size + offset, run[0] * size + offset + end - first)
    every = torch.tensor(run)[:, None] * size + torch.arange(size)
    return every.flatten()[offset : offset + end - first].to(rules.device)


def adjoining(span: Span, first: int, rules: Rules) -> bool:
    """Whether the span's keys from `first` on lie in pages that are neighbours."""
    last = span.before + span.count + rules.shift - 1
    return neighbours(span.pages[(first + rules.shift) // rules.page : last // rules.page + 1])


def neighbours(run: list[int]) -> bool:
    return run[-1] - run[0] == len(run) - 1 and run == list(range(run[0], run[-1] + 1))


def queries(spans: Sequence[Span], rules: Rules) -> slice | Tensor:
    """The spans' places in the flat batch: a slice where they are neighbours."""
    if all(after.start == span.start + span.count for span, after in pairwise(spans)):
        return slice(spans[0].start, spans[-1].start + spans[-1].count)
    return torch.tensor([i for s in spans for i in range(s.start, s.start + s.count)], device=rules.device)


def pays_to_pad(own: Sequence[tuple[Span, int]], rules: Rules) -> bool:
    """Whether one gathered and padded product costs less than one per row; all in keys read."""
    if rules.ragged != "auto" or len(own) == 1 or own[0][0].count > SHORT:
        return rules.ragged == "pad" and len(own) > 1
    lengths = [span.before + span.count - first for span, first in own]
    gathered = [not adjoining(span, first, rules) for span, first in own]
    apart = sum(length * (GATHERED if copied else 1) + rules.launch_keys for length, copied in zip(lengths, gathered))
    return PADDED * max(lengths) * len(own) + rules.launch_keys < apart


def many(span: Span, window: int | None, rules: Rules) -> Part:
    """One row's many queries for ops.native."""
    starts = [[page * rules.page for page in span.pages]]
    table = native.table(starts, [span.count], [span.before], rules.page, rules.shift)
    return Part(slice(span.start, span.start + span.count), 1, slice(0), table=table, window=window)


def single(span: Span, first: int, window: int | None, merged: bool, rules: Rules) -> Part:
    """One row over its own keys from `first` on."""
    end = span.before + span.count
    keys = places(span.pages, first, end, rules)
    at = slice(span.start, span.start + span.count)
    if span.count == 1:
        return Part(at, 1, keys, merged=merged)
    if first == span.before and (window is None or window >= span.count):
        return Part(at, 1, keys, causal=True, merged=merged)
    mask_TS = torch.ones(span.count, end - first, dtype=torch.bool, device=rules.device).tril_(span.before - first)
    if window is not None:
        mask_TS.triu_(span.before - first - window + 1)
    return Part(at, 1, keys, mask_TS, merged=merged)


def padded(own: Sequence[tuple[Span, int]], window: int | None, merged: bool, rules: Rules) -> Part:
    """Rows of equally many queries over their own keys, padded to the longest."""
    count = own[0][0].count
    longest = max(span.before + count - first for span, first in own)
    deepest = max(len(span.pages) for span, _ in own)
    tables = [span.pages + [0] * (deepest - len(span.pages)) for span, _ in own]
    table_RP, ends_R2 = torch.tensor(tables), torch.tensor([(first, span.before) for span, first in own])
    first_R1, before_R1 = ends_R2[:, :1], ends_R2[:, 1:]
    key_RS = first_R1 + torch.arange(longest)
    # Padding repeats the row's last key: a masked key still meets its value as 0 * v, and 0 * NaN is NaN.
    place_RS = torch.minimum(key_RS, before_R1 + count - 1).add_(rules.shift)
    place_RS = table_RP.gather(1, place_RS // rules.page) * rules.page + place_RS % rules.page
    query_RT1 = (before_R1 + torch.arange(count))[..., None]
    mask_RTS = visible(query_RT1, key_RS[:, None], window).to(rules.device)
    return Part(queries([span for span, _ in own], rules), len(own), place_RS.to(rules.device), mask_RTS, merged=merged)


def visible(query_T1: Tensor, key_S: Tensor, window: int | None) -> Tensor:
    """True where a query may see a key, both numbered within their sequence."""
    mask_TS = key_S <= query_T1
    return mask_TS if window is None else mask_TS & (key_S > query_T1 - window)
