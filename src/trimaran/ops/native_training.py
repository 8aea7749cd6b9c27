"""C++ kernels of the training step on a CPU (ops/kernels/training.h): the loss with its gradient, and the way back
through norms, gate, squared ReLU and the short convolution.

In torch each of these is a chain of steps, and every step reads and writes memory; here each is one pass over rows that
stay in a core's cache. For every kernel `takes_*` says whether it may run and knows the case; the functions ask nothing
more. Sums are fp32; numbers are rounded where the torch forms round them. fp64 stays in torch.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from trimaran.ops import backend, native
from trimaran.ops.native import LANES, NAMES

_P, _I, _F, _C = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
SIGNATURES: dict[str, list[Any]] = {
    "loss": [_P] * 5 + [_I, _I, _P, _I],
    "train_norm": [_P, _C, _P, _P, _P, _I, _I, _F],
    "train_norm_back": [_P, _C] + [_P] * 5 + [_I] * 3,
    "gated_back": [_P] * 6 + [_I, _I] + [_P] * 5 + [_I] * 4 + [_F, _P, _I],
    "relu2_back": [_P, _P, _P, _I],
    "conv_back": [_P] * 10 + [_I] * 8 + [_P, _I],
    "attention_training": [_P] * 5 + [_I] * 11 + [_F] + [_P] * 7 + [_I],
    "attention_room": [_I, _I],
    "scan_back": [_P] * 8 + [_C] + [_P] * 6 + [_I] * 14 + [_P],
    "scan_back_room": [_I] * 3,
}


def _function(name: str, dtype: torch.dtype) -> "ctypes._NamedFuncPointer":
    return _typed(name, dtype, backend.allowed("native.amx"))


@functools.cache
def _typed(name: str, dtype: torch.dtype, amx: bool) -> "ctypes._NamedFuncPointer":
    found = native.function(name, dtype)
    found.argtypes = SIGNATURES[name]
    found.restype = _I if name.endswith("_room") else None
    return found


def runs(twin: str, *tensors: Tensor) -> bool:
    """Whether the twin may run on these, with or without gradient: on a CPU, of dtypes that the kernels know."""
    known = all(t.is_cpu and t.dtype in NAMES for t in tensors)
    return known and tensors[0].numel() > 0 and backend.allowed(twin) and native.library() is not None


def _threads(rows: int) -> int:
    return min(torch.get_num_threads(), rows)


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def takes_loss(logits_MV: Tensor) -> bool:
    """Whether `loss_and_gradient` knows the case."""
    return runs("native.loss", logits_MV) and logits_MV.is_contiguous()


def loss_and_gradient(
    logits_MV: Tensor, targets_M: Tensor, weights_M: Tensor, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """ops.loss.loss_and_gradient; the gradient in the logits' dtype, on request in their memory."""
    rows, vocab = logits_MV.shape
    low, high = (int(t) for t in targets_M.aminmax())
    if low < 0 or high >= vocab:
        raise IndexError(f"target {low if low < 0 else high} is out of range: there are {vocab} logits")
    weights_M, losses_M = weights_M.float().contiguous(), torch.empty(rows)
    gradient_MV, threads = logits_MV if in_place else torch.empty_like(logits_MV), _threads(rows)
    room, targets_M = torch.empty(threads, -(-vocab // LANES) * LANES), targets_M.contiguous()
    _function("loss", logits_MV.dtype)(
        *(t.data_ptr() for t in (logits_MV, targets_M, weights_M, losses_M, gradient_MV)),
        *(rows, vocab, room.data_ptr(), threads),
    )
    return (losses_M * weights_M).sum(), gradient_MV


def takes_norm(x: Tensor, weight_D: Tensor, dtype: torch.dtype) -> bool:
    """Whether `RMSNorm` knows the case: an output of x's dtype, or a narrower one."""
    return runs("native.norm", x, weight_D) and dtype in NAMES and x.dtype in (dtype, torch.float32)


class RMSNorm(torch.autograd.Function):
    """ops.norm.rms_norm, keeping x and its inverse RMS per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x, wide_D = x.contiguous(), weight.float().contiguous()
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        y, scales_M = torch.empty(x.shape, dtype=dtype), torch.empty(rows)
        _function("train_norm", dtype)(
            *(x.data_ptr(), x.dtype != dtype, wide_D.data_ptr(), y.data_ptr(), scales_M.data_ptr(), rows, width, eps)
        )
        ctx.save_for_backward(x, wide_D, scales_M)
        ctx.dtype = weight.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, wide_D, scales_M = ctx.saved_tensors
        rows, width, threads = len(scales_M), x.shape[-1], _threads(len(scales_M))
        grad, dx, dweight_XD = grad.contiguous(), torch.empty_like(x), torch.zeros(threads, width)
        _function("train_norm_back", grad.dtype)(
            *(x.data_ptr(), x.dtype != grad.dtype, wide_D.data_ptr(), scales_M.data_ptr(), grad.data_ptr()),
            *(dx.data_ptr(), dweight_XD.data_ptr(), rows, width, threads),
        )
        return dx, dweight_XD.sum(0).to(ctx.dtype), None, None


def takes_gated_norm(y_BTHP: Tensor, x_BTC: Tensor, gate_BTC: Tensor, groups: int) -> bool:
    """Whether `GatedNorm` knows the case: heads and groups that fill the lanes, tokens at one distance."""
    heads, width = y_BTHP.shape[2:]
    with torch.no_grad():
        forward = native.takes_gated_norm(y_BTHP, x_BTC, gate_BTC)
    return forward and width % LANES == 0 and heads % groups == 0


class GatedNorm(torch.autograd.Function):
    """ops.norm.gated_rms_norm of y + D x [B, T, H P], keeping its inputs alone."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, D_H: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float
    ) -> Tensor:
        ctx.save_for_backward(y, x, D_H, gate, weight)
        ctx.groups, ctx.eps = groups, eps
        return native.gated_norm(y, x, D_H.float().contiguous(), gate, weight, groups, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, x, D_H, gate, weight = ctx.saved_tensors
        batch, length, heads, width = y.shape
        rows, inner, threads = batch * length, heads * width, _threads(batch * length)
        wide_H, wide_C, grad = D_H.float().contiguous(), weight.float().contiguous(), grad.contiguous()
        dy, dx, dgate = torch.empty_like(y), torch.empty(x.shape, dtype=x.dtype), torch.empty_like(grad)
        dweight_XC, dD_XH = torch.zeros(threads, inner), torch.zeros(threads, heads)
        room = torch.empty(threads, 2, inner // ctx.groups)
        _function("gated_back", grad.dtype)(
            *(t.data_ptr() for t in (y, wide_H, wide_C, x, gate, grad)),
            *(x.stride(1), gate.stride(1)),
            *(t.data_ptr() for t in (dy, dweight_XC, dD_XH, dx, dgate)),
            *(rows, heads, width, ctx.groups, ctx.eps, room.data_ptr(), threads),
        )
        return dy, dx, dD_XH.sum(0).to(D_H.dtype), dgate, dweight_XC.sum(0).to(weight.dtype), None, None


class ReLU2(torch.autograd.Function):
    """ops.activation.relu2 of contiguous x, keeping x; ask `runs("native.relu2", x)` first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return native.relu2(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad, dx = grad.contiguous(), torch.empty_like(x)
        _function("relu2_back", x.dtype)(x.data_ptr(), grad.data_ptr(), dx.data_ptr(), x.numel())
        return dx


def takes_conv_backward(x_BTC: Tensor, grad_BTC: Tensor, tail_BWC: Tensor | None, taps: int) -> bool:
    """Whether `conv_backward` knows the case: channels that fill the lanes and lie side by side."""
    sides = x_BTC.stride(-1) == grad_BTC.stride(-1) == 1 and x_BTC.shape[-1] % LANES == 0 and 1 < taps <= LANES
    same = grad_BTC.dtype == x_BTC.dtype and (tail_BWC is None or tail_BWC.dtype == x_BTC.dtype)
    return sides and same and runs("native.conv", x_BTC)


def conv_backward(
    x_BTC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    tail_BWC: Tensor | None,
    seg_BT: Tensor | None,
    grad_BTC: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of ops.conv.causal_conv_silu by x, weight, bias (both fp32) and tail."""
    (batch, length, channels), taps = x_BTC.shape, weight_CW.shape[1]
    weight_WC, bias = weight_CW.t().float().contiguous(), None if bias_C is None else bias_C.float().contiguous()
    tail, seg = (None if t is None else t.contiguous() for t in (tail_BWC, seg_BT))
    dx, dtail = torch.empty(x_BTC.shape, dtype=x_BTC.dtype), None if tail is None else torch.empty_like(tail)
    dweight_BWC, dbias_BC = torch.empty(batch, taps, channels), torch.empty(batch, channels)
    threads = _threads(batch * channels // LANES)
    room = torch.empty(threads, length, LANES)
    _function("conv_back", x_BTC.dtype)(
        *(_address(t) for t in (x_BTC, tail, grad_BTC, weight_WC, bias, seg, dx, dtail, dweight_BWC, dbias_BC)),
        *(x_BTC.stride(0), x_BTC.stride(1), grad_BTC.stride(0), grad_BTC.stride(1)),
        *(batch, length, channels, taps, room.data_ptr(), threads),
    )
    return dx, dweight_BWC.sum(0).t(), dbias_BC.sum(0), dtail


def takes_attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> bool:
    """Whether `Attention` knows the case: heads side by side within a token, and of a width that fills the lanes."""
    width = q_BTHK.shape[-1]
    sides = all(t.stride(-1) == 1 and t.stride(-2) == width for t in (q_BTHK, k_BTGK, v_BTGK))
    same = q_BTHK.dtype == k_BTGK.dtype == v_BTGK.dtype and k_BTGK.shape[-1] == v_BTGK.shape[-1] == width
    return sides and same and width % LANES == 0 and runs("native.attention", q_BTHK)


def stretches(mask_BTS: Tensor | None, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """The keys [first, end) that each query sees, [B, T] each; None: those up to its own."""
    if mask_BTS is None:
        end_T = torch.arange(1, length + 1, dtype=torch.int32)
        return torch.zeros(batch, length, dtype=torch.int32), end_T.expand(batch, length).contiguous()
    first_BT = mask_BTS.byte().argmax(-1)
    end_BT = first_BT + mask_BTS.sum(-1)
    return tuple(t.to(torch.int32).expand(batch, length).contiguous() for t in (first_BT, end_BT))  # type: ignore


class Attention(torch.autograd.Function):
    """ops.attention.attention of tokens over themselves: [B, T, H, K]; mask [(B,) T, S] (None: causal)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        batch, length, heads, _ = q.shape
        out, lse_BHT = torch.empty(q.shape, dtype=q.dtype), torch.empty(batch, heads, length)
        at = stretches(mask, batch, length)
        attention_pass(q, k, v, at, scale, (out, lse_BHT), None)
        ctx.save_for_backward(q, k, v, *at, out, lse_BHT)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first_BT, end_BT, out, lse_BHT = ctx.saved_tensors
        gradients = [torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v)]
        attention_pass(q, k, v, (first_BT, end_BT), ctx.scale, (out, lse_BHT), [grad.contiguous(), *gradients])
        return *gradients, None, None


def attention_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    at: tuple[Tensor, Tensor],
    scale: float,
    outcome: tuple[Tensor, Tensor],
    back: list[Tensor] | None,
) -> None:
    """Forward fills the outcome, out and lse; with `back`, the gradient by out, those by q, k and v are filled."""
    (batch, length, heads, width), groups = q.shape, k.shape[2]
    threads = _threads(batch * groups)
    room = torch.empty(threads * _function("attention_room", q.dtype)(length, width))
    strides = (stride for t in (q, k, v) for stride in t.stride()[:2])
    _function("attention_training", q.dtype)(
        *(t.data_ptr() for t in (q, k, v, *at)),
        *strides,
        *(batch, length, heads, groups, width, scale),
        *(t.data_ptr() for t in outcome),
        *([None] * 4 if back is None else (t.data_ptr() for t in back)),
        *(room.data_ptr(), threads),
    )


def scan_backward(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None],
    before_ZBHPN: Tensor,
    dy_BTHP: Tensor,
    dstate_BHPN: Tensor | None,
    chunk: int,
    carried: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The way back through `native.scan`: gradients by x, dt, A, B, C and the state before the first token.

    inputs: x, dt, A, B, C and seg, as `native.takes_scan` knows them; before: the state before each chunk; dstate: the
    gradient by the last state (None: 0). carried: there was a state before the first token.
    """
    x, dt, A, B, C, seg = inputs
    (batch, length, heads, width), (groups, size) = x.shape, B.shape[2:]
    A, dy = A.float().contiguous(), dy_BTHP.to(x.dtype).contiguous()
    seg = None if seg is None else seg.contiguous()
    dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype) for t in (x, B, C))
    ddt, dA_BH, shape = torch.empty(dt.shape), torch.zeros(batch, heads), (batch, heads, width, size)
    dstate = torch.zeros(shape) if dstate_BHPN is None else dstate_BHPN.to(torch.float32, copy=True).contiguous()
    threads = _threads(batch * groups)
    room = torch.empty(threads * _function("scan_back_room", x.dtype)(width, size, chunk))
    _function("scan_back", x.dtype)(
        *(_address(t) for t in (x, B, C, dt, A, seg, before_ZBHPN, dy)),
        carried,
        *(t.data_ptr() for t in (dx, dB, dC, ddt, dA_BH, dstate)),
        *(x.stride(0), x.stride(1), B.stride(0), B.stride(1), dt.stride(0), dt.stride(1)),
        *(batch, length, heads, width, groups, size, chunk, threads, room.data_ptr()),
    )
    return dx, ddt, dA_BH.sum(0), dB, dC, dstate
