"""The chunked scan on a GPU: backward. Shapes, letters and the plan are in ops.triton_ssd."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimaran.ops.triton_ssd import (
    SLICE,
    Sizes,
    decays,
    kind,
    mixing,
    product,
    put_square,
    rows_at,
    square_at,
)


@triton.jit
def states_kernel(
    dt, A, C, seg, dy, dlast, before, after, ends, dstate,
    C_b, C_t, T, Z, H, G, P, N,
    Q: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """after: the gradient at the state behind every chunk. ends: what the decay over a whole chunk, e, is given through
    it, one number per slice, row, chunk and head."""
    part, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    g = h // (H // G)
    p, n, q = part * WIDTH + tl.arange(0, WIDTH), tl.arange(0, SIZE), tl.arange(0, Q)
    a = tl.load(A + h)
    if seg is not None:
        seg += b * T
    if dlast is None:
        dS_PN = tl.zeros([WIDTH, SIZE], tl.float32)
    else:
        dS_PN = square_at(dlast + (b * H + h) * P * N, p, n, P, N, tl.float32)
    for back in range(Z):
        z = Z - 1 - back
        place = (b * Z + z) * H + h
        put_square(after + place * P * N, dS_PN, p, n, P, N)
        token = z * Q + q
        _, _, r, _, e = decays(dt + b * T * H + h, H, a, seg, z * Q, token, T, Q)
        S_PN = square_at(before + place * P * N, p, n, P, N, tl.float32)
        tl.store(ends + part * tl.num_programs(2) * Z * H + place, e * tl.sum(tl.sum(dS_PN * S_PN, 1), 0))
        dy_QP = rows_at(dy + b * T * H * P + h * P, H * P, token, p, T, P, tl.float32)
        C_QN = rows_at(C + b * C_b + g * N, C_t, token, n, T, N, KIND)
        dS_PN = dS_PN * e + product(tl.trans(dy_QP * r[:, None]), C_QN, KIND)
    put_square(dstate + (b * H + h) * P * N, dS_PN, p, n, P, N)


@triton.jit
def chunks_kernel(
    x, dt, A, B, C, seg, scores, dy, before, after, ends, dx, ddt, dA, dB, dC,
    x_b, x_t, B_b, B_t, C_b, C_t, T, Z, H, G, P, N,
    R: tl.constexpr, Q: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """All that one chunk gives to its own operands; the heads of a group one after the other."""
    z, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, n, q = tl.arange(0, WIDTH), tl.arange(0, SIZE), tl.arange(0, Q)
    token = z * Q + q
    if seg is not None:
        seg += b * T
    B_QN = rows_at(B + b * B_b + g * N, B_t, token, n, T, N, KIND)
    C_QN = rows_at(C + b * C_b + g * N, C_t, token, n, T, N, KIND)
    scores_QQ = square_at(scores + ((b * Z + z) * G + g) * Q * Q, q, q, Q, Q, tl.float32)
    dB_QN, dC_QN = tl.zeros([Q, SIZE], tl.float32), tl.zeros([Q, SIZE], tl.float32)
    dscores_QQ = tl.zeros([Q, Q], tl.float32)
    for one in range(R):
        h = g * R + one
        a, place = tl.load(A + h), (b * Z + z) * H + h
        step, s, r, l, _ = decays(dt + b * T * H + h, H, a, seg, z * Q, token, T, Q)
        x_QP = rows_at(x + b * x_b + h * P, x_t, token, p, T, P, tl.float32)
        dy_QP = rows_at(dy + b * T * H * P + h * P, H * P, token, p, T, P, tl.float32)
        W_QP = x_QP * step[:, None]
        decay_QQ = mixing(s, seg, token, T)
        # through y = M W
        dM_QQ = product(dy_QP, tl.trans(W_QP), KIND) * decay_QQ
        dscores_QQ += dM_QQ
        lean_QQ = dM_QQ * scores_QQ  # how much the gradient leans on each decay
        ds = tl.sum(lean_QQ, 1) - tl.sum(lean_QQ, 0)
        dW_QP = product(tl.trans(scores_QQ * decay_QQ), dy_QP, KIND)
        # through y = r (C S^T)
        S_PN = square_at(before + place * P * N, p, n, P, N, KIND)
        dfar_QP = dy_QP * r[:, None]
        ds += tl.sum(dfar_QP * product(C_QN, tl.trans(S_PN), KIND), 1)
        dC_QN += product(dfar_QP, S_PN, KIND)
        # through S' = e S + (l W)^T B
        dS_PN = square_at(after + place * P * N, p, n, P, N, KIND)
        dleft_QP = product(B_QN, tl.trans(dS_PN), KIND) * l[:, None]
        dW_QP += dleft_QP
        dB_QN += product(W_QP * l[:, None], dS_PN, KIND)
        lean = tl.sum(dleft_QP * W_QP, 1)
        ds -= lean
        ds = tl.where(q == Q - 1, ds + tl.sum(lean, 0) + tl.load(ends + place), ds)
        # s is a running sum: a token's dt A meets every later s of the chunk
        da = tl.sum(ds, 0) - tl.cumsum(ds, 0) + ds
        live = token < T
        tl.store(ddt + (b * T + token) * H + h, da * a + tl.sum(dW_QP * x_QP, 1), mask=live)
        tl.store(dA + place, tl.sum(da * step, 0))
        at = dx + ((b * T + token[:, None]) * H + h) * P + p[None, :]
        tl.store(at, (dW_QP * step[:, None]).to(dx.dtype.element_ty), mask=live[:, None] & (p < P)[None, :])
    dC_QN += product(dscores_QQ, B_QN, KIND)
    dB_QN += product(tl.trans(dscores_QQ), C_QN, KIND)
    here = (token < T)[:, None] & (n < N)[None, :]
    at = ((b * T + token[:, None]) * G + g) * N + n[None, :]
    tl.store(dB + at, dB_QN.to(dB.dtype.element_ty), mask=here)
    tl.store(dC + at, dC_QN.to(dC.dtype.element_ty), mask=here)


def scan_backward(
    n: Sizes, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, seg: Tensor | None, scores: Tensor,
    before: Tensor, dy: Tensor | None, dlast: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients by x, dt, A, B, C and the state before the first token."""
    dy = x.new_zeros(x.shape) if dy is None else dy.contiguous()
    dlast = None if dlast is None else dlast.contiguous()
    WIDTH = min(n.WIDTH, SLICE)
    parts = triton.cdiv(n.width, WIDTH)
    after, ends = torch.empty_like(before), dt.new_empty(parts, n.batch, n.chunks, n.heads)
    dstate = dt.new_empty(n.batch, n.heads, n.width, n.size)
    states_kernel[parts, n.heads, n.batch](
        dt, A, C, seg, dy, dlast, before, after, ends, dstate,
        *C.stride()[:2], *n.numbers, n.Q, WIDTH, n.SIZE, kind(x), num_warps=8, num_stages=2,
    )  # fmt: skip
    dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, B, C))
    ddt, dA = torch.empty_like(dt), dt.new_empty(n.batch, n.chunks, n.heads)
    chunks_kernel[n.chunks, n.groups, n.batch](
        x, dt, A, B, C, seg, scores, dy, before, after, ends.sum(0), dx, ddt, dA, dB, dC,
        *x.stride()[:2], *B.stride()[:2], *C.stride()[:2], *n.numbers,
        n.heads // n.groups, n.Q, n.WIDTH, n.SIZE, kind(x), num_warps=8, num_stages=1,
    )  # fmt: skip
    return dx, ddt, dA.sum((0, 1)), dB, dC, dstate
