"""Decoding as one captured step: every running row reads one token, and the host only presses a button.

    step = CapturedStep(model, memory, rows=8, longest=9000)
    logits_NV = step(tokens_N, sequences)        # the same as a pass over single-token segments (engine/paged.py)

A pass of single tokens takes the host longer to describe than a GPU to make. Here all that changes from step to step
lies in tensors that stay where they are: tokens, slots, lengths, tables of pages. On a GPU the first step of a set of
buffers runs as it is, which compiles what needs compiling; the second is captured as a CUDA graph, and from then on
replayed. Elsewhere every step runs as it is, through the same code, which is how it is tested.

Within a step nothing is asked of the device: places are worked out there, attention reads along the tables
(ops/paged.py), lengths move on by themselves. The host writes to the buffers only when rows come, go or get a page.
"""

from collections import abc

import torch
from torch import Tensor

from trimaran.engine.pages import Memory, Sequence
from trimaran.errors import Refusal
from trimaran.model.hybrid import HybridModel
from trimaran.model.layout import Layout
from trimaran.model.state import Convolution, Mixer
from trimaran.ops import ssd, triton_backend
from trimaran.ops.numbers import at_least_fp32
from trimaran.ops.paged import paged_attention
from trimaran.ops.rounding import chances, keys_of, stochastic_round


class StepLayout(Layout):
    """One token of each of N sequences in one row, each at the place that `length_N` says."""

    def __init__(self, length_N: Tensor):
        super().__init__(1, len(length_N), length_N.device, start=None)
        self.length_N = length_N

    @property
    def place_BT(self) -> Tensor:
        return self.length_N[None]


class StepState:
    """The memory of one step's pass, all of it in tensors: what model.hidden asks of a state."""

    batch = 1

    def __init__(self, memory: Memory, rows: int, longest: int):
        device, config = memory.device, memory.config
        self.memory, self.version = memory, memory.version
        self.slot_N = torch.zeros(rows, dtype=torch.int64, device=device)
        self.length_N = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens read before the step
        self.table_NP = torch.zeros(rows, max(1, memory.pages_for(longest)), dtype=torch.int64, device=device)
        mamba, attention = iter(range(config.pattern.count("M"))), iter(range(len(memory.places["trunk"])))
        self.layers: list[StepAttention | StepMamba | None] = []
        for index, letter in enumerate(config.pattern):
            if letter == "M":
                self.layers.append(StepMamba(self, next(mamba)))
            else:
                kept = index in memory.places["trunk"]
                self.layers.append(StepAttention(self, next(attention)) if kept else None)

    def lay_out(self, length: int, doc_ids_BT: Tensor | None) -> Layout:
        """The layout of the pass."""
        if doc_ids_BT is not None or length != len(self.length_N):
            raise ValueError(f"{length} tokens for a step of {len(self.length_N)} rows, a document each")
        return StepLayout(self.length_N)

    def keys(self, layout: Layout) -> int:
        """Keys that there is room for."""
        return self.table_NP.shape[1] * self.memory.page

    def advance(self, layout: Layout, doc_ids_BT: Tensor | None) -> None:
        """Moves all rows on by their token."""
        self.length_N.add_(1)


