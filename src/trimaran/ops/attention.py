"""Causal attention with grouped key-value heads. Every query sees one contiguous stretch of keys.

That stretch, [first, last] in the row's own key positions, expresses causality, document borders, sliding windows and
rows of different length alike, so a mask is all the kernel needs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.ops import backend, native, native_training
from trimaran.ops.numbers import at_least_fp32

SHORT = 1024  # tokens up to which CPUTraining's backward is quicker than the fused kernel's
QUERIES = 64  # queries per step of that backward
FEW, WIDE = 4, 1 << 15  # up to so many queries of one row over so many numbers of keys, two plain products are quicker


def attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask_BTS: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """softmax(scale q.k^T) v -> [B, T, H, K], through torch's fused kernel or, on a CPU, one of ours.

    mask_BTS: True where query t may see key s; may lack the batch axis ([T, S]); None: all keys, or only those up to
    the query's own index when `causal` (needs T == S). Where T == S no mask may reach past the query's own index.
    """
    if not backend.allowed("torch.attention"):
        return attention_reference(q_BTHK, k_BSGK, v_BSGK, mask_BTS, causal, scale)
    if mask_BTS is not None and mask_BTS.ndim == 3:
        mask_BTS = mask_BTS.unsqueeze(1)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (q_BTHK, k_BSGK, v_BSGK))
    own = (causal or mask_BTS is not None) and q_BTHK.shape[1] == k_BSGK.shape[1] <= SHORT
    if wanted and own and q_BTHK.device.type == "cpu" and q_BTHK.dtype == k_BSGK.dtype == v_BSGK.dtype:
        if native_training.takes_attention(q_BTHK, k_BSGK, v_BSGK):
            mask = None if mask_BTS is None else mask_BTS.squeeze(1) if mask_BTS.ndim == 4 else mask_BTS
            return native_training.Attention.apply(q_BTHK, k_BSGK, v_BSGK, mask, scale)
        return CPUTraining.apply(q_BTHK, k_BSGK, v_BSGK, mask_BTS, causal, scale)
    if causal and mask_BTS is None and q_BTHK.device.type == "cpu" and not torch.is_grad_enabled():
        batch, length = q_BTHK.shape[:2]
        q_NHK, k_XGK, v_XGK = (t.flatten(0, 1) for t in (q_BTHK, k_BSGK, v_BSGK))
        if length > FEW and native.takes_long_attention(q_NHK, k_XGK, v_XGK):
            at = native.table([[row * length] for row in range(batch)], [length] * batch, [0] * batch, length)
            return native.attend_long(q_NHK, k_XGK, v_XGK, at, None, scale).view(q_BTHK.shape)
    q, k, v = (t.transpose(1, 2) for t in (q_BTHK, k_BSGK, v_BSGK))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask_BTS, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def attention_of_last(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, scale: float) -> Tensor:
    """Causal attention of tokens that are the last of those that keys and values belong to: [B, T, H, K].

    T <= S. A mask [T, S] is made on a CPU alone, whose kernel does not know this case.
    """
    length, keys = q_BTHK.shape[1], k_BSGK.shape[1]
    if length == keys:
        return attention(q_BTHK, k_BSGK, v_BSGK, None, True, scale)
    if q_BTHK.device.type == "cpu":
        mask_TS = torch.ones(length, keys, dtype=torch.bool).tril_(keys - length)
        return attention(q_BTHK, k_BSGK, v_BSGK, mask_TS, False, scale)
    from torch.nn.attention.bias import causal_lower_right  # torch's compiler comes with it: seconds

    q, k, v = (t.transpose(1, 2) for t in (q_BTHK, k_BSGK, v_BSGK))
    bias = causal_lower_right(length, keys)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def attention_reference(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask_BTS: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """The same, spelled out. Rows that see no key give zeros."""
    heads, groups = q_BTHK.shape[2], k_BSGK.shape[2]
    k_BSHK, v_BSHK = (t.repeat_interleave(heads // groups, 2) for t in (k_BSGK, v_BSGK))
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * scale
    if causal:
        mask_BTS = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=q_BTHK.device).tril()
    if mask_BTS is not None:
        seen = mask_BTS if mask_BTS.ndim == 2 else mask_BTS.unsqueeze(1)
        scores_BHTS = scores_BHTS.masked_fill(~seen, -torch.inf)
    weights = torch.softmax(scores_BHTS, -1, dtype=torch.promote_types(scores_BHTS.dtype, torch.float32))
    return torch.einsum("bhts,bshk->bthk", weights.nan_to_num(0.0).to(v_BSHK.dtype), v_BSHK)


def partial_attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask_BTS: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """`attention` over some of the keys, and the log of its sum of weights, which `merge` joins with other keys'.

    out [B, T, H, K] and lse [B, T, H], both in at least fp32, without gradient. Every query must see a key. Where
    `plain_products` are quicker they have a group's heads under one another, so that keys and values are read once.
    """
    if mask_BTS is not None and mask_BTS.ndim == 3:
        mask_BTS = mask_BTS.unsqueeze(1)
    (batch, length, heads, width), groups = q_BTHK.shape, k_BSGK.shape[2]
    if not plain_products(q_BTHK, k_BSGK):
        bias = None if mask_BTS is None else additive(mask_BTS, q_BTHK.dtype)
        out, lse_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(t.transpose(1, 2) for t in (q_BTHK, k_BSGK, v_BSGK)), 0.0, causal, attn_mask=bias, scale=scale
        )
        return at_least_fp32(out.transpose(1, 2)), at_least_fp32(lse_BHT.transpose(1, 2))
    q_BGUK = (
        (q_BTHK * scale).view(batch, length, groups, -1, width).permute(0, 2, 3, 1, 4).reshape(batch, groups, -1, width)
    )
    scores_BGUS = at_least_fp32(q_BGUK @ k_BSGK.permute(0, 2, 3, 1))
    if causal:
        mask_BTS = torch.ones(length, length, dtype=torch.bool, device=q_BTHK.device).tril()
    if mask_BTS is not None:
        scores_BHTS = scores_BGUS.view(batch, heads, length, -1).masked_fill_(~mask_BTS, -torch.inf)
        scores_BGUS = scores_BHTS.view(scores_BGUS.shape)
    top_BGU1 = scores_BGUS.amax(-1, keepdim=True)
    weights_BGUS = scores_BGUS.sub_(top_BGU1).exp_()
    sum_BGU1 = weights_BGUS.sum(-1, keepdim=True)
    out_BGUK = at_least_fp32(weights_BGUS.to(v_BSGK.dtype) @ v_BSGK.transpose(1, 2)) / sum_BGU1
    lse_BGU1 = top_BGU1 + sum_BGU1.log()
    return out_BGUK.view(batch, heads, length, width).transpose(1, 2), lse_BGU1.view(batch, heads, length).mT


def plain_products(q_BTHK: Tensor, k_BSGK: Tensor) -> bool:
    """Whether two plain products are quicker than a CPU's fused kernel, which reads keys again for every head."""
    if not backend.allowed("torch.attention"):
        return True
    few = q_BTHK.shape[0] == 1 and q_BTHK.shape[1] <= FEW
    return q_BTHK.device.type != "cpu" or (few and k_BSGK.shape[1] * k_BSGK.shape[3] > WIDE)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where True, -inf where False, with the four axes that the fused kernel wants."""
    bias = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
    return bias.view((1,) * (4 - bias.ndim) + bias.shape)


def merge(out_BTHK: Tensor, lse_BTH: Tensor, more_BTHK: Tensor, more_BTH: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial attentions of the same queries over different keys as one; an lse of -inf stands for no keys."""
    both_BTH = torch.logaddexp(lse_BTH, more_BTH)
    out_BTHK = out_BTHK * (lse_BTH - both_BTH).exp()[..., None] + more_BTHK * (more_BTH - both_BTH).exp()[..., None]
    return out_BTHK, both_BTH


