"""Attention of single queries over keys that lie in pages, told where by tensors alone: nothing comes from the host.

For steps that are captured once and replayed: how long each row is and which pages it has are read on the device.
`paged_attention_reference` gathers a row's keys at the largest length there can be; the twin on a GPU
(ops.triton_paged) reads each row's own.
"""

import torch
from torch import Tensor

from trimaran.ops import triton_backend


def paged_attention(
    q_NHK: Tensor, k_XGK: Tensor, v_XGK: Tensor, table_NP: Tensor, length_N: Tensor, page: int,
    window: int | None, scale: float,
) -> Tensor:  # fmt: skip
    """softmax(scale q.k^T) v of one query per row [N, H, K], over the row's last `window` keys (None: all).

    k, v: pools of places, `page` of them to a page; table_NP: each row's pages in order; length_N: its keys, >= 1.
    """
    if triton_backend.runs("triton.paged", q_NHK):
        from trimaran.ops import triton_paged

        return triton_paged.paged_attention(q_NHK, k_XGK, v_XGK, table_NP, length_N, page, window, scale)
    return paged_attention_reference(q_NHK, k_XGK, v_XGK, table_NP, length_N, page, window, scale)


def paged_attention_reference(
    q_NHK: Tensor, k_XGK: Tensor, v_XGK: Tensor, table_NP: Tensor, length_N: Tensor, page: int,
    window: int | None, scale: float,
) -> Tensor:  # fmt: skip
    key_S = torch.arange(table_NP.shape[1] * page, device=q_NHK.device)
    seen_NS = key_S < length_N[:, None]
    if window is not None:
        seen_NS = seen_NS & (key_S >= length_N[:, None] - window)
    # Unseen keys repeat the row's last one, for a table's spare pages may hold anything: 0 * NaN is NaN.
    key_NS = torch.where(seen_NS, key_S, length_N[:, None] - 1)
    place_NS = table_NP.gather(1, key_NS // page) * page + key_NS % page
    k_NSGK, v_NSGK = (t[place_NS] for t in (k_XGK, v_XGK))
    q_NGRK = q_NHK.unflatten(1, (k_XGK.shape[1], -1))
    scores_NGRS = torch.einsum("ngrk,nsgk->ngrs", q_NGRK, k_NSGK) * scale
    scores_NGRS = scores_NGRS.masked_fill(~seen_NS[:, None, None], -torch.inf)
    weights_NGRS = scores_NGRS.softmax(-1, dtype=torch.promote_types(q_NHK.dtype, torch.float32))
    return torch.einsum("ngrs,nsgk->ngrk", weights_NGRS.to(v_NSGK.dtype), v_NSGK).flatten(1, 2)
