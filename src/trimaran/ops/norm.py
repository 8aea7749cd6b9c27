"""RMS norm, and Mamba-2's gated grouped RMS norm. Mean squares and weight multiplies in at least fp32, cast last.

The references are the formulas; the twins write the gradient down, keep nothing but the inputs and one number per norm,
and run over cache-sized blocks of rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.ops import backend, native, native_training, triton_backend
from trimaran.ops.blocks import blocks
from trimaran.ops.numbers import WIDE, at_least_fp32


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, returned in `dtype` (x's own when None)."""
    if triton_backend.runs("triton.norm", x_D):
        from trimaran.ops import triton_norm

        return triton_norm.rms_norm(x_D, weight_D, eps, dtype)
    if dtype in (None, x_D.dtype) and native.takes_norm(x_D, weight_D):
        return native.rms_norm(x_D, weight_D, eps)
    if not backend.allowed("torch.norm"):
        return rms_norm_reference(x_D, weight_D, eps, dtype)
    if few(x_D):
        if x_D.dtype in WIDE and dtype in (None, x_D.dtype):
            return F.rms_norm(x_D, weight_D.shape, weight_D, eps)
        return rms_norm_reference(x_D, weight_D, eps, dtype)
    if native_training.takes_norm(x_D, weight_D, dtype or x_D.dtype):
        return native_training.RMSNorm.apply(x_D, weight_D, eps, dtype or x_D.dtype)
    return RMSNorm.apply(x_D, weight_D, eps, dtype or x_D.dtype)


def few(x: Tensor) -> bool:
    """Whether the plain formula is the quicker one: decoding, where steps cost more than elements."""
    return x.numel() <= 1 << 15 and not torch.is_grad_enabled()


def rms_norm_reference(x_D: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    x = at_least_fp32(x_D)
    return (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_D).to(dtype or x_D.dtype)


def gated_rms_norm(y_D: Tensor, gate_D: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    """RMS norm of y * silu(gate), separately over each of `groups` equal slices of the last axis.

    The gate comes before the norm (norm_before_gate = False in the released models). Returned in gate's dtype.
    """
    if triton_backend.runs("triton.norm", gate_D):
        from trimaran.ops import triton_norm

        return triton_norm.gated_rms_norm(y_D, gate_D, weight_D, groups, eps)
    if few(y_D) or not backend.allowed("torch.norm"):
        return gated_rms_norm_reference(y_D, gate_D, weight_D, groups, eps)
    return GatedRMSNorm.apply(y_D, gate_D, weight_D, groups, eps)


def gated_rms_norm_reference(y_D: Tensor, gate_D: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    u = at_least_fp32(y_D) * F.silu(at_least_fp32(gate_D))
    grouped = u.unflatten(-1, (groups, -1))
    scale = (grouped.square().mean(-1, keepdim=True) + eps).rsqrt()
    return ((grouped * scale).flatten(-2) * weight_D).to(gate_D.dtype)


def unit_norm(x_D: Tensor) -> Tensor:
    """x / ||x|| over the last axis, computed in at least fp32 (nGPT, arXiv 2410.01131); 0 stays 0, as padding is."""
    x = at_least_fp32(x_D)
    return F.normalize(x, dim=-1, eps=torch.finfo(x.dtype).tiny).to(x_D.dtype)


def rows_of(x_D: Tensor) -> Tensor:
    """[..., D] -> [M, D], a view where the strides allow."""
    return x_D.reshape(-1, x_D.shape[-1])


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept as 1 wide."""
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.shape[-1] + eps).rsqrt_()


class RMSNorm(torch.autograd.Function):
    """Keeps x and its inverse RMS per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        rows = rows_of(x)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        out_MD = rows_of(out)
        scales = []
        for part in blocks(len(rows), rows.shape[1], x.device):
            piece = at_least_fp32(rows[part])
            scales.append(inverse_rms(piece, eps))
            out_MD[part] = (piece * scales[-1]).mul_(weight)
        ctx.save_for_backward(x, weight, torch.cat(scales) if len(scales) > 1 else scales[0])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        rows, grads = rows_of(x), rows_of(grad)
        dx, wide = torch.empty_like(rows), at_least_fp32(weight)
        dweight = torch.zeros_like(wide)
        for part in blocks(len(rows), rows.shape[1], x.device):
            unit = at_least_fp32(rows[part]) * scale[part]
            piece = at_least_fp32(grads[part])
            dweight += (piece * unit).sum(0)
            piece = piece * wide
            mean = (piece * unit).sum(-1, keepdim=True).div_(x.shape[-1])
            dx[part] = piece.sub_(unit.mul_(mean)).mul_(scale[part])
        return dx.view(x.shape), dweight.to(weight.dtype), None, None


class GatedRMSNorm(torch.autograd.Function):
    """Keeps y, the gate and the inverse RMS per row and group; y * silu(gate) is made again in backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        y_MD, gate_MD = rows_of(y), rows_of(gate)
        out = torch.empty(y_MD.shape, dtype=gate.dtype, device=y.device)
        scales = []
        for part in blocks(len(y_MD), y_MD.shape[1], y.device):
            u = F.silu(at_least_fp32(gate_MD[part])).mul_(y_MD[part]).unflatten(-1, (groups, -1))
            scales.append(inverse_rms(u, eps))
            out[part] = u.mul_(scales[-1]).flatten(-2).mul_(weight)
        ctx.save_for_backward(y, gate, weight, torch.cat(scales) if len(scales) > 1 else scales[0])
        ctx.groups = groups
        return out.view(gate.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, weight, scale = ctx.saved_tensors
        y_MD, gate_MD, grad_MD, split = rows_of(y), rows_of(gate), rows_of(grad), (ctx.groups, -1)
        dy, dgate, wide = torch.empty_like(y_MD), torch.empty_like(gate_MD), at_least_fp32(weight)
        dweight = torch.zeros_like(wide)
        for part in blocks(len(y_MD), y_MD.shape[1], y.device):
            z, piece = at_least_fp32(gate_MD[part]), at_least_fp32(grad_MD[part])
            silu = F.silu(z)
            unit = (silu * y_MD[part]).unflatten(-1, split).mul_(scale[part])
            dweight += (piece * unit.flatten(-2)).sum(0)
            du = (piece * wide).unflatten(-1, split)
            mean = (du * unit).sum(-1, keepdim=True).div_(unit.shape[-1])
            du = du.sub_(unit.mul_(mean)).mul_(scale[part]).flatten(-2)
            dy[part] = silu.mul_(du)
            dgate[part] = torch.ops.aten.silu_backward(du.mul_(y_MD[part]), z)
        return dy.view(y.shape), dgate.view(gate.shape), dweight.to(weight.dtype), None, None
