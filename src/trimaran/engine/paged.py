"""One pass over many sequences at once: the state of a flat batch [1, N] that lives in pages and slots.

    view = memory.view([Segment(a, 5), Segment(b, 1), Segment(c, 4, trial=True)])
    hidden_1ND = model.hidden(tokens_1N, state=view)     # 5 tokens of a, 1 of b, 4 of c
    view.keep([5, 1, 2])                                 # of c's four tokens two stay, the rest never happened

To the layers it is a state like any other. Attention writes the new keys and values into pages and reads along a plan
(engine/reach.py). Mamba layers run segments of equal length as one batch, in place where their slots are neighbours. A
trial writes nothing to a slot until `keep` says what stays: small states are kept after each of the trial's tokens, and
the last that stays is copied; large ones are folded from what its tokens would have written. If a pass raises, the
sequences of segments that are no trials are unusable: close them.

Shapes: N tokens of all segments, S segments of one group, K tokens of each.
"""

from collections import abc, defaultdict
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trimaran.engine.pages import STEPPED_BYTES, STEPS, Memory, Sequence, Stack
from trimaran.engine.reach import Plan, Rules, Span, neighbours, plan, shared_runs
from trimaran.model.layout import Layout
from trimaran.model.state import Convolution, Mixer
from trimaran.ops import conv, native, native_stack, ssd
from trimaran.ops.numbers import at_least_fp32
from trimaran.ops.rounding import chances, key_of, stochastic_round


@dataclass(frozen=True)
class Segment:
    """The next `count` tokens of a sequence; trial: how many of them stay is said afterwards."""

    sequence: Sequence
    count: int
    trial: bool = False


class FlatLayout(Layout):
    """Tokens of many sequences in one row, each at its place in its own sequence."""

    def __init__(self, spans: list[Span], length: int, device: torch.device):
        super().__init__(1, length, device, start=None)
        self.spans = spans

    @cached_property
    def place_BT(self) -> Tensor:
        """Made when asked for: only rotary positions do."""
        places = [place for span in self.spans for place in range(span.before, span.before + span.count)]
        return torch.tensor([places], device=self.device)


