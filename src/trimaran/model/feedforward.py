"""The dense feed-forward: squared ReLU, down(relu(up x)^2), or SwiGLU, down(silu(gate x) * up x)."""

import torch.nn.functional as F
from torch import Tensor, nn

from trimaran.model.config import ModelConfig
from trimaran.model.linear import Linear
from trimaran.model.scale import Scale
from trimaran.ops.activation import relu2


def activate(up: Tensor, gate: Tensor | None) -> Tensor:
    """relu(up)^2 where there is no gate, silu(gate) * up where there is."""
    return relu2(up) if gate is None else F.silu(gate) * up


class FeedForward(nn.Module):
    """[.., D] -> [.., D] through `width` channels."""

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        self.up_proj = Linear(config.hidden_size, width)
        self.gate_proj = Linear(config.hidden_size, width) if config.ffn == "swiglu" else None
        self.down_proj = Linear(width, config.hidden_size)
        self.s_u, self.s_v = None, None
        if config.residual == "ngpt":
            self.s_u = Scale(width, 1.0, 1.0)
            self.s_v = Scale(width, config.hidden_size**0.5, 1.0) if self.gate_proj is not None else None

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.up_proj(x), None if self.gate_proj is None else self.gate_proj(x)
        if self.s_u is not None:
            up = self.s_u(up)
        if self.s_v is not None:
            gate = self.s_v(gate)
        return self.down_proj(activate(up, gate))
