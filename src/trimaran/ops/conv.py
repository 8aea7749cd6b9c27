"""The short causal convolution in front of the SSM: one filter of W taps per channel, with a carried tail.

    y_t = bias + sum_{i=0..W-1} w_i x_{t-W+1+i}

Written as W shifted multiply-adds: for four taps that beats a convolution call on a CPU, and document borders become
one mask per shift.
"""

import torch
from torch import Tensor


def causal_conv(
    x_BTC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    tail_BWC: Tensor | None = None,
    seg_BT: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution [B, T, C] -> [B, T, C].

    tail_BWC: the last W-1 inputs of the same document before this call (zeros when None).
    seg_BT: document numbers within this call, rising from 0 = the document the tail belongs to; taps never reach over
    a border.
    """
    taps, length = weight_CW.shape[1], x_BTC.shape[1]
    padded = join_tail(x_BTC, taps, tail_BWC)
    y_BTC = padded[:, taps - 1 :] * weight_CW[:, taps - 1]
    if bias_C is not None:
        y_BTC = y_BTC + bias_C
    seg_padded = None if seg_BT is None else torch.cat([seg_BT.new_zeros(len(seg_BT), taps - 1), seg_BT], 1)
    for i in range(taps - 1):
        past = padded[:, i : i + length] * weight_CW[:, i]
        if seg_padded is not None and seg_BT is not None:
            past = past.masked_fill(seg_padded[:, i : i + length].ne(seg_BT).unsqueeze(-1), 0)
        y_BTC = y_BTC + past
    return y_BTC


def join_tail(x_BTC: Tensor, taps: int, tail_BWC: Tensor | None) -> Tensor:
    """The inputs with the W-1 that precede them: [B, W-1+T, C]."""
    if tail_BWC is None:
        tail_BWC = x_BTC.new_zeros(x_BTC.shape[0], taps - 1, x_BTC.shape[2])
    return torch.cat([tail_BWC.to(x_BTC.dtype), x_BTC], 1)


def next_tail(
    x_BTC: Tensor,
    taps: int,
    tail_BWC: Tensor | None = None,
    seg_BT: Tensor | None = None,
    count_B: Tensor | None = None,
) -> Tensor:
    """The tail to carry on: the last W-1 inputs of the row's last document, zeros where it is shorter.

    count_B: tokens of each row that count (the rest is padding on the right).
    """
    padded = join_tail(x_BTC, taps, tail_BWC)
    if count_B is None:
        tail = padded[:, padded.shape[1] - (taps - 1) :]
    else:
        place_BW = count_B[:, None] + torch.arange(taps - 1, device=x_BTC.device)
        tail = padded.gather(1, place_BW[..., None].expand(-1, -1, padded.shape[2]))
    if seg_BT is None:
        return tail.clone()
    seg_padded = torch.cat([seg_BT.new_zeros(len(seg_BT), taps - 1), seg_BT], 1)
    if count_B is None:
        seg_tail = seg_padded[:, seg_padded.shape[1] - (taps - 1) :]
    else:
        seg_tail = seg_padded.gather(1, place_BW)
    return tail.masked_fill((seg_tail != seg_BT[:, -1:]).unsqueeze(-1), 0)
