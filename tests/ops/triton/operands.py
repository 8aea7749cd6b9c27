"""Operands for the kernels: on the GPU where there is one, else for triton's interpreter, with NaN around each of them.

A kernel that reads past its tensor meets NaN; `agree` compares with the same numbers in fp64 on the CPU's reference.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.ops.agree import drawn, gradients, near, outputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # of the largest reference value
MARGIN = 37  # numbers around a tensor


def guarded(t: Tensor) -> Tensor:
    """The same tensor on the device with NaN (or a huge integer) before and behind it."""
    poison = float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max
    memory = torch.full((t.numel() + 2 * MARGIN,), poison, dtype=t.dtype, device=DEVICE)
    inside = memory[MARGIN : MARGIN + t.numel()].view(t.shape)
    inside.copy_(t.detach())
    return inside.detach().requires_grad_(t.requires_grad)


def given(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers between NaN, that want a gradient."""
    return guarded(drawn(*shape, dtype=dtype, seed=seed, scale=scale))


def exact(t: object) -> object:
    """The same numbers in fp64 on the CPU, as a new leaf."""
    if not isinstance(t, Tensor):
        return t
    here = t.detach().cpu()
    return here.double().requires_grad_(t.requires_grad) if t.is_floating_point() else here


def agree(run: Callable, reference: Callable, *inputs: object, tolerance: float | None = None) -> None:
    """`run` on the inputs against `reference` on the same numbers in fp64, in outputs and gradients."""
    tolerance = tolerance or max(TOLERANCE[t.dtype] for t in inputs if isinstance(t, Tensor) and t.is_floating_point())
    wide = [exact(t) for t in inputs]
    found, expected = outputs(run, inputs), outputs(reference, wide)
    for one, other in zip(found, expected, strict=True):
        near(one.cpu(), other, tolerance)
    weights = [drawn(*t.shape, dtype=torch.float64, seed=99 + n).detach() for n, t in enumerate(expected)]
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    got = torch.autograd.grad(found, leaves, [w.to(t) for w, t in zip(weights, found)])
    for one, other in zip(got, gradients(expected, wide), strict=True):
        near(one.cpu(), other, tolerance)
