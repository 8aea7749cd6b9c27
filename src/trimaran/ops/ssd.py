"""The Mamba-2 recurrence (state space duality, arXiv 2405.21060), in its step form and its chunked matmul form.

Per head, with a_t = exp(dt_t A), A < 0:

    S_t = a_t S_{t-1} + dt_t x_t B_t^T          S: [P, N]
    y_t = S_t C_t

Heads share B and C within a group. `dt` is used as given: it is never clamped, so that both forms and the hub's
semantics agree. The chunked form splits T into chunks of Q tokens and needs only matrix products:

    inside a chunk   y_i += sum_{j<=i} exp(s_i - s_j) (C_i . B_j) dt_j x_j       s = running sum of dt A in the chunk
    chunk states     S_z  = exp(s_end) S_{z-1} + sum_j exp(s_end - s_j) dt_j x_j B_j^T
    from the past    y_i += exp(s_i) S_{z-1} C_i

C.B is formed once per group, not per head; the states of a group's heads are one wide product; decay, running sums and
carried states stay in at least fp32 while the products take operands of x's dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.ops import backend, triton_backend
from trimaran.ops.numbers import at_least_fp32
from trimaran.ops.ssd_chunks import ChunkedScan, open_chunk, outputs

CPU_CHUNK = 64  # longer chunks leave the cache, shorter ones move more state


def ssd_step(
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    state_BHPN: Tensor,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token: returns y [B, H, P] in the state's dtype and the new state [B, H, P, N].

    in_place: the old state's memory becomes the new state's (no gradient may be wanted).
    """
    batch, groups, size = B_BGN.shape
    wide = state_BHPN.dtype
    decay_BH11 = torch.exp(dt_BH * A_H)[..., None, None]
    write_BGU1 = (x_BHP.to(wide) * dt_BH[..., None]).view(batch, groups, -1, 1)
    kept_BHPN = state_BHPN.mul_(decay_BH11) if in_place else state_BHPN * decay_BH11
    kept_BGUN = kept_BHPN.view(batch, groups, -1, size)
    row_BG1N = B_BGN.to(wide).unsqueeze(2)
    if in_place:
        state_BGUN = kept_BGUN.addcmul_(write_BGU1, row_BG1N)
    else:
        state_BGUN = torch.addcmul(kept_BGUN, write_BGU1, row_BG1N)
    state_BHPN = state_BGUN.view(state_BHPN.shape)
    return read_out(C_BGN, state_BHPN), state_BHPN


def read_out(C_BGN: Tensor, state_BHPN: Tensor) -> Tensor:
    """y = S C per head: [B, H, P]."""
    batch, groups, size = C_BGN.shape
    _, heads, width, _ = state_BHPN.shape
    # C as a row times the state's transpose: a CPU's matrix library is several times slower the other way round
    row_X1N = C_BGN.to(state_BHPN.dtype).reshape(batch * groups, 1, size)
    return torch.bmm(row_X1N, state_BHPN.view(batch * groups, -1, size).mT).view(batch, heads, width)


