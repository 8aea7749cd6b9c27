"""C++ kernels for a CPU (ops/kernels): whole mixers in decoding, linear maps of few rows, the scan and its neighbours.

Decoding in torch spends its time on starting calls and on weights read in pieces; here each weight is read once, and
what lies between a mixer's projections is one call. Long passes win by staying in a core's cache. The kernels are built
with the wheel, one library per instruction set; where none was built or none fits the processor, `missing` says why and
the torch forms run. No kernel has a gradient: they run without one, or as the forward of a form that has it.

For every kernel `takes_*` says whether it may run and knows the case; the function itself asks nothing more. Tensors
are bf16 or fp32, and contiguous where not said otherwise.
"""

import ctypes
import functools
import platform
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import add
from pathlib import Path

import torch
from torch import Tensor

from trimaran.ops import backend

TURNED = 4  # rows above which x is turned so that lanes are rows
ROWS = 64  # of x, up to which a linear map is quicker here than in torch's matrix library
LANES = 16
MOST_QUERIES, MOST_TOKENS, MOST_CHOICES = 64, 32, 512  # what kernels hold on their stack
LONGEST_CHUNK = 256  # tokens of a chunk of the scan
PIECE = 256  # keys that are worth a task of their own
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16"}
FLAGS = {  # instruction sets, best first, and what /proc/cpuinfo must list
    "amx_bf16": {*_AVX512, "amx_tile", "amx_bf16"},
    "avx512_bf16": _AVX512,
    "avx2": {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"},
}
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18  # Linux's arch/x86/include/uapi/asm/prctl.h
_P, _I, _F, _C = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
SIGNATURES = {
    "linear": [_P, _P, _P, _I, _I, _I, _P, _C],
    "rms_norm": [_P, _P, _P, _I, _I, _F],
    "mamba": [_I] * 5 + [_P] * 6 + [_F] + [_P] * 3 + [_I, _P, _I, _P, _P, _I, _I, _P, _I],
    "attend": [_P] * 7 + [_I] * 8 + [_F, _I, _P],
    "attend_long": [_P] * 7 + [_I] * 8 + [_F, _P, _I],
    "attend_long_room": [_I],
    "route": [_P, _P, _P, _I, _I, _I, _I, _C, _F, _P, _P, _P],
    "experts": [_P] * 6 + [_I] * 5 + [_P, _P],
    "conv_silu": [_P, _I, _I] + [_P] * 5 + [_I] * 4,
    "scan": [_P] * 9 + [_I] * 15 + [_P],
    "scan_room": [_I] * 4,
    "gated_norm": [_P, _P, _I, _P, _P, _I, _P, _P] + [_I] * 4 + [_F, _P, _I],
    "relu2": [_P, _P, _I],
    "stack": [_P, _P, _I],
    "drafts": [_P, _P, _I, _P],
    "keep": [_P, _I, _P, _P] + [_I] * 5,
}


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Those of FLAGS that processor, kernel and torch's own limit (ATEN_CPU_CAPABILITY) allow, best first."""
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.exists():
        return ()
    lines = [line for line in info.read_text(errors="replace").splitlines() if line.startswith("flags")]
    here = set(lines[0].split()) if lines else set()
    limit = torch.backends.cpu.get_cpu_capability()
    known = [name for name, needed in FLAGS.items() if needed <= here and limit in ("AVX512", "AVX2")]
    if limit == "AVX2":
        known = [name for name in known if name == "avx2"]
    # A process has to ask for the matrix unit's registers before its first use of them.
    request = (ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    if "amx_bf16" in known and ctypes.CDLL(None).syscall(*request) != 0:
        known.remove("amx_bf16")
    return tuple(known)


@functools.cache
def _opened(amx: bool) -> tuple[str, ctypes.CDLL] | None:
    """The best kernels that were built for this processor and their instruction set."""
    for found in instruction_sets():
        path = Path(__file__).with_name("kernels") / f"{found}.so"
        if path.exists() and (amx or found != "amx_bf16"):
            kernels = ctypes.CDLL(str(path))
            for name, arguments in SIGNATURES.items():
                for kind in NAMES.values():
                    function = getattr(kernels, f"{name}_{kind}")
                    function.argtypes, function.restype = arguments, _I if name.endswith("_room") else None
            return found, kernels
    return None


def library() -> ctypes.CDLL | None:
    """The kernels that the setting wants of those for this processor, with argument types; None: there are none."""
    found = _opened(backend.allowed("native.amx"))
    return None if found is None else found[1]


def instruction_set() -> str | None:
    """What the kernels that run are written in, one of FLAGS; None: there are none."""
    found = _opened(backend.allowed("native.amx"))
    return None if found is None else found[0]


def missing() -> str | None:
    """Why the kernels cannot run here; None where they can."""
    if not instruction_sets():
        return f"the native kernels do not know this processor ({platform.machine()})"
    if library() is None:
        return f"no native kernels for {instruction_sets()[0]} were built (a C++ compiler was missing at installation)"
    return None


def missing_unit() -> str | None:
    """Why no kernels for a matrix unit can run here; None where they can."""
    if "amx_bf16" not in instruction_sets():
        return "this processor has no matrix unit (AMX), or its kernel does not hand it out"
    found = _opened(True)
    return None if found is not None and found[0] == "amx_bf16" else "no kernels for the matrix unit (AMX) were built"


def function(name: str, dtype: torch.dtype) -> "ctypes._NamedFuncPointer":
    """A kernel by its name."""
    return _function(name, dtype, backend.allowed("native.amx"))


@functools.cache
def _function(name: str, dtype: torch.dtype, amx: bool) -> "ctypes._NamedFuncPointer":
    return getattr(library(), f"{name}_{NAMES[dtype]}")


def runs(twin: str, *tensors: Tensor) -> bool:
    """Whether the twin may run on these: on a CPU, of one dtype that it knows, contiguous, without gradient."""
    dtype = tensors[0].dtype
    if dtype not in NAMES or torch.is_grad_enabled() or not backend.allowed(twin) or library() is None:
        return False
    return all(t.dtype is dtype and t.is_cpu and t.is_contiguous() for t in tensors)


def takes_linear(x: Tensor, weight_OI: Tensor) -> bool:
    """Whether `linear` knows x [..., I] and the weight: few rows, no autocast."""
    return (
        0 < x.numel() <= ROWS * x.shape[-1]
        and runs("native.linear", x, weight_OI)
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T [..., O]."""
    outputs, inner = weight_OI.shape
    rows = x.numel() // inner
    y = x.new_empty((*x.shape[:-1], outputs))
    turned = torch.empty(-(-rows // 32) * 32 * inner, dtype=torch.int32) if rows > TURNED else x
    function("linear", x.dtype)(
        x.data_ptr(), weight_OI.data_ptr(), y.data_ptr(), rows, inner, outputs, turned.data_ptr(), False
    )
    return y


def takes_norm(x: Tensor, weight_D: Tensor) -> bool:
    """Whether `rms_norm` knows the case."""
    return runs("native.norm", x, weight_D)


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """ops.norm.rms_norm, in x's dtype."""
    y, width = torch.empty_like(x_D), x_D.shape[-1]
    function("rms_norm", x_D.dtype)(x_D.data_ptr(), weight_D.data_ptr(), y.data_ptr(), x_D.numel() // width, width, eps)
    return y


def takes_mamba(
    projected_SKC: Tensor, tail_SWC: Tensor, state_SHPN: Tensor, wide: Sequence[Tensor], same: Sequence[Tensor]
) -> bool:
    """Whether `mamba` knows the case. wide: A_log, D, dt_bias; same: parameters of the model's dtype.

    tail and state may be rows of something larger: only what lies within a document must be contiguous.
    """
    return (
        state_SHPN.dtype == torch.float32
        and state_SHPN.shape[-1] % LANES == 0
        and tail_SWC.dtype == projected_SKC.dtype
        and tail_SWC[0].is_contiguous()
        and state_SHPN[0].is_contiguous()
        and all(t.dtype == torch.float32 for t in wide)
        and runs("native.mamba", projected_SKC, *same)
    )


def mamba(
    projected_SKC: Tensor,
    tail_SWC: Tensor,
    state_SHPN: Tensor,
    slots_S: Tensor | None,
    groups: int,
    conv_C1W: Tensor,
    conv_bias_C: Tensor | None,
    A_log_H: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    norm_C: Tensor,
    eps: float,
    trial: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """K tokens of S documents through a mixer between its projections: y [S, K, H P], and the states of a trial.

    projected: z, x, B, C, dt of each token. tail and state [slots, ...] move on in place; slots_S says which row is
    whose (None: 0, 1, 2 ...). trial: they stay, and the states after each token are returned [K, S, H, P, N].
    """
    documents, tokens, _ = projected_SKC.shape
    _, heads, width, size = state_SHPN.shape
    out_SKC = projected_SKC.new_empty(documents, tokens, heads * width)
    after = state_SHPN.new_empty(tokens, documents, heads, width, size) if trial else None
    threads = min(torch.get_num_threads(), documents * groups)
    scratch = torch.empty(threads * 2 * (heads * width // groups + size))
    function("mamba", projected_SKC.dtype)(
        *(heads, width, groups, size, conv_C1W.shape[-1]),
        conv_C1W.data_ptr(),
        None if conv_bias_C is None else conv_bias_C.data_ptr(),
        *(A_log_H.data_ptr(), D_H.data_ptr(), dt_bias_H.data_ptr(), norm_C.data_ptr()),
        eps,
        *(projected_SKC.data_ptr(), out_SKC.data_ptr()),
        *(tail_SWC.data_ptr(), tail_SWC.stride(0), state_SHPN.data_ptr(), state_SHPN.stride(0)),
        None if slots_S is None else slots_S.data_ptr(),
        None if after is None else after.data_ptr(),
        *(documents, tokens, scratch.data_ptr(), threads),
    )
    return out_SKC, after


@dataclass(frozen=True)
class Table:
    """Where the keys of S sequences lie in a pool, and which queries are theirs: made once per pass.

    numbers: one after the other the places where each sequence's Z pages begin [S, Z], where its queries begin [S + 1],
    the keys before the first of them [S], and where the queries' own keys lie [N]. Key j lies `shift` further on.
    most: queries of the longest; longest: its keys. An array and not tensors: it is made for each token.
    """

    numbers: "array[int]"
    sequences: int
    deepest: int
    page: int
    shift: int
    most: int
    longest: int

    def addresses(self) -> tuple[int, int, int, int]:
        """Of page starts, queries, keys before, and places."""
        starts = self.numbers.buffer_info()[0]
        queries = starts + 8 * self.sequences * self.deepest
        before = queries + 8 * (self.sequences + 1)
        return starts, queries, before, before + 8 * self.sequences

    def pieces(self, groups: int, window: int | None) -> int:
        """In how many pieces each sequence's keys are read, so that every thread has work."""
        keys = self.longest if window is None else min(self.longest, window + self.most)
        return max(1, min(2 * torch.get_num_threads() // (self.sequences * groups), keys // PIECE, 64))


@dataclass(frozen=True)
class Reach:
    """The pools of keys and values [X, G, K] that a layer's queries read, and where theirs lie."""

    k_XGK: Tensor
    v_XGK: Tensor
    at: Table


@dataclass(slots=True)  # not frozen: one for each layer of each token, and frozen ones take four times as long
class Slots:
    """Where the documents of a pass have their tails and states; slots_S: which row is whose (None: 0, 1, 2 ...).

    trial: they stay as they are.
    """

    tail_SWC: Tensor
    ssm_SHPN: Tensor
    documents: int
    tokens: int
    slots_S: Tensor | None = None
    trial: bool = False


def table(
    starts: Sequence[Sequence[int]], counts: Sequence[int], before: Sequence[int], page: int, shift: int = 0
) -> Table:
    """The table of sequences with these page starts, so many queries each, behind so many keys."""
    deepest = max(map(len, starts))
    numbers = [start for own in starts for start in (*own, *[0] * (deepest - len(own)))]
    numbers += accumulate(counts, initial=0)
    numbers += before
    for own, count, past in zip(starts, counts, before, strict=True):
        for at in range(past + shift, past + shift + count):
            numbers.append(own[at // page] + at % page)
    longest = max(map(add, before, counts))
    return Table(array("q", numbers), len(starts), deepest, page, shift, max(counts), longest)


def takes_attention(q_NHK: Tensor, k_XGK: Tensor, v_XGK: Tensor, most: int) -> bool:
    """Whether `attend` knows the case: at most `most` queries of a sequence."""
    heads, width = q_NHK.shape[-2:]
    few = most * (heads // k_XGK.shape[-2]) <= MOST_QUERIES and width % LANES == 0
    return few and runs("native.attention", q_NHK, k_XGK, v_XGK)


def attend(q_NHK: Tensor, k_XGK: Tensor, v_XGK: Tensor, at: Table, window: int | None, scale: float) -> Tensor:
    """Causal attention of a few queries of each sequence over its keys in a pool of X places: [N, H, K]."""
    (_, heads, width), groups = q_NHK.shape, k_XGK.shape[1]
    pieces = at.pieces(groups, window)
    out_NHK = torch.empty_like(q_NHK)
    scratch = torch.empty(at.sequences * groups * pieces * MOST_QUERIES * (2 + width))
    function("attend", q_NHK.dtype)(
        *(t.data_ptr() for t in (q_NHK, k_XGK, v_XGK, out_NHK)),
        *at.addresses()[:3],
        *(at.sequences, at.deepest, at.page, at.shift, heads, groups, width, window or 0),
        *(scale, pieces, scratch.data_ptr()),
    )
    return out_NHK


def takes_long_attention(q_NHK: Tensor, k_XGK: Tensor, v_XGK: Tensor) -> bool:
    """Whether `attend_long` knows the case, heads that fill the lanes, and is the quicker: it wants wide registers."""
    fills = q_NHK.shape[-1] % LANES == 0 and instruction_set() != "avx2"
    return fills and runs("native.attention", q_NHK, k_XGK, v_XGK)


def attend_long(q_NHK: Tensor, k_XGK: Tensor, v_XGK: Tensor, at: Table, window: int | None, scale: float) -> Tensor:
    """Causal attention of many queries of each sequence over its keys in a pool of X places: [N, H, K]."""
    (_, heads, width), groups = q_NHK.shape, k_XGK.shape[1]
    out_NHK, threads = torch.empty_like(q_NHK), torch.get_num_threads()
    scratch = torch.empty(threads * function("attend_long_room", q_NHK.dtype)(width))
    function("attend_long", q_NHK.dtype)(
        *(t.data_ptr() for t in (q_NHK, k_XGK, v_XGK, out_NHK)),
        *at.addresses()[:3],
        *(at.sequences, at.deepest, at.page, at.shift, heads, groups, width, window or 0),
        *(scale, scratch.data_ptr(), threads),
    )
    return out_NHK


def takes_router(x_MD: Tensor, weight_ED: Tensor, bias_E: Tensor) -> bool:
    """Whether `route` knows the case: few tokens, no autocast."""
    few = 0 < x_MD.shape[0] <= ROWS and bias_E.dtype == torch.float32
    return few and runs("native.router", x_MD, weight_ED) and not torch.is_autocast_enabled("cpu")


def route(
    x_MD: Tensor, weight_ED: Tensor, bias_E: Tensor, k: int, normalise: bool, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A sigmoid router without groups: scores [M, E], ids [M, k], weights [M, k], as model.moe.Router gives them."""
    (tokens, inner), experts = x_MD.shape, len(weight_ED)
    scores_ME = torch.empty(tokens, experts)
    ids_MK, weights_MK = torch.empty(tokens, k, dtype=torch.long), torch.empty(tokens, k)
    function("route", x_MD.dtype)(
        *(x_MD.data_ptr(), weight_ED.data_ptr(), bias_E.data_ptr(), tokens, inner, experts, k, normalise, factor),
        *(scores_ME.data_ptr(), ids_MK.data_ptr(), weights_MK.data_ptr()),
    )
    return scores_ME, ids_MK, weights_MK


def takes_experts(x_MI: Tensor, ids_MK: Tensor, up_EFI: Tensor, down_EIF: Tensor) -> bool:
    """Whether `experts` knows the case: few tokens, no autocast."""
    few = 0 < ids_MK.shape[0] <= MOST_TOKENS and ids_MK.numel() <= MOST_CHOICES
    return few and runs("native.experts", x_MI, up_EFI, down_EIF) and not torch.is_autocast_enabled("cpu")


def experts(x_MI: Tensor, ids_MK: Tensor, weights_MK: Tensor, up_EFI: Tensor, down_EIF: Tensor) -> Tensor:
    """sum_k weight * down relu(up x)^2 of each token's experts, in fp32: [M, I]."""
    (tokens, k), (count, ffn, width) = ids_MK.shape, up_EFI.shape
    out_MI = torch.empty(tokens, width)
    hidden, fed = x_MI.new_empty(tokens * k, ffn), torch.empty(tokens * k, width)
    function("experts", x_MI.dtype)(
        *(x_MI.data_ptr(), ids_MK.data_ptr(), weights_MK.data_ptr(), up_EFI.data_ptr(), down_EIF.data_ptr()),
        *(out_MI.data_ptr(), tokens, k, count, width, ffn, hidden.data_ptr(), fed.data_ptr()),
    )
    return out_MI


def takes_conv(x_BTC: Tensor, tail_BWC: Tensor | None, taps: int) -> bool:
    """Whether `conv_silu` knows the case: channels side by side."""
    known = x_BTC.dtype in NAMES and x_BTC.is_cpu and x_BTC.stride(-1) == 1 and x_BTC.numel() > 0 and taps <= LANES
    same = tail_BWC is None or tail_BWC.dtype == x_BTC.dtype
    return known and same and backend.allowed("native.conv") and library() is not None


def conv_silu(
    x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, tail_BWC: Tensor | None, seg_BT: Tensor | None
) -> Tensor:
    """ops.conv.causal_conv_silu, forward."""
    (batch, length, channels), taps = x_BTC.shape, weight_CW.shape[1]
    y = torch.empty(x_BTC.shape, dtype=x_BTC.dtype)
    weight, bias = weight_CW.float().contiguous(), None if bias_C is None else bias_C.float().contiguous()
    tail, seg = (None if t is None else t.contiguous() for t in (tail_BWC, seg_BT))
    function("conv_silu", x_BTC.dtype)(
        *(x_BTC.data_ptr(), x_BTC.stride(0), x_BTC.stride(1), weight.data_ptr()),
        *(None if t is None else t.data_ptr() for t in (bias, tail, seg, y)),
        *(batch, length, channels, taps),
    )
    return y


def takes_scan(x_BTHP: Tensor, dt_BTH: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, chunk: int) -> bool:
    """Whether `scan` knows the case: heads side by side within a token, widths that fill the lanes."""
    (_, length, _, width), size = x_BTHP.shape, B_BTGN.shape[-1]
    dtype = x_BTHP.dtype
    if dtype not in NAMES or not x_BTHP.is_cpu or not backend.allowed("native.scan") or library() is None:
        return False
    if not (B_BTGN.dtype == C_BTGN.dtype == dtype and dt_BTH.dtype == torch.float32):
        return False
    sizes = width % LANES == 0 and size % LANES == 0 and length > 0 and chunk <= LONGEST_CHUNK
    sides = x_BTHP.stride()[2:] == (width, 1) and B_BTGN.stride()[2:] == C_BTGN.stride()[2:] == (size, 1)
    return sizes and sides and B_BTGN.stride() == C_BTGN.stride() and dt_BTH.stride(-1) == 1


def scan(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHPN: Tensor | None,
    seg_BT: Tensor | None,
    chunk: int,
    befores: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """ops.ssd.ssd, forward: y [B, T, H, P], the last state, and on request the state before each chunk [Z, B, H, P, N],
    all fp32."""
    (batch, length, heads, width), (groups, size) = x_BTHP.shape, B_BTGN.shape[2:]
    shape = (batch, heads, width, size)
    state = torch.zeros(shape) if state_BHPN is None else state_BHPN.to(torch.float32, copy=True).contiguous()
    before = torch.empty(-(-length // chunk), *shape) if befores else None
    y, A, seg = torch.empty(x_BTHP.shape), A_H.float().contiguous(), None if seg_BT is None else seg_BT.contiguous()
    threads = torch.get_num_threads()
    parts = min(heads // groups, -(-threads // (batch * groups)))
    threads = min(threads, batch * groups * parts)
    each = -(-(heads // groups) // parts)
    scratch = torch.empty(threads * function("scan_room", x_BTHP.dtype)(width, size, chunk, each))
    function("scan", x_BTHP.dtype)(
        *(t.data_ptr() for t in (x_BTHP, B_BTGN, C_BTGN, dt_BTH, A)),
        None if seg is None else seg.data_ptr(),
        state.data_ptr(),
        None if before is None else before.data_ptr(),
        y.data_ptr(),
        *(x_BTHP.stride(0), x_BTHP.stride(1), B_BTGN.stride(0), B_BTGN.stride(1), dt_BTH.stride(0), dt_BTH.stride(1)),
        *(batch, length, heads, width, groups, size, chunk, parts, threads, scratch.data_ptr()),
    )
    return y, state, before


def takes_gated_norm(y_BTHP: Tensor, x_BTC: Tensor, gate_BTC: Tensor) -> bool:
    """Whether `gated_norm` knows the case: tokens at one distance from one another."""
    if torch.is_grad_enabled() or not backend.allowed("native.gated_norm") or library() is None:
        return False
    dtype = gate_BTC.dtype
    if dtype not in NAMES or not gate_BTC.is_cpu or y_BTHP.dtype != torch.float32 or x_BTC.dtype != dtype:
        return False
    rows = all(
        t.stride(-1) == 1 and (len(t) == 1 or t.stride(0) == t.shape[1] * t.stride(1)) for t in (x_BTC, gate_BTC)
    )
    return rows and y_BTHP.is_contiguous() and y_BTHP.numel() > 0


def gated_norm(
    y_BTHP: Tensor, x_BTC: Tensor, D_H: Tensor, gate_BTC: Tensor, weight_C: Tensor, groups: int, eps: float
) -> Tensor:
    """ops.norm.gated_rms_norm of y + D x [B, T, H P], without gradient."""
    batch, length, heads, width = y_BTHP.shape
    out = torch.empty(gate_BTC.shape, dtype=gate_BTC.dtype)
    threads = min(torch.get_num_threads(), batch * length)
    scratch, weight = torch.empty(threads * heads * width // groups), weight_C.float().contiguous()
    function("gated_norm", gate_BTC.dtype)(
        *(y_BTHP.data_ptr(), x_BTC.data_ptr(), x_BTC.stride(1), D_H.data_ptr()),
        *(gate_BTC.data_ptr(), gate_BTC.stride(1), weight.data_ptr(), out.data_ptr()),
        *(batch * length, heads, width, groups, eps, scratch.data_ptr(), threads),
    )
    return out


def relu2(x: Tensor) -> Tensor:
    """relu(x)^2 of contiguous x, without gradient; ask `runs("native.relu2", x)` first."""
    y = torch.empty_like(x)
    function("relu2", x.dtype)(x.data_ptr(), y.data_ptr(), x.numel())
    return y
