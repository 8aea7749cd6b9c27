"""Attention mixers: `*` without positions, `R` with rotary positions, `W` rotary inside a sliding window.

Grouped key-value heads, no biases, optional RMS norm of queries and keys per head (Qwen3), scale head_dim^-1/2.
Rotary positions count from the start of the token's document.
"""

from torch import Tensor, nn

from trimaran.model.config import ModelConfig
from trimaran.model.layout import Layout
from trimaran.model.linear import Linear
from trimaran.model.norm import RMSNorm
from trimaran.model.scale import Scale
from trimaran.model.state import AttentionMemory
from trimaran.ops import rope
from trimaran.ops.attention import attention
from trimaran.ops.norm import unit_norm


class Attention(nn.Module):
    """Causal grouped-query attention [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ModelConfig, letter: str):
        super().__init__()
        self.heads, self.groups, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.rotary, self.window = letter in "RW", config.sliding_window if letter == "W" else None
        self.theta = config.rope_theta
        self.scaling = None if config.rope_scaling is None else config.rope_scaling.model_dump()
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim)
        self.k_proj = Linear(config.hidden_size, self.groups * self.head_dim)
        self.v_proj = Linear(config.hidden_size, self.groups * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(self.head_dim, config.layer_norm_epsilon) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.layer_norm_epsilon) if config.qk_norm else None
        self.scale, self.s_qk = self.head_dim**-0.5, None
        if config.residual == "ngpt":
            self.scale = self.head_dim**0.5
            self.s_qk = Scale(self.groups * self.head_dim, 1.0, config.hidden_size**-0.5)

    def forward(self, x_BTD: Tensor, layout: Layout, state: AttentionMemory | None, keys: int) -> Tensor:
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (self.heads, self.head_dim))
        k_BTGK = self.k_proj(x_BTD).unflatten(-1, (self.groups, self.head_dim))
        v_BTGK = self.v_proj(x_BTD).unflatten(-1, (self.groups, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if self.rotary:
            freq = rope.rope_frequencies(self.head_dim, self.theta, x_BTD.device, self.scaling)
            cos, sin = layout.rotary_table(freq, (self.head_dim, self.theta), q_BTHK.dtype)
            q_BTHK, k_BTGK = rope.rotate(q_BTHK, cos, sin), rope.rotate(k_BTGK, cos, sin)
        if self.s_qk is not None:
            s_GK = self.s_qk.vector().view(self.groups, self.head_dim)
            s_HK = s_GK.repeat_interleave(self.heads // self.groups, 0)
            q_BTHK, k_BTGK = (unit_norm(t) * s.to(t.dtype) for t, s in ((q_BTHK, s_HK), (k_BTGK, s_GK)))
        if state is not None:
            out_BTHK = state.attend(q_BTHK, k_BTGK, v_BTGK, layout, keys, self.window, self.scale)
        else:
            out_BTHK = attention(q_BTHK, k_BTGK, v_BTGK, *layout.mask(keys, self.window), self.scale)
        return self.o_proj(out_BTHK.flatten(2))