def ssd_steps(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """A few tokens one after the other: y [B, T, H, P] and the state after each [T, B, H, P, N]. Without gradient.

    The same as `ssd_look`, and as `ssd_fold` for every number of tokens: fewer calls, and more of the state moved.
    """
    (batch, length, groups, size), wide = B_BTGN.shape, state_BHPN.dtype
    decay_TBH11 = torch.exp(dt_BTH * A_H).transpose(0, 1)[..., None, None]
    write_BTHP = x_BTHP.to(wide) * dt_BTH[..., None]
    write_TBGU1 = write_BTHP.view(batch, length, groups, -1, 1).transpose(0, 1)
    row_TBG1N = B_BTGN.to(wide).transpose(0, 1).unsqueeze(3)
    states = state_BHPN.new_empty(length, *state_BHPN.shape)
    for t, after in enumerate(states.unbind(0)):
        torch.mul(state_BHPN, decay_TBH11[t], out=after)
        after.view(batch, groups, -1, size).addcmul_(write_TBGU1[t], row_TBG1N[t])
        state_BHPN = after
    y_XHP = read_out(C_BTGN.transpose(0, 1).flatten(0, 1), states.flatten(0, 1))
    return y_XHP.unflatten(0, (length, batch)).transpose(0, 1), states


def ssd_look(x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, state_BHPN: Tensor) -> Tensor:
    """y [B, T, H, P] of a few tokens behind a state that stays as it is; `ssd_fold` moves it on. Without gradient."""
    chunk = open_chunk(x_BTHP, at_least_fp32(dt_BTH), A_H, B_BTGN, C_BTGN, None, 0, x_BTHP.shape[1])
    return outputs(chunk, state_BHPN).transpose(1, 2)


def ssd_fold(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, state_BHPN: Tensor, in_place: bool = False
) -> Tensor:
    """The state after a few tokens, without their outputs: one product over all of them, in the state's dtype.

    Tokens with dt = 0 never happened. in_place: the old state's memory becomes the new state's.
    """
    batch, length = x_BTHP.shape[:2]
    groups = B_BTGN.shape[2]
    wide = state_BHPN.dtype
    s_BTH = torch.cumsum(dt_BTH * A_H, 1)
    left_BTH = torch.exp(s_BTH[:, -1:] - s_BTH) * dt_BTH
    write_BTHP = x_BTHP.to(wide) * left_BTH[..., None]
    write_BGUT = write_BTHP.view(batch, length, groups, -1).permute(0, 2, 3, 1)
    added_BHPN = (write_BGUT @ B_BTGN.to(wide).transpose(1, 2)).view(state_BHPN.shape)
    decay_BH11 = torch.exp(s_BTH[:, -1])[..., None, None]
    if in_place:
        return state_BHPN.mul_(decay_BH11).add_(added_BHPN)
    return torch.addcmul(added_BHPN, state_BHPN, decay_BH11)


def ssd_recurrence(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHPN: Tensor | None = None,
    seg_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference: token by token, resetting the state where `seg_BT` rises. Same arguments as `ssd`."""
    batch, length, heads, width = x_BTHP.shape
    wide = torch.promote_types(x_BTHP.dtype, torch.float32)
    state = x_BTHP.new_zeros(batch, heads, width, B_BTGN.shape[-1], dtype=wide) if state_BHPN is None else state_BHPN
    outputs = []
    for t in range(length):
        if seg_BT is not None:
            before_B = seg_BT[:, t - 1] if t else torch.zeros_like(seg_BT[:, 0])
            state = state.masked_fill((seg_BT[:, t] != before_B)[:, None, None, None], 0)
        y, state = ssd_step(x_BTHP[:, t], at_least_fp32(dt_BTH[:, t]), A_H, B_BTGN[:, t], C_BTGN[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHPN: Tensor | None = None,
    seg_BT: Tensor | None = None,
    chunk: int = 128,
) -> tuple[Tensor, Tensor]:
    """Chunked scan. Returns y [B, T, H, P] and the state after the last token [B, H, P, N], both at least fp32.

    On a CPU the chunks run one after the other (ops.ssd_chunks), elsewhere all at once.

    x_BTHP: inputs; dt_BTH: step sizes after softplus (0 leaves the state alone: padding); A_H: negative decay rates;
    B_BTGN, C_BTGN: input and output maps per group; state_BHPN: the state before the first token (zeros when None);
    seg_BT: document numbers, 0 = the document that `state_BHPN` belongs to, rising by one at every border.
    """
    if triton_backend.runs("triton.ssd", x_BTHP):
        from trimaran.ops import triton_ssd

        return triton_ssd.ssd(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHPN, seg_BT, chunk)
    if not backend.allowed("torch.ssd"):
        return ssd_recurrence(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHPN, seg_BT)
    if x_BTHP.device.type == "cpu":
        return ChunkedScan.apply(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHPN, seg_BT, min(chunk, CPU_CHUNK))
    return ssd_batched(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHPN, seg_BT, chunk)


def ssd_batched(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHPN: Tensor | None = None,
    seg_BT: Tensor | None = None,
    chunk: int = 128,
) -> tuple[Tensor, Tensor]:
    """`ssd` with all chunks at once, its gradient left to autograd."""
    batch, length, heads, width = x_BTHP.shape
    groups, size = B_BTGN.shape[2:]
    chunk = min(chunk, length)
    x_BTHP, dt_BTH, B_BTGN, C_BTGN = (pad_to_chunks(t, chunk) for t in (x_BTHP, dt_BTH, B_BTGN, C_BTGN))
    Z = x_BTHP.shape[1] // chunk
    shared = heads // groups
    seg_BZQ = None if seg_BT is None else pad_to_chunks(seg_BT, chunk, repeat_last=True).view(batch, Z, chunk)

    # [B, Z, G, Q, ...]: everything below is a batched product per group or per head
    dt_BZHQ = at_least_fp32(dt_BTH).view(batch, Z, chunk, heads).transpose(2, 3)
    s_BZHQ = torch.cumsum(dt_BZHQ * A_H[:, None], -1)
    x_BZHQP = x_BTHP.view(batch, Z, chunk, heads, width).transpose(2, 3)
    B_BZGQN = B_BTGN.view(batch, Z, chunk, groups, size).transpose(2, 3).to(x_BTHP.dtype)
    C_BZGQN = C_BTGN.view(batch, Z, chunk, groups, size).transpose(2, 3).to(x_BTHP.dtype)
    write_BZHQP = x_BZHQP * dt_BZHQ[..., None].to(x_BTHP.dtype)

    y_BZHQP = within_chunks(s_BZHQ, write_BZHQP, B_BZGQN, C_BZGQN, seg_BZQ)
    states_BZHPN = chunk_states(s_BZHQ, write_BZHQP, B_BZGQN, seg_BZQ)
    before_BZHPN, last_BHPN = carry_states(states_BZHPN, s_BZHQ[..., -1], state_BHPN, seg_BZQ)

    # from the past: one wide product [Q, N] x [N, heads of the group * P]
    past_BZGRN = before_BZHPN.to(x_BTHP.dtype).view(batch, Z, groups, shared * width, size)
    reach_BZHQ = torch.exp(s_BZHQ)
    if seg_BZQ is not None:
        reach_BZHQ = reach_BZHQ.masked_fill((seg_BZQ != seg_before(seg_BZQ)).unsqueeze(2), 0)
    far_BZGQR = C_BZGQN @ past_BZGRN.transpose(-1, -2)
    far_BZHQP = far_BZGQR.view(batch, Z, groups, chunk, shared, width).transpose(3, 4).flatten(2, 3)
    y_BZHQP = y_BZHQP + far_BZHQP * reach_BZHQ[..., None]
    return y_BZHQP.transpose(2, 3).reshape(batch, Z * chunk, heads, width)[:, :length], last_BHPN


def ssd_from_past(
    dt_BTH: Tensor, A_H: Tensor, C_BTGN: Tensor, state_BHPN: Tensor, seg_BT: Tensor | None = None
) -> Tensor:
    """What `state_BHPN` before the first token adds to the outputs [B, T, H, P], in the state's dtype; see `ssd`.

    The recurrence is linear in its state: `ssd` from a state is `ssd` from nothing and this.
    """
    batch, length, groups, size = C_BTGN.shape
    reach_BTH = torch.exp(torch.cumsum(at_least_fp32(dt_BTH) * A_H, 1))
    if seg_BT is not None:
        reach_BTH = reach_BTH.masked_fill(seg_BT.ne(0)[..., None], 0)
    past_BGUN = state_BHPN.to(C_BTGN.dtype).view(batch, groups, -1, size)
    far_BTGU = (C_BTGN.transpose(1, 2) @ past_BGUN.transpose(2, 3)).transpose(1, 2)
    return far_BTGU.reshape(batch, length, *state_BHPN.shape[1:3]) * reach_BTH[..., None]


def within_chunks(
    s_BZHQ: Tensor, write_BZHQP: Tensor, B_BZGQN: Tensor, C_BZGQN: Tensor, seg_BZQ: Tensor | None
) -> Tensor:
    """What the tokens of a chunk write to later tokens of the same chunk and document: [B, Z, H, Q, P]."""
    batch, Z, heads, chunk = s_BZHQ.shape
    groups = B_BZGQN.shape[2]
    # Masked before exp: above the diagonal s_i - s_j is positive and could overflow.
    decay = s_BZHQ[..., :, None] - s_BZHQ[..., None, :]
    hidden_QQ = torch.ones(chunk, chunk, dtype=torch.bool, device=decay.device).triu(1)
    if seg_BZQ is not None:
        hidden_QQ = hidden_QQ | (seg_BZQ[:, :, None, :, None] != seg_BZQ[:, :, None, None, :])
    decay = decay.masked_fill_(hidden_QQ, -torch.inf).exp_().to(write_BZHQP.dtype)
    mix_BZGQQ = C_BZGQN @ B_BZGQN.transpose(-1, -2)
    mix = mix_BZGQQ[:, :, :, None] * decay.view(batch, Z, groups, heads // groups, chunk, chunk)
    return mix.view(batch, Z, heads, chunk, chunk) @ write_BZHQP


def chunk_states(s_BZHQ: Tensor, write_BZHQP: Tensor, B_BZGQN: Tensor, seg_BZQ: Tensor | None) -> Tensor:
    """What each chunk adds to the state by its end, from the chunk's last document: [B, Z, H, P, N]."""
    batch, Z, heads, chunk = s_BZHQ.shape
    groups, width = B_BZGQN.shape[2], write_BZHQP.shape[-1]
    left_BZHQ = torch.exp(s_BZHQ[..., -1:] - s_BZHQ)
    if seg_BZQ is not None:
        left_BZHQ = left_BZHQ.masked_fill((seg_BZQ != seg_BZQ[..., -1:]).unsqueeze(2), 0)
    kept = (write_BZHQP * left_BZHQ[..., None].to(write_BZHQP.dtype)).view(batch, Z, groups, -1, chunk, width)
    wide_BZGRQ = kept.transpose(-1, -2).reshape(batch, Z, groups, -1, chunk)
    return (wide_BZGRQ @ B_BZGQN).view(batch, Z, heads, width, -1)


def carry_states(
    states_BZHPN: Tensor, total_BZH: Tensor, state_BHPN: Tensor | None, seg_BZQ: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Runs the states through the chunks in order: the state before each chunk [B, Z, H, P, N], and the last."""
    states = at_least_fp32(states_BZHPN)
    decay_BZH = torch.exp(total_BZH)
    if seg_BZQ is not None:  # the past survives a chunk only when its document is still running at the end
        decay_BZH = decay_BZH.masked_fill((seg_BZQ[..., -1] != seg_before(seg_BZQ)[..., 0]).unsqueeze(-1), 0)
    carried = torch.zeros_like(states[:, 0]) if state_BHPN is None else state_BHPN.to(states.dtype)
    before = []
    for z in range(states.shape[1]):
        before.append(carried)
        carried = torch.addcmul(states[:, z], carried, decay_BZH[:, z, :, None, None])
    return torch.stack(before, 1), carried


def seg_before(seg_BZQ: Tensor) -> Tensor:
    """The document number running just before each chunk: [B, Z, 1]; 0 before the first."""
    return F.pad(seg_BZQ[:, :-1, -1], (1, 0)).unsqueeze(-1)


def pad_to_chunks(x_BT: Tensor, chunk: int, repeat_last: bool = False) -> Tensor:
    """Pads dimension 1 up to a multiple of `chunk`: with zeros (dt = 0: no effect), or with the row's last entry."""
    missing = -x_BT.shape[1] % chunk
    if not missing:
        return x_BT
    if repeat_last:
        return torch.cat([x_BT, x_BT[:, -1:].expand(-1, missing)], 1)
    return torch.cat([x_BT, x_BT.new_zeros(x_BT.shape[0], missing, *x_BT.shape[2:])], 1)