def worth_sharing(rows: int, keys: int, launch_keys: float) -> bool:
    """Whether `rows` rows should read `keys` common keys once (bifurcated attention, arXiv 2403.08845).

    It saves reading them rows - 1 times, and costs one more call, which merges its result too. launch_keys: what
    starting a call costs, in keys that could be read meanwhile.
    """
    return (rows - 1) * keys > launch_keys


class CPUTraining(torch.autograd.Function):
    """Forward by the fused kernel, so that training and inference compute the same; backward in plain products.

    Of the scores only the forward's log-sum-exp is kept; a block of queries and the keys up to it at a time,

        P = exp(scale q.k^T - lse)                   dv = P^T do
        dS = P (do v^T - rowsum(do o))               dq = scale dS k    dk = scale dS^T q

    Rows of a key-value group's heads stand under one another, so that each block is one product per group.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        bias = None if mask is None else additive(mask, q.dtype)
        out, lse_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(t.transpose(1, 2) for t in (q, k, v)), 0.0, causal, attn_mask=bias, scale=scale
        )
        ctx.save_for_backward(q, k, v, mask, out, lse_BHT)
        ctx.causal, ctx.scale = causal, scale
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, lse_BHT = ctx.saved_tensors
        (batch, length, heads, width), groups, dtype = q.shape, k.shape[2], q.dtype
        shared = heads // groups

        def under(x_BTHK: Tensor) -> Tensor:
            """[B, T, H, K] -> [B*G, T*R, K]."""
            x = x_BTHK.reshape(batch, length, groups, shared, -1).transpose(1, 2)
            return x.reshape(batch * groups, length * shared, -1)

        wide = torch.promote_types(dtype, torch.float32)
        grad_rows, q_rows = under(grad), under(q * ctx.scale)
        lean_rows = under((grad.to(wide) * out.transpose(1, 2)).sum(-1, keepdim=True))
        lse_rows = under(lse_BHT.transpose(1, 2)[..., None])
        k_rows, v_rows = (t.transpose(1, 2).reshape(batch * groups, length, width) for t in (k, v))
        dq = torch.empty_like(q_rows)
        dk, dv = (torch.zeros_like(k_rows, dtype=wide) for _ in range(2))
        triangle = torch.ones(QUERIES, QUERIES, dtype=torch.bool).tril_()
        for start in range(0, length, QUERIES):
            stop = min(start + QUERIES, length)
            part, seen = slice(start * shared, stop * shared), slice(0, stop)
            scores = torch.bmm(q_rows[:, part], k_rows[:, seen].transpose(1, 2)).to(wide)
            weights = scores.sub_(lse_rows[:, part]).exp_().view(batch, groups, stop - start, shared, -1)
            if ctx.causal:
                hidden = ~triangle[: stop - start, : stop - start]
                weights[..., start:].masked_fill_(hidden[:, None], 0)
            elif mask is not None:
                weights.masked_fill_(~mask[..., start:stop, seen].unsqueeze(-2), 0)
            weights = weights.view(batch * groups, (stop - start) * shared, -1).to(dtype)
            dv[:, seen] += torch.bmm(weights.transpose(1, 2), grad_rows[:, part])
            dscores = torch.bmm(grad_rows[:, part], v_rows[:, seen].transpose(1, 2))
            dscores = dscores.sub_(lean_rows[:, part].to(dtype)).mul_(weights)
            dq[:, part] = torch.bmm(dscores, k_rows[:, seen])
            dk[:, seen] += torch.bmm(dscores.transpose(1, 2), q_rows[:, part])
        dq = (dq * ctx.scale).view(batch, groups, length, shared, width).transpose(1, 2).reshape(q.shape)
        dk, dv = (t.to(dtype).view(batch, groups, length, width).transpose(1, 2) for t in (dk, dv))
        return dq, dk, dv, None, None, None
