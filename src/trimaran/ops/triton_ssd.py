"""The chunked scan on a GPU (ops.ssd): forward. Formulas and letters are those of ops.ssd_chunks.

Two kernels. `scores_kernel` makes C.B once per group and chunk. `scan_kernel` has one head of one row (or a slice of
the head's width) per program and goes through the chunks in order with the state in registers: states between chunks
never travel to memory, unless backward will want them. Operands of products have x's dtype, decay, sums and states are
fp32.

Backward (ops.triton_ssd_backward) goes through the chunks in reverse for the states' gradients, and then has one group
of one chunk per program, which adds up the gradients of B and C over the group's heads in registers: no atomics.

Shapes: Q tokens of a chunk, Z chunks, R heads of a group; x [B, T, H, P], B and C [B, T, G, N] with neighbours along
the last two axes, dt [B, T, H], states [B, Z, H, P, N].
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimaran.ops.numbers import at_least_fp32
from trimaran.ops.triton_backend import interpreted, steps

CHUNK = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}  # tokens: what shared memory holds
SLICE = 32  # of a head's width: more programs than heads, for few rows
KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def product(a, b, KIND: tl.constexpr):
    """a b with operands of KIND and sums in fp32."""
    return tl.dot(a.to(KIND), b.to(KIND), input_precision="ieee")


@triton.jit
def rows_at(x, x_t, token, column, T, WIDTH, KIND: tl.constexpr):
    """Rows [token, column] of x, zeros outside."""
    here = (token < T)[:, None] & (column < WIDTH)[None, :]
    return tl.load(x + token[:, None].to(tl.int64) * x_t + column[None, :], mask=here, other=0.0).to(KIND)


@triton.jit
def square_at(x, row, column, ROWS, COLUMNS, KIND: tl.constexpr):
    """A matrix [ROWS, COLUMNS], zeros outside."""
    here = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(x + row[:, None] * COLUMNS + column[None, :], mask=here, other=0.0).to(KIND)


@triton.jit
def put_square(x, value, row, column, ROWS, COLUMNS):
    here = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    tl.store(x + row[:, None] * COLUMNS + column[None, :], value.to(x.dtype.element_ty), mask=here)


@triton.jit
def decays(dt, dt_t, a, seg, start, token, T, Q: tl.constexpr):
    """Of one head's chunk: dt, s, r, l and e (see ops.ssd_chunks). dt is 0 past the end: nothing decays or writes."""
    step = tl.load(dt + token.to(tl.int64) * dt_t, mask=token < T, other=0.0)
    s = tl.cumsum(step * a, 0)
    end = tl.sum(step * a, 0)
    r, l, e = tl.exp(s), tl.exp(tl.minimum(end - s, 0.0)), tl.exp(end)
    if seg is not None:
        own = tl.load(seg + tl.minimum(token, T - 1))
        before = tl.load(seg + start - 1, mask=start > 0, other=0)
        last = tl.load(seg + tl.minimum(start + Q - 1, T - 1))
        r, l = tl.where(own == before, r, 0.0), tl.where(own == last, l, 0.0)
        e = tl.where(last == before, e, 0.0)
    return step, s, r, l, e


@triton.jit
def mixing(s, seg, token, T):
    """exp(s_i - s_j) where token i sees token j, else 0."""
    seen = token[:, None] >= token[None, :]
    if seg is not None:
        own = tl.load(seg + tl.minimum(token, T - 1))
        seen = seen & (own[:, None] == own[None, :])
    return tl.where(seen, tl.exp(tl.minimum(s[:, None] - s[None, :], 0.0)), 0.0)


