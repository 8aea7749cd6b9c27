"""The dense feed-forward: squared ReLU, down(relu(up x)^2), or SwiGLU, down(silu(gate x) * up x)."""

import torch.nn.functional as F
from torch import Tensor, nn

from trimaran.model.config import ModelConfig
from trimaran.model.linear import Linear


def activate(up: Tensor, gate: Tensor | None) -> Tensor:
    """relu(up)^2 where there is no gate, silu(gate) * up where there is."""
    return F.relu(up).square() if gate is None else F.silu(gate) * up


class FeedForward(nn.Module):
    """[.., D] -> [.., D] through `width` channels."""

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        self.up_proj = Linear(config.hidden_size, width)
        self.gate_proj = Linear(config.hidden_size, width) if config.ffn == "swiglu" else None
        self.down_proj = Linear(width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate = None if self.gate_proj is None else self.gate_proj(x)
        return self.down_proj(activate(self.up_proj(x), gate))