class PagedState:
    """The memory of one stack of layers for one pass over `segments`. Made by `Memory.view`; without gradient."""

    batch = 1

    def __init__(self, memory: Memory, segments: abc.Sequence[Segment], stack: Stack = "trunk"):
        self.memory, self.segments, self.stack, self.version = memory, list(segments), stack, memory.version
        self.before = [s.sequence.length if stack == "trunk" else s.sequence.mtp_length for s in segments]
        self.shift = 0 if stack == "trunk" else 1
        self._check()
        self.length = sum(segment.count for segment in segments)
        self.longest = max(before + s.count for before, s in zip(self.before, segments))
        self.spans, start = [], 0
        for segment, before in zip(segments, self.before):
            self.spans.append(Span(start, segment.count, before, segment.sequence.pages))
            start += segment.count
        config, page, device = memory.config, memory.page, memory.device
        key_bytes = 2 * config.num_key_value_heads * config.head_dim * memory.dtype.itemsize
        self.rules = Rules(page, self.shift, key_bytes, device, memory.ragged, memory.sharing, memory.reads_long())
        self._plans: dict[int | None, Plan] = {}
        self.groups = group(self)
        self.stepped = sum(g.count * len(g.order) for g in self.groups if g.trial and g.count <= STEPS)  # tokens
        self.layers = self._layers()
        self.done = self.kept = False

    def _check(self) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError("a paged pass writes in place: run it under torch.no_grad()")
        if not self.segments:
            raise ValueError("a pass needs at least one segment")
        if len({id(segment.sequence) for segment in self.segments}) < len(self.segments):
            raise ValueError("a sequence stands twice in one pass: join its tokens in one segment")
        for segment, before in zip(self.segments, self.before):
            if segment.sequence.slot < 0:
                raise RuntimeError("a segment's sequence is closed")
            needed = self.memory.pages_for(before + segment.count + self.shift)
            if segment.count < 1 or len(segment.sequence.pages) < needed:
                held = f"{len(segment.sequence.pages)} pages, {needed} needed"
                raise ValueError(f"a segment of {segment.count} tokens behind {before} ({held}): reserve them first")

    def _layers(self) -> list["PagedAttention | PagedMamba | None"]:
        memory, attention, mamba = self.memory, 0, 0
        pattern = memory.config.pattern if self.stack == "trunk" else memory.config.mtp_pattern
        first = 0 if self.stack == "trunk" else len(memory.places["trunk"])
        layers: list[PagedAttention | PagedMamba | None] = []
        for index, letter in enumerate(pattern):
            if letter == "M":
                layers.append(PagedMamba(self, mamba))
                mamba += 1
            elif index in memory.places[self.stack]:
                layers.append(PagedAttention(self, first + attention))
                attention += 1
            else:
                layers.append(None)
        return layers

    def lay_out(self, length: int, doc_ids_BT: Tensor | None) -> Layout:
        """The layout of the pass."""
        if self.done:
            raise RuntimeError("the view has made its pass: make another with memory.view")
        if doc_ids_BT is not None or length != self.length:
            raise ValueError(f"{length} tokens for segments of {self.length}, which are documents of their own")
        return FlatLayout(self.spans, length, self.memory.device)

    def keys(self, layout: Layout) -> int:
        """Keys of the longest sequence after the pass."""
        return self.longest

    def advance(self, layout: Layout, doc_ids_BT: Tensor | None) -> None:
        """Moves the sequences past the pass; those on trial move when `keep` says how far."""
        self.done = True
        for segment, before in zip(self.segments, self.before):
            if not segment.trial:
                self._move(segment.sequence, before + segment.count)

    def _move(self, sequence: Sequence, length: int) -> None:
        if self.stack == "trunk":
            sequence.length = length
        else:
            sequence.mtp_length = length

    def keep(self, counts: abc.Sequence[int]) -> None:
        """Ends the trials: of segment i the first `counts[i]` tokens stay. Segments that are no trials keep all."""
        if not self.done or self.kept:
            raise RuntimeError("keep() once, after the pass")
        if len(counts) != len(self.segments):
            raise ValueError(f"{len(counts)} counts for {len(self.segments)} segments")
        for kept, segment in zip(counts, self.segments):
            if not (0 if segment.trial else segment.count) <= kept <= segment.count:
                raise ValueError(f"keep {kept} of {segment.count} tokens (trial: {segment.trial})")
        self.kept = True
        layers = [layer for layer in self.layers if isinstance(layer, PagedMamba)]
        left = [layer.left for layer in layers if layer.left is not None]
        if left:
            native_stack.keep(left, [counts[place] for place in self.groups[0].order])
        for layer in layers:
            layer.keep(counts)
        for kept, segment, before in zip(counts, self.segments, self.before):
            if segment.trial:
                self._move(segment.sequence, before + kept)

    @cached_property
    def written(self) -> slice | Tensor:
        """Where the pass's keys and values go."""
        page, shift = self.rules.page, self.shift
        places = [
            span.pages[place // page] * page + place % page
            for span in self.spans
            for place in range(span.before + shift, span.before + shift + span.count)
        ]
        return run_of(places, self.memory.device)

    @cached_property
    def apart(self) -> native.Table | None:
        """Where each sequence's keys lie, for passes of few tokens that share no keys worth reading once."""
        few = max(span.count for span in self.spans) <= STEPS
        chosen = self.rules.ragged == "auto" and self.rules.sharing != "always" and self.memory.device.type == "cpu"
        if not few or not chosen or any(True for _ in shared_runs(self.spans, self.rules)):
            return None
        starts = [[page * self.rules.page for page in span.pages] for span in self.spans]
        counts, before = [span.count for span in self.spans], [span.before for span in self.spans]
        return native.table(starts, counts, before, self.rules.page, self.shift)

    def bytes_apart(self, window: int | None) -> int:
        """Bytes of keys and values that a layer reads where each sequence reads its own."""
        keys = sum(
            span.before + span.count if window is None else min(span.before, window - 1) + span.count
            for span in self.spans
        )
        return keys * self.rules.key_bytes

    def plan(self, window: int | None) -> Plan:
        """What attention layers with this window read, worked out once for all of them."""
        if window not in self._plans:
            self._plans[window] = plan(self.spans, window, self.rules)
        return self._plans[window]


class PagedAttention:
    """One attention layer's keys and values in the pool."""

    def __init__(self, view: PagedState, layer: int):
        self.view = view
        self.k_SGK, self.v_SGK = view.memory.flat_kv(layer)

    def reach(self, layout: Layout, keys: int, window: int | None) -> native.Reach | None:
        """The pool, for passes whose sequences each read their own keys."""
        at = self.view.apart
        if at is None:
            return None
        self.view.memory.bytes_read += self.view.bytes_apart(window)
        return native.Reach(self.k_SGK, self.v_SGK, at)

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
        """Writes the pass's keys and values to their places, and reads along the plan."""
        self.k_SGK[self.view.written] = k_BTGK[0]
        self.v_SGK[self.view.written] = v_BTGK[0]
        at = self.view.apart
        if at is not None and native.takes_attention(q_BTHK[0], self.k_SGK, self.v_SGK, at.most):
            self.view.memory.bytes_read += self.view.bytes_apart(window)
            return native.attend(q_BTHK[0], self.k_SGK, self.v_SGK, at, window, scale)[None]
        out_NHK, count = self.view.plan(window).read(q_BTHK[0], self.k_SGK, self.v_SGK, scale)
        self.view.memory.bytes_read += count
        return out_NHK[None]


@dataclass(frozen=True)
class Group:
    """Segments of equally many tokens, run as one batch by Mamba layers. order: their numbers in the view."""

    order: list[int]
    count: int
    trial: bool
    tokens: slice | Tensor  # places in the flat batch
    slots: slice | Tensor  # a slice where they are neighbours: then states are views, and steps write in place

    def take(self, x_1NC: Tensor) -> Tensor:
        """The group's tokens [S, K, ...]."""
        shape = (len(self.order), self.count, *x_1NC.shape[2:])
        if isinstance(self.tokens, slice):
            whole = self.tokens.stop - self.tokens.start == x_1NC.shape[1]
            return (x_1NC if whole else x_1NC[:, self.tokens]).view(shape)
        return x_1NC[0].index_select(0, self.tokens).view(shape)


def group(view: PagedState) -> list[Group]:
    """The view's segments by length and trial, each in the order of slots, cut where slots are no neighbours."""
    alike: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for number, segment in enumerate(view.segments):
        alike[segment.count, segment.trial].append(number)
    groups = []
    for (count, trial), numbers in alike.items():
        numbers.sort(key=lambda number: view.segments[number].sequence.slot)
        runs: list[list[int]] = []
        for number in numbers:
            slot = view.segments[number].sequence.slot
            if runs and view.segments[runs[-1][-1]].sequence.slot == slot - 1:
                runs[-1].append(number)
            else:
                runs.append([number])
        # Copying states costs about as much as a step; many short runs cost more in calls.
        for run in runs if len(numbers) >= 4 * len(runs) or len(runs) == 1 else [numbers]:
            groups.append(Group(run, count, trial, tokens_of(view, run), slots_of(view, run)))
    return groups


def tokens_of(view: PagedState, numbers: list[int]) -> slice | Tensor:
    spans = [view.spans[number] for number in numbers]
    return run_of([place for s in spans for place in range(s.start, s.start + s.count)], view.memory.device)


def slots_of(view: PagedState, numbers: list[int]) -> slice | Tensor:
    return run_of([view.segments[number].sequence.slot for number in numbers], view.memory.device)


def run_of(numbers: list[int], device: torch.device) -> slice | Tensor:
    """An index of `numbers`: a slice where each is one more than the last."""
    if neighbours(numbers):
        return slice(numbers[0], numbers[-1] + 1)
    return torch.tensor(numbers, device=device)


@dataclass
class Written:
    """What a trial's tokens would have written: the tails and the states after each of them; or, where those would be
    much to move, what states are folded from: [S, K, ...] each."""

    window_SXC: Tensor
    states_KSHPN: Tensor | None = None
    x: Tensor | None = None
    B: Tensor | None = None
    dt: Tensor | None = None
    A: Tensor | None = None


class PagedMamba:
    """One Mamba layer's tails and states in their slots."""

    def __init__(self, view: PagedState, layer: int):
        self.view, self.layer = view, layer
        self.tail, self.ssm = view.memory.tail[layer], view.memory.ssm[layer]
        self.trials: dict[int, Written] = {}
        self.left: native_stack.Tried | None = None  # of a trial of one group that a kernel has made

    def slots(self, layout: Layout) -> native.Slots | None:
        """Passes of one group, whose tokens are the whole pass in order: single tokens, or a short trial."""
        groups = self.view.groups
        group = groups[0]
        if len(groups) > 1 or not isinstance(group.tokens, slice):
            return None
        if not (self._steps(group) if group.trial else group.count == 1):
            return None
        tail, ssm, slots = self.tail, self.ssm, None
        if isinstance(group.slots, slice):
            tail, ssm = tail[group.slots], ssm[group.slots]
        else:
            slots = group.slots
        return native.Slots(tail, ssm, len(group.order), group.count, slots, group.trial)

    def tried(self, left: native_stack.Tried) -> None:
        """Kept until `keep` says what stays."""
        self.left = left

    def mix(self, mixer: Mixer, projected_BTC: Tensor, layout: Layout) -> Tensor | None:
        """Passes of single tokens and of short trials: each group in one call, its slots wherever they are."""
        groups = self.view.groups
        if not all(self._steps(group) if group.trial else group.count == 1 for group in groups):
            return None
        if not mixer.takes(projected_BTC, self.tail, self.ssm):
            return None
        out_1NC = None
        for number, group in enumerate(groups):
            projected_SKC, tail, ssm, slots = group.take(projected_BTC), self.tail, self.ssm, None
            if isinstance(group.slots, slice):
                tail, ssm = tail[group.slots], ssm[group.slots]
            else:
                slots = group.slots
            y_SKC, states_KSHPN = mixer.few(projected_SKC, tail, ssm, slots, group.trial)
            if group.trial:
                inner = y_SKC.shape[-1]
                inputs_SKC = projected_SKC[..., inner : inner + tail.shape[-1]]
                window_SXC = conv.join_tail(inputs_SKC, tail.shape[1] + 1, tail if slots is None else tail[slots])
                self.trials[number] = Written(window_SXC, states_KSHPN)
            out_1NC = self._place(y_SKC, group, out_1NC)
        return out_1NC

    def convolve(self, conv1d: Convolution, inputs_BTC: Tensor, layout: Layout) -> Tensor:
        """The short convolution behind each slot's tail."""
        out_1NC = None
        for number, group in enumerate(self.view.groups):
            inputs_SKC, tail_SWC = group.take(inputs_BTC), self.tail[group.slots]
            if group.trial or group.count == 1:
                mixed_SKC, window_SXC = conv1d.few(inputs_SKC, tail_SWC)
                if group.trial:
                    self.trials[number] = Written(window_SXC)
                else:
                    self.tail[group.slots] = window_SXC[:, 1:]
            else:
                mixed_SKC = conv1d(inputs_SKC, tail_SWC, None)
                self.tail[group.slots] = conv.next_tail(inputs_SKC, conv1d.taps, tail_SWC)
            out_1NC = self._place(mixed_SKC, group, out_1NC)
        assert out_1NC is not None
        return out_1NC

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
        """The recurrence from each slot's state."""
        out_1NHP = None
        for number, group in enumerate(self.view.groups):
            x, dt, B, C = (group.take(t) for t in (x_BTHP, dt_BTH, B_BTGN, C_BTGN))
            before_SHPN = self._load(group)
            if group.trial and self._steps(group):
                y_SKHP, self.trials[number].states_KSHPN = ssd.ssd_steps(x, dt, A_H, B, C, before_SHPN)
            elif group.trial:
                written = self.trials[number]
                written.x, written.B, written.dt, written.A = x, B, dt, A_H
                if group.count <= ssd.CPU_CHUNK:
                    y_SKHP = ssd.ssd_look(x, dt, A_H, B, C, before_SHPN)
                else:
                    y_SKHP = ssd.ssd(x, dt, A_H, B, C, before_SHPN, None, chunk)[0]
            elif group.count == 1:
                y_SHP, after = ssd.ssd_step(x[:, 0], dt[:, 0], A_H, B[:, 0], C[:, 0], before_SHPN, in_place=True)
                y_SKHP = y_SHP[:, None]
            else:
                y_SKHP, after = ssd.ssd(x, dt, A_H, B, C, before_SHPN, None, chunk)
            if not group.trial:
                self._store(group, after, [group.count] * len(group.order))
            out_1NHP = self._place(y_SKHP, group, out_1NHP)
        assert out_1NHP is not None
        return out_1NHP

    def _steps(self, group: Group) -> bool:
        """Whether a trial keeps the state after each of its tokens; else it moves the state once, when it is kept."""
        each = self.ssm[0].numel() * torch.promote_types(self.ssm.dtype, torch.float32).itemsize
        return group.count <= STEPS and self.view.stepped * each <= STEPPED_BYTES

    def keep(self, counts: abc.Sequence[int]) -> None:
        """Moves each slot on by the first counts[i] tokens of its segment on trial."""
        taps = self.tail.shape[1] + 1
        for number, written in self.trials.items():
            group = self.view.groups[number]
            kept = [counts[place] for place in group.order]
            self.tail[group.slots] = conv.tail_after(written.window_SXC, taps, kept)
            if written.states_KSHPN is not None:
                self._pick(group, written.states_KSHPN, kept)
                continue
            kept_S = torch.tensor(kept, device=self.tail.device)
            assert written.x is not None and written.dt is not None and written.A is not None and written.B is not None
            real_SK = torch.arange(group.count, device=kept_S.device) < kept_S[:, None]
            dt_SKH = written.dt * real_SK[..., None]
            after = ssd.ssd_fold(written.x, dt_SKH, written.A, written.B, self._load(group), in_place=True)
            self._store(group, after, kept)
        self.trials.clear()
        self.left = None

    def _pick(self, group: Group, states_KSHPN: Tensor, kept: list[int]) -> None:
        """Puts the state after kept[i] tokens into the group's i-th slot."""
        if min(kept) == max(kept) > 0:
            self._store(group, states_KSHPN[kept[0] - 1], kept)
            return
        kept_S = torch.tensor(kept, device=states_KSHPN.device)
        after_SHPN = states_KSHPN[(kept_S - 1).clamp_(min=0), torch.arange(len(kept), device=kept_S.device)]
        if min(kept) == 0:  # a row that keeps nothing stays where it was
            after_SHPN = torch.where((kept_S > 0)[:, None, None, None], after_SHPN, self._load(group))
        self._store(group, after_SHPN, kept)

    def _place(self, x_SKC: Tensor, group: Group, out_1NC: Tensor | None) -> Tensor:
        """The group's results in the flat batch."""
        if len(self.view.groups) == 1 and isinstance(group.tokens, slice):
            return x_SKC.reshape(1, -1, *x_SKC.shape[2:])
        if out_1NC is None:
            out_1NC = x_SKC.new_empty(1, self.view.length, *x_SKC.shape[2:])
        out_1NC[0, group.tokens] = x_SKC.flatten(0, 1)
        return out_1NC

    def _load(self, group: Group) -> Tensor:
        """The group's states in at least fp32: a view of the pool where they lie there so."""
        states = self.ssm[group.slots]
        return states.double() if self.tail.dtype == torch.float64 else at_least_fp32(states)

    def _store(self, group: Group, after_SHPN: Tensor, counts: list[int]) -> None:
        """Puts the group's states back, after `counts` more tokens, unless they are the pool's own memory."""
        if after_SHPN.dtype != self.ssm.dtype:
            keys = [key_of(self.layer, self.view.before[number] + count) for number, count in zip(group.order, counts)]
            chance = chances(keys, after_SHPN[0].numel(), after_SHPN.device).view(after_SHPN.shape)
            after_SHPN = stochastic_round(after_SHPN, chance, self.ssm.dtype)
        first = group.slots.start if isinstance(group.slots, slice) else 0
        if not isinstance(group.slots, slice) or after_SHPN.data_ptr() != self.ssm[first].data_ptr():
            self.ssm[group.slots] = after_SHPN
