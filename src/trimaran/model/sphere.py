"""nGPT (arXiv 2410.01131): a model whose hidden vectors and weight rows live on the unit sphere.

    h <- unit(h + |alpha| (unit(mixer(h)) - h))        in place of h + mixer(norm(h)); no norm layers, no final norm

- queries and keys, after any rotation: s_qk * unit(q), s_qk * unit(k); softmax scale +sqrt(head_dim)
- feed-forward: s_u * up, and s_v * sqrt(D) * gate where there is a gate; logits: s_z * (E_out h)
- every matrix row (column, for maps back into the residual) of length D has norm 1, after drawing and after each update
- a learned vector p is stored at its own scale and used as p * value / scale, so that Adam's step does not depend on
  the value. The paper's initial values: alpha 0.05, s_qk 1, s_u 1, s_v 1, s_z 1

The paper treats attention and gated feed-forwards. For Mamba-2 the extension here is one vector s_in * sqrt(D) on the
outputs of the input projection, which gives them back the size they have after an RMS norm; the mixer's own gated norm
stays. Keys and values are grouped here, so s_qk holds one entry per key head and channel, shared by its query heads.
"""

import torch
from torch import Tensor, nn

from trimaran.model.linear import Embedding, Linear
from trimaran.model.scale import Scale
from trimaran.ops.norm import unit_norm
from trimaran.ops.numbers import at_least_fp32

COLUMNS = ("o_proj", "out_proj", "down_proj")  # maps whose output is the residual: their columns have length D


def step_on_sphere(x_BTD: Tensor, mixed_BTD: Tensor, alpha: Scale) -> Tensor:
    """unit(h + |alpha| (unit(mixed) - h)), in at least fp32."""
    x, target = at_least_fp32(x_BTD), unit_norm(at_least_fp32(mixed_BTD))
    return unit_norm(x + alpha.vector().abs() * (target - x)).to(x_BTD.dtype)


def project(model: nn.Module) -> None:
    """Puts every matrix back on the sphere: rows of length D, or columns for maps into the residual."""
    for name, module in model.named_modules():
        project_module(name, module)


@torch.no_grad()
def project_module(name: str, module: nn.Module) -> None:
    """`project` for one module's own weight."""
    if isinstance(module, (Linear, Embedding)):
        axis = 0 if name.rsplit(".", 1)[-1] in COLUMNS else 1
        weight = module.weight
        weight.copy_(unit_norm(weight.transpose(axis, -1)).transpose(axis, -1))
