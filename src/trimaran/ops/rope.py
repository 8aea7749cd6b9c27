"""Rotary positions (arXiv 2104.09864) in the half-split layout of Llama and Qwen checkpoints."""

import math

import torch
from torch import Tensor


def rope_frequencies(
    head_dim: int, theta: float, device: torch.device, scaling: dict[str, float] | None = None
) -> Tensor:
    """Angles per position for each of head_dim / 2 pairs, fp32.

    scaling: Llama-3.1's rule: wavelengths longer than original / low_freq_factor are stretched by `factor`, those
    shorter than original / high_freq_factor are kept, a linear ramp lies between.
    """
    freq = theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    if scaling is None:
        return freq
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return freq * (keep + (1 - keep) / scaling["factor"])


def rotary_table(positions_BT: Tensor, freq_K: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, 1, head_dim], computed in at least fp32 and cast to the dtype of queries and keys."""
    wide = torch.promote_types(dtype, torch.float32)
    angle_BTK = positions_BT[..., None].to(wide) * freq_K.to(wide)
    angle_BTK = torch.cat([angle_BTK, angle_BTK], -1).unsqueeze(2)
    return angle_BTK.cos().to(dtype), angle_BTK.sin().to(dtype)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x_i, x_{i + K/2}) by its position's angle."""
    first, second = x_BTHK.chunk(2, -1)
    return x_BTHK * cos + torch.cat([-second, first], -1) * sin