class StepAttention:
    """One attention layer's keys and values in the pool, along the tables."""

    def __init__(self, state: StepState, layer: int):
        self.state = state
        self.k_XGK, self.v_XGK = state.memory.flat_kv(layer)

    def reach(self, layout: Layout, keys: int, window: int | None) -> None:
        """Nothing that the host knows."""

    def attend(
        self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, layout: Layout, keys: int, window: int | None,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """Writes the tokens' keys and values to their places and reads along the tables."""
        state, page = self.state, self.state.memory.page
        before_N1 = state.length_N[:, None]
        place_N = (state.table_NP.gather(1, before_N1 // page) * page + before_N1 % page)[:, 0]
        self.k_XGK.index_copy_(0, place_N, k_BTGK[0])
        self.v_XGK.index_copy_(0, place_N, v_BTGK[0])
        at = state.table_NP, state.length_N + 1, page
        return paged_attention(q_BTHK[0], self.k_XGK, self.v_XGK, *at, window, scale)[None]


class StepMamba:
    """One Mamba layer's tails and states in their slots."""

    def __init__(self, state: StepState, layer: int):
        self.state, self.layer = state, layer
        self.tail, self.ssm = state.memory.tail[layer], state.memory.ssm[layer]

    def slots(self, layout: Layout) -> None:
        """Nothing that the host knows."""

    def mix(self, mixer: Mixer, projected_BTC: Tensor, layout: Layout) -> Tensor | None:
        """All between the projections in one call, where the mixer allows."""
        projected_NKC = projected_BTC[0][:, None]
        if not mixer.takes(projected_NKC, self.tail, self.ssm):
            return None
        return mixer.few(projected_NKC, self.tail, self.ssm, self.state.slot_N)[0][:, 0][None]

    def convolve(self, conv1d: Convolution, inputs_BTC: Tensor, layout: Layout) -> Tensor:
        """The short convolution behind each slot's tail."""
        slot_N = self.state.slot_N
        mixed_N1C, window_NXC = conv1d.few(inputs_BTC[0][:, None], self.tail[slot_N])
        self.tail.index_copy_(0, slot_N, window_NXC[:, 1:])
        return mixed_N1C[:, 0][None]

    def scan(
        self, x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, layout: Layout, chunk: int
    ) -> Tensor:
        """The recurrence from each slot's state; a narrow state is rounded by chance."""
        slot_N, count_N, operands = self.state.slot_N, self.state.length_N + 1, (x_BTHP, dt_BTH, B_BTGN, C_BTGN)
        if triton_backend.runs("triton.step", x_BTHP):
            from trimaran.ops import triton_step

            x, dt, B, C = (t[0][:, None] for t in operands)
            return triton_step.step(x, dt, A_H, B, C, self.ssm, slot_N, count_N, self.layer)[0][:, 0][None]
        before = self.ssm[slot_N]
        wide = before.double() if self.tail.dtype == torch.float64 else at_least_fp32(before)
        y_NHP, after = ssd.ssd_step(x_BTHP[0], dt_BTH[0], A_H, B_BTGN[0], C_BTGN[0], wide, in_place=True)
        if after.dtype != self.ssm.dtype:
            chance = chances(keys_of(self.layer, count_N), after[0].numel(), after.device).view(after.shape)
            after = stochastic_round(after, chance, self.ssm.dtype)
        self.ssm.index_copy_(0, slot_N, after)
        return y_NHP[None]


class CapturedStep:
    """Steps of `rows` rows that never grow longer than `longest` tokens. See the file's head."""

    def __init__(self, model: HybridModel, memory: Memory, rows: int, longest: int):
        if not 1 <= rows <= memory.total_slots:
            raise Refusal(f"a step of {rows} rows", f"1 to {memory.total_slots}, the slots", "change rows")
        self.model, self.memory, self.longest, self.version = model, memory, longest, model.version
        self.state = StepState(memory, rows, longest)
        self.token_N = torch.zeros(rows, dtype=torch.int64, device=memory.device)
        self.logits_NV = torch.empty(0)
        self._placed: list[tuple[Sequence, int, int]] = []  # of each row: whose, how many pages, how many tokens
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False

    @torch.no_grad()
    def __call__(self, token_N: Tensor, sequences: abc.Sequence[Sequence]) -> Tensor:
        """Logits [N, vocab] behind one more token of each sequence, whose pages must be reserved; overwritten by the
        next call."""
        if self.model.version != self.version:
            raise RuntimeError(f"a step of weights version {self.version}, model is at {self.model.version}")
        self._place(sequences)
        self.token_N.copy_(token_N)
        if self._graph is None and self._warm and self.token_N.is_cuda:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
        else:
            self.logits_NV = self._run()
            self._warm = True
        for sequence in sequences:
            sequence.length += 1
        # The tensors have moved on by themselves.
        self._placed = [(sequence, pages, length + 1) for sequence, pages, length in self._placed]
        return self.logits_NV

    def _run(self) -> Tensor:
        hidden_1ND = self.model.hidden(self.token_N[None], state=self.state)
        return self.model.head(hidden_1ND)[0]

    def _capture(self) -> None:
        """Records the step; recording runs nothing."""
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.logits_NV = self._run()

    def _place(self, sequences: abc.Sequence[Sequence]) -> None:
        """Writes what differs from where the tensors stand: new rows, new pages."""
        if len(sequences) != len(self.token_N):
            raise ValueError(f"{len(sequences)} sequences for a step of {len(self.token_N)}")
        if len({id(sequence) for sequence in sequences}) < len(sequences):
            raise ValueError("a sequence stands twice in one step")
        wanted = [(sequence, len(sequence.pages), sequence.length) for sequence in sequences]
        for sequence, pages, length in wanted:
            if sequence.slot < 0 or pages < self.memory.pages_for(length + 1) or length >= self.longest:
                held = f"slot {sequence.slot}, {pages} pages, {length} of at most {self.longest} tokens"
                raise ValueError(f"no room for one more token ({held}): reserve it first")
        if wanted == self._placed:
            return
        for row, now in enumerate(wanted):
            if not self._placed or now != self._placed[row]:
                self._tell(row, now[0])
        self._placed = wanted

    def _tell(self, row: int, sequence: Sequence) -> None:
        """Tells the tensors of one row's sequence."""
        device, pages = self.token_N.device, sequence.pages[: self.state.table_NP.shape[1]]
        numbers = torch.tensor([sequence.slot, sequence.length, *pages], device=device)
        self.state.slot_N[row], self.state.length_N[row] = numbers[0], numbers[1]
        self.state.table_NP[row, : len(pages)] = numbers[2:]