@triton.jit
def scores_kernel(
    B, C, scores, B_b, B_t, C_b, C_t, T, N, Q: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    z, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token, n, q = z * Q + tl.arange(0, Q), tl.arange(0, SIZE), tl.arange(0, Q)
    B_QN = rows_at(B + b * B_b + g * N, B_t, token, n, T, N, KIND)
    C_QN = rows_at(C + b * C_b + g * N, C_t, token, n, T, N, KIND)
    place = ((b * tl.num_programs(0) + z) * tl.num_programs(1) + g) * Q * Q
    put_square(scores + place, product(C_QN, tl.trans(B_QN), KIND), q, q, Q, Q)


@triton.jit
def scan_kernel(
    x, dt, A, B, C, state, seg, scores, y, last, before,
    x_b, x_t, B_b, B_t, C_b, C_t, T, Z, H, G, P, N,
    Q: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """before: the state before every chunk, where backward will ask for it."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    g = h // (H // G)
    p, n, q = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, SIZE), tl.arange(0, Q)
    a = tl.load(A + h)
    if seg is not None:
        seg += b * T
    if state is None:
        S_PN = tl.zeros([WIDTH, SIZE], tl.float32)
    else:
        S_PN = square_at(state + (b * H + h) * P * N, p, n, P, N, tl.float32)
    for z in range(Z):
        token = z * Q + q
        step, s, r, l, e = decays(dt + b * T * H + h, H, a, seg, z * Q, token, T, Q)
        W_QP = rows_at(x + b * x_b + h * P, x_t, token, p, T, P, tl.float32) * step[:, None]
        B_QN = rows_at(B + b * B_b + g * N, B_t, token, n, T, N, KIND)
        C_QN = rows_at(C + b * C_b + g * N, C_t, token, n, T, N, KIND)
        mix_QQ = square_at(scores + ((b * Z + z) * G + g) * Q * Q, q, q, Q, Q, tl.float32) * mixing(s, seg, token, T)
        y_QP = product(mix_QQ, W_QP, KIND) + r[:, None] * product(C_QN, tl.trans(S_PN), KIND)
        here = (token < T)[:, None] & (p < P)[None, :]
        tl.store(y + ((b * T + token[:, None]) * H + h) * P + p[None, :], y_QP, mask=here)
        if before is not None:
            put_square(before + ((b * Z + z) * H + h) * P * N, S_PN, p, n, P, N)
        S_PN = S_PN * e + product(tl.trans(W_QP * l[:, None]), B_QN, KIND)
    put_square(last + (b * H + h) * P * N, S_PN, p, n, P, N)


@dataclass(frozen=True)
class Sizes:
    """What the kernels of one scan are told; the last three are blocks, powers of two that matrix units take."""

    batch: int
    length: int
    chunks: int
    heads: int
    groups: int
    width: int
    size: int
    Q: int
    WIDTH: int
    SIZE: int

    @classmethod
    def of(cls, x_BTHP: Tensor, B_BTGN: Tensor, chunk: int) -> "Sizes":
        batch, length, heads, width = x_BTHP.shape
        groups, size = B_BTGN.shape[2:]
        Q = min(max(16, triton.next_power_of_2(min(chunk, length))), CHUNK[x_BTHP.dtype])
        if size > 128:  # states of the largest models: half the tokens, so that a chunk still fits
            Q = max(16, Q // 2)
        blocks = Q, max(16, triton.next_power_of_2(width)), max(16, triton.next_power_of_2(size))
        return cls(batch, length, triton.cdiv(length, Q), heads, groups, width, size, *blocks)

    @property
    def numbers(self) -> tuple[Any, ...]:
        return self.length, steps(self.chunks), self.heads, self.groups, self.width, self.size


def kind(x: Tensor) -> Any:
    """The dtype of products' operands; the interpreter's matrix product knows no bf16."""
    return tl.float32 if interpreted() else KINDS[x.dtype]


def neighbours(x_BTGN: Tensor) -> Tensor:
    """The tensor with its last two axes as one run in memory."""
    return x_BTGN if x_BTGN.stride()[2:] == (x_BTGN.shape[3], 1) else x_BTGN.contiguous()


class TritonScan(torch.autograd.Function):
    """y [B, T, H, P] and the last state [B, H, P, N], both in fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, seg: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.state_dtype, ctx.dt_dtype = None if state is None else state.dtype, dt.dtype
        x, B, C = neighbours(x), neighbours(B), neighbours(C)
        dt, A = at_least_fp32(dt).contiguous(), at_least_fp32(A).contiguous()
        seg = None if seg is None else seg.to(torch.int32).contiguous()
        start = None if state is None else at_least_fp32(state).contiguous()
        n = Sizes.of(x, B, chunk)
        y = torch.empty(x.shape, device=x.device)
        last = torch.empty(n.batch, n.heads, n.width, n.size, device=x.device)
        wanted = any(ctx.needs_input_grad)
        states = (n.batch, n.chunks, n.heads, n.width, n.size)
        before = torch.empty(states, dtype=x.dtype, device=x.device) if wanted else None
        scores = torch.empty(n.batch, n.chunks, n.groups, n.Q, n.Q, dtype=x.dtype, device=x.device)
        strides = *B.stride()[:2], *C.stride()[:2]
        scores_kernel[n.chunks, n.groups, n.batch](B, C, scores, *strides, n.length, n.size, n.Q, n.SIZE, kind(x))
        WIDTH = min(n.WIDTH, SLICE)
        scan_kernel[triton.cdiv(n.width, WIDTH), n.heads, n.batch](
            x, dt, A, B, C, start, seg, scores, y, last, before,
            *x.stride()[:2], *strides, *n.numbers, n.Q, WIDTH, n.SIZE, kind(x), num_warps=8, num_stages=2,
        )  # fmt: skip
        if wanted:
            ctx.save_for_backward(x, dt, A, B, C, seg, scores, before)
            ctx.sizes = n
            ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        from trimaran.ops.triton_ssd_backward import scan_backward

        x, dt, A, B, C, seg, scores, before = ctx.saved_tensors
        dx, ddt, dA, dB, dC, dS = scan_backward(ctx.sizes, x, dt, A, B, C, seg, scores, before, dy, dlast)
        dstate = None if ctx.state_dtype is None else dS.to(ctx.state_dtype)
        return dx, ddt.to(ctx.dt_dtype), dA, dB, dC, dstate, None, None


def ssd(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor,
    state_BHPN: Tensor | None = None, seg_BT: Tensor | None = None, chunk: int = 128,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """ops.ssd.ssd. `chunk` is an upper limit."""
    B_BTGN, C_BTGN = B_BTGN.to(x_BTHP.dtype), C_BTGN.to(x_BTHP.dtype)
    return TritonScan.apply(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHPN, seg_BT, chunk)
