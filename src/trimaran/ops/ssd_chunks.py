"""The chunked scan of ops.ssd one chunk after the other, with its gradient written down: the form for a CPU.

A chunk's temporaries stay in the cache and are used again for the next, nothing but the states between chunks is kept
for backward, and the sequential state pass costs nothing extra. Formulas and shapes are those of ops.ssd. With

    s   running sum of dt A in the chunk          M_ij = exp(s_i - s_j) (C_i . B_j), j <= i, same document
    W   dt x                                      r_i  = exp(s_i), 0 where the chunk's first document has ended
    S   the state before the chunk                l_j  = exp(s_end - s_j), 0 outside the chunk's last document
                                                  e    = exp(s_end), 0 when a border lies in the chunk

the chunk is  y = M W + r (C S^T),  S' = e S + (l W)^T B,  and backward runs the chunks in reverse with dS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.ops import native, native_training
from trimaran.ops.numbers import at_least_fp32


@dataclass
class Chunk:
    """One chunk's operands. Heads are split as G groups x R heads; U = R * P is a group's width."""

    dt_BHQ: Tensor  # fp32, as are s, r, l, e
    s_BHQ: Tensor
    r_BHQ: Tensor
    l_BHQ: Tensor
    e_BH: Tensor
    x_BHQP: Tensor
    write_BHQP: Tensor
    B_BGQN: Tensor
    C_BGQN: Tensor
    decay_BGRQQ: Tensor
    scores_BGQQ: Tensor  # C.B, zero where hidden
    seen_BGQQ: Tensor  # 1 where token i may see token j


def open_chunk(
    x: Tensor, dt: Tensor, A_H: Tensor, B: Tensor, C: Tensor, seg: Tensor | None, start: int, stop: int
) -> Chunk:
    """Everything about tokens start..stop that does not depend on the state."""
    part, dtype = slice(start, stop), x.dtype
    batch, length, heads = x.shape[0], stop - start, x.shape[2]
    dt_BHQ = dt[:, part].transpose(1, 2).contiguous()
    s_BHQ = torch.cumsum(dt_BHQ * A_H[:, None], -1)
    r_BHQ, l_BHQ, e_BH = s_BHQ.exp(), (s_BHQ[..., -1:] - s_BHQ).exp_(), s_BHQ[..., -1].exp()
    seen = torch.ones(length, length, dtype=dtype, device=x.device).tril_()[None, None]
    if seg is not None:
        own_BQ = seg[:, part]
        before_B1 = seg[:, start - 1 : start] if start else torch.zeros_like(own_BQ[:, :1])
        seen = seen * (own_BQ[:, None, :, None] == own_BQ[:, None, None, :])
        r_BHQ = r_BHQ * (own_BQ == before_B1)[:, None]
        l_BHQ = l_BHQ * (own_BQ == own_BQ[:, -1:])[:, None]
        e_BH = e_BH * (own_BQ[:, -1:] == before_B1)
    x_BHQP = x[:, part].transpose(1, 2).contiguous()
    B_BGQN, C_BGQN = (t[:, part].transpose(1, 2).to(dtype).contiguous() for t in (B, C))
    # Above the diagonal s_i - s_j is positive and could overflow; what it becomes there meets a zero score.
    decay = (s_BHQ[..., :, None] - s_BHQ[..., None, :]).clamp_(max=0).exp_().to(dtype)
    return Chunk(
        dt_BHQ,
        s_BHQ,
        r_BHQ,
        l_BHQ,
        e_BH,
        x_BHQP,
        (x_BHQP * dt_BHQ[..., None]).to(dtype),
        B_BGQN,
        C_BGQN,
        decay.view(batch, B.shape[2], heads // B.shape[2], length, length),
        (C_BGQN @ B_BGQN.transpose(-1, -2)).mul_(seen),
        seen,
    )


def by_group(x_BHQP: Tensor, groups: int) -> Tensor:
    """[B, H, Q, P] -> [B, G, Q, U]: a group's heads side by side."""
    batch, heads, length, width = x_BHQP.shape
    return x_BHQP.view(batch, groups, heads // groups, length, width).transpose(2, 3).reshape(batch, groups, length, -1)


def by_head(x_BGQU: Tensor, width: int) -> Tensor:
    """[B, G, Q, U] -> [B, H, Q, P] (a view with strange strides)."""
    batch, groups, length, _ = x_BGQU.shape
    return x_BGQU.view(batch, groups, length, -1, width).transpose(2, 3).flatten(1, 2)


def outputs(c: Chunk, S_BHPN: Tensor | None) -> Tensor:
    """y = M W + r (C S^T) of one chunk [B, H, Q, P], in at least fp32; S None: nothing came before. Uses up c.decay."""
    mix_BHQQ = c.decay_BGRQQ.mul_(c.scores_BGQQ[:, :, None]).flatten(1, 2)
    y_BHQP = at_least_fp32(mix_BHQQ @ c.write_BHQP)
    if S_BHPN is not None:
        batch, groups, _, size = c.C_BGQN.shape
        S_BGUN = S_BHPN.to(c.C_BGQN.dtype).view(batch, groups, -1, size)
        far_BGQU = c.C_BGQN @ S_BGUN.transpose(-1, -2)
        y_BHQP += by_head(far_BGQU, S_BHPN.shape[2]) * c.r_BHQ[..., None]
    return y_BHQP


class ChunkedScan(torch.autograd.Function):
    """y [B, T, H, P] and the last state [B, H, P, N], both at least fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A_H: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor | None,
        seg: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        batch, length, heads, width = x.shape
        groups, size = B.shape[2:]
        dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        dt, A_H = at_least_fp32(dt), at_least_fp32(A_H)
        wanted = any(ctx.needs_input_grad)
        if native.takes_scan(x, dt, B, C, chunk):
            y, last, befores = native.scan(x, dt, A_H, B, C, state, seg, chunk, wanted)
            if befores is not None:
                keep_for_backward(ctx, (x, dt, A_H, B, C, seg), [befores], chunk, state)
                ctx.native = True
            return y, last
        S_BHPN = x.new_zeros(batch, heads, width, size, dtype=wide) if state is None else state.to(wide)
        y = torch.empty(x.shape, dtype=wide, device=x.device)
        before = []
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            c = open_chunk(x, dt, A_H, B, C, seg, start, stop)
            before.append(S_BHPN)
            y[:, start:stop] = outputs(c, S_BHPN if start or state is not None else None).transpose(1, 2)
            left_BGQU = by_group((c.write_BHQP * c.l_BHQ[..., None]).to(dtype), groups)
            added_BHPN = (left_BGQU.transpose(-1, -2) @ c.B_BGQN).view(S_BHPN.shape)
            S_BHPN = torch.addcmul(at_least_fp32(added_BHPN), S_BHPN, c.e_BH[..., None, None])
        if wanted:
            keep_for_backward(ctx, (x, dt, A_H, B, C, seg), before, chunk, state)
        return y, S_BHPN

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dS_BHPN: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A_H, B, C, seg, *before = ctx.saved_tensors
        if ctx.native and dy is not None:
            inputs = x, dt, A_H, B, C, seg
            *gradients, dfirst = native_training.scan_backward(inputs, before[0], dy, dS_BHPN, ctx.chunk, ctx.carried)
            return *gradients, dfirst.to(ctx.dtypes) if ctx.carried else None, None, None
        before = before[0].unbind(0) if ctx.native else before
        dS_BHPN = torch.zeros_like(before[0]) if dS_BHPN is None else dS_BHPN
        dy = torch.zeros_like(x) if dy is None else dy.to(x.dtype)
        dx, dB, dC = torch.empty_like(x), torch.empty_like(B), torch.empty_like(C)
        ddt, dA_H = torch.empty_like(dt), torch.zeros_like(A_H)
        for z in reversed(range(len(before))):
            start, stop = z * ctx.chunk, min((z + 1) * ctx.chunk, x.shape[1])
            part = slice(start, stop)
            c = open_chunk(x, dt, A_H, B, C, seg, start, stop)
            dy_BHQP = dy[:, part].transpose(1, 2).contiguous()
            dW_BHQP, ds_BHQ, dB_BGQN, dC_BGQN = within_backward(c, dy_BHQP)
            if ctx.carried or z:
                past = from_past_backward(c, dy_BHQP, before[z])
            else:
                past = None
            ds_BHQ, dS_next = to_state_backward(c, dS_BHPN, before[z], dW_BHQP, ds_BHQ, dB_BGQN)
            if past is not None:
                dC_BGQN += past[0]
                ds_BHQ += past[1]
                dS_next += past[2]
            dS_BHPN = dS_next
            # s is a running sum: a token's dt A meets every later s of the chunk
            da_BHQ = ds_BHQ.sum(-1, keepdim=True) - ds_BHQ.cumsum(-1) + ds_BHQ
            dA_H += (da_BHQ * c.dt_BHQ).sum((0, 2))
            ddt_BHQ = da_BHQ * A_H[:, None] + (dW_BHQP * c.x_BHQP).sum(-1)
            ddt[:, part] = ddt_BHQ.transpose(1, 2)
            dx[:, part] = (dW_BHQP * c.dt_BHQ[..., None]).transpose(1, 2)
            dB[:, part], dC[:, part] = dB_BGQN.transpose(1, 2), dC_BGQN.transpose(1, 2)
        dstate = dS_BHPN.to(ctx.dtypes) if ctx.carried else None
        return dx, ddt, dA_H, dB, dC, dstate, None, None


def keep_for_backward(
    ctx: Any, inputs: Sequence[Tensor | None], before: Sequence[Tensor], chunk: int, state: Tensor | None
) -> None:
    """The inputs and the state before each chunk: all the rest is made again."""
    ctx.save_for_backward(*inputs, *before)
    ctx.native = False
    ctx.chunk, ctx.carried, ctx.dtypes = chunk, state is not None, None if state is None else state.dtype
    ctx.set_materialize_grads(False)


def within_backward(c: Chunk, dy_BHQP: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Through y = M W: gradients by W (fp32), s, B and C."""
    scores_BGRQQ = c.scores_BGQQ[:, :, None]
    dM_BGRQQ = (dy_BHQP @ c.write_BHQP.transpose(-1, -2)).view_as(c.decay_BGRQQ).mul_(c.decay_BGRQQ)
    dscores_BGQQ = dM_BGRQQ.sum(2).mul_(c.seen_BGQQ)
    ds_BGRQQ = dM_BGRQQ.mul_(scores_BGRQQ)  # dM * M: how much the gradient leans on each decay
    wide = c.s_BHQ.dtype
    ds_BHQ = (ds_BGRQQ.sum(-1, dtype=wide) - ds_BGRQQ.sum(-2, dtype=wide)).flatten(1, 2)
    mix_BHQQ = c.decay_BGRQQ.mul_(scores_BGRQQ).flatten(1, 2)
    dW_BHQP = at_least_fp32(mix_BHQQ.transpose(-1, -2) @ dy_BHQP)
    dC_BGQN = at_least_fp32(dscores_BGQQ @ c.B_BGQN)
    dB_BGQN = at_least_fp32(dscores_BGQQ.transpose(-1, -2) @ c.C_BGQN)
    return dW_BHQP, ds_BHQ, dB_BGQN, dC_BGQN


def from_past_backward(c: Chunk, dy_BHQP: Tensor, S_BHPN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Through y = r (C S^T): gradients by C, s and S."""
    batch, groups, _, size = c.C_BGQN.shape
    width, dtype = dy_BHQP.shape[-1], dy_BHQP.dtype
    S_BGUN = S_BHPN.to(dtype).view(batch, groups, -1, size)
    dfar_BHQP = dy_BHQP * c.r_BHQ[..., None]
    far_BHQP = by_head(c.C_BGQN @ S_BGUN.transpose(-1, -2), width)
    ds_BHQ = (dfar_BHQP * far_BHQP).sum(-1)
    dfar_BGQU = by_group(dfar_BHQP.to(dtype), groups)
    dS_BHPN = (dfar_BGQU.transpose(-1, -2) @ c.C_BGQN).view(S_BHPN.shape)
    return dfar_BGQU @ S_BGUN, ds_BHQ, at_least_fp32(dS_BHPN)


def to_state_backward(
    c: Chunk, dS_BHPN: Tensor, S_BHPN: Tensor, dW_BHQP: Tensor, ds_BHQ: Tensor, dB_BGQN: Tensor
) -> tuple[Tensor, Tensor]:
    """Through S' = e S + (l W)^T B: adds to dW and dB in place; returns ds and the gradient by S."""
    batch, groups, _, size = c.B_BGQN.shape
    width, dtype = dW_BHQP.shape[-1], c.write_BHQP.dtype
    dS_BGUN = dS_BHPN.to(dtype).view(batch, groups, -1, size)
    dleft_BHQP = by_head(c.B_BGQN @ dS_BGUN.transpose(-1, -2), width) * c.l_BHQ[..., None]
    dW_BHQP += dleft_BHQP
    lean_BHQ = (dleft_BHQP * c.write_BHQP).sum(-1)
    left_BGQU = by_group((c.write_BHQP * c.l_BHQ[..., None]).to(dtype), groups)
    dB_BGQN += left_BGQU @ dS_BGUN
    dS_before = dS_BHPN * c.e_BH[..., None, None]
    end_BH = lean_BHQ.sum(-1) + (dS_before * S_BHPN).sum((-1, -2))
    ds_BHQ = ds_BHQ - lean_BHQ
    return ds_BHQ + F.pad(end_BH[..., None], (ds_BHQ.shape[-1] - 1, 0)), dS_before
