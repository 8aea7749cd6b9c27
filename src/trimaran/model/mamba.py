"""The Mamba-2 mixer.

- one input projection, rows in the order z, x, B, C, dt; x, B and C pass the short convolution and SiLU together
- dt = softplus(dt_raw + dt_bias), never clamped; A = -exp(A_log) per head
- the recurrence of ops.ssd, then D * x, then a norm gated by z, then the output projection
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimaran.model.config import ModelConfig
from trimaran.model.layout import Layout
from trimaran.model.linear import Linear, plain
from trimaran.model.norm import GatedRMSNorm
from trimaran.model.scale import Scale
from trimaran.model.state import MambaMemory
from trimaran.ops import conv, native, native_training, ssd, triton_backend
from trimaran.ops.numbers import at_least_fp32


class CausalConv(nn.Module):
    """Filters [C, 1, W] and bias [C] of the short convolution, and the SiLU behind it."""

    def __init__(self, channels: int, taps: int, bias: bool):
        super().__init__()
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def few(self, x_BTC: Tensor, tail_BWC: Tensor) -> tuple[Tensor, Tensor]:
        """A few tokens: their outputs, and the tail with them behind it."""
        return conv.causal_conv_silu_few(x_BTC, self.weight[:, 0], self.bias, tail_BWC)

    def forward(self, x_BTC: Tensor, tail_BWC: Tensor | None, seg_BT: Tensor | None) -> Tensor:
        return conv.causal_conv_silu(x_BTC, self.weight[:, 0], self.bias, tail_BWC, seg_BT)


class Mamba(nn.Module):
    """Mamba-2 mixer [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.head_dim = config.mamba_num_heads, config.mamba_head_dim
        self.groups, self.size, self.chunk = config.n_groups, config.ssm_state_size, config.chunk_size
        self.width, self.conv_width = config.mamba_width, config.conv_width
        self.in_proj = Linear(config.hidden_size, self.width + self.conv_width + self.heads)
        self.s_in = None
        if config.residual == "ngpt":
            self.s_in = Scale(self.in_proj.out_features, config.hidden_size**0.5, 1.0)
        self.conv1d = CausalConv(self.conv_width, config.conv_kernel, config.use_conv_bias)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.norm = GatedRMSNorm(self.width, self.groups, config.layer_norm_epsilon)
        self.out_proj = Linear(self.width, config.hidden_size)

    def decay_rates(self) -> Tensor:
        """A, negative, per head."""
        return -torch.exp(at_least_fp32(self.A_log))

    def forward(self, x_BTD: Tensor, layout: Layout, state: MambaMemory | None) -> Tensor:
        projected = self.in_proj(x_BTD)
        if self.s_in is not None:
            projected = self.s_in(projected)
        if state is not None:
            done_BTC = state.mix(self, projected, layout)
            if done_BTC is not None:
                return self.out_proj(done_BTC)
        z_BTC, inputs_BTC, dt_BTH = projected.split([self.width, self.conv_width, self.heads], -1)
        if state is None:
            mixed_BTC = self.conv1d(inputs_BTC, None, layout.seg_BT)
        else:
            mixed_BTC = state.convolve(self.conv1d, inputs_BTC, layout)
        xs_BTC, B_BTC, C_BTC = mixed_BTC.split([self.width, self.groups * self.size, self.groups * self.size], -1)
        xs_BTHP = xs_BTC.unflatten(-1, (self.heads, self.head_dim))
        B_BTGN, C_BTGN = (t.unflatten(-1, (self.groups, self.size)) for t in (B_BTC, C_BTC))
        dt_BTH = F.softplus(at_least_fp32(dt_BTH) + at_least_fp32(self.dt_bias))
        real_BT = layout.real_BT
        if real_BT is not None:
            dt_BTH = dt_BTH * real_BT[..., None]  # a step of size 0 neither decays nor writes
        y_BTHP = self.scan(xs_BTHP, dt_BTH, B_BTGN, C_BTGN, layout, state)
        own = self.norm
        if plain(own, GatedRMSNorm) and native.takes_gated_norm(y_BTHP, xs_BTC, z_BTC):
            return self.out_proj(native.gated_norm(y_BTHP, xs_BTC, self.D, z_BTC, own.weight, own.groups, own.eps))
        if plain(own, GatedRMSNorm) and native_training.takes_gated_norm(y_BTHP, xs_BTC, z_BTC, own.groups):
            given = y_BTHP, xs_BTC, self.D, z_BTC, own.weight, own.groups, own.eps
            return self.out_proj(native_training.GatedNorm.apply(*given))
        y_BTHP = torch.addcmul(y_BTHP, at_least_fp32(xs_BTHP), at_least_fp32(self.D)[:, None])
        return self.out_proj(self.norm(y_BTHP.flatten(2), z_BTC))

    def takes(self, projected_SKC: Tensor, tail_SWC: Tensor, ssm_SHPN: Tensor) -> bool:
        """Whether `few` knows these tokens and this memory (ops.native, ops.triton_step)."""
        conv1d, norm = self.conv1d, self.norm
        if not plain(conv1d, CausalConv) or not plain(norm, GatedRMSNorm) or norm.groups != self.groups:
            return False
        if triton_backend.runs("triton.step", projected_SKC):
            from trimaran.ops import triton_step

            return triton_step.takes_mamba(projected_SKC, tail_SWC, ssm_SHPN)
        same = [t for t in (conv1d.weight, conv1d.bias, norm.weight) if t is not None]
        return native.takes_mamba(projected_SKC, tail_SWC, ssm_SHPN, (self.A_log, self.D, self.dt_bias), same)

    def few(
        self,
        projected_SKC: Tensor,
        tail_SWC: Tensor,
        ssm_SHPN: Tensor,
        slots_S: Tensor | None = None,
        trial: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What lies between the projections for K tokens of S documents, in one call: see ops.native.mamba."""
        conv1d, norm = self.conv1d, self.norm
        own = (conv1d.weight, conv1d.bias, self.A_log, self.D, self.dt_bias, norm.weight, norm.eps)
        if triton_backend.runs("triton.step", projected_SKC):
            from trimaran.ops import triton_step

            return triton_step.mamba(projected_SKC, tail_SWC, ssm_SHPN, slots_S, self.groups, *own, trial)
        return native.mamba(projected_SKC, tail_SWC, ssm_SHPN, slots_S, self.groups, *own, trial)

    def scan(
        self,
        x_BTHP: Tensor,
        dt_BTH: Tensor,
        B_BTGN: Tensor,
        C_BTGN: Tensor,
        layout: Layout,
        state: MambaMemory | None,
    ) -> Tensor:
        """The recurrence, from nothing or from what is remembered."""
        A_H = self.decay_rates()
        if state is None:
            return ssd.ssd(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, None, layout.seg_BT, self.chunk)[0]
        return state.scan(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, layout, self.chunk)
