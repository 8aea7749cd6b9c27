"""Causal attention with grouped key-value heads. Every query sees one contiguous stretch of keys.

That stretch, [first, last] in the row's own key positions, expresses causality, document borders, sliding windows and
rows of different length alike, so a mask is all the kernel needs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask_BTS: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """softmax(scale q.k^T) v -> [B, T, H, K], through torch's fused kernel.

    mask_BTS: True where query t may see key s; may lack the batch axis ([T, S]); None: all keys, or only those up to
    the query's own index when `causal` (needs T == S).
    """
    if mask_BTS is not None and mask_BTS.ndim == 3:
        mask_BTS = mask_BTS.unsqueeze(1)
    q, k, v = (t.transpose(1, 2) for t in (q_BTHK, k_BSGK, v_BSGK))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask_BTS, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
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
