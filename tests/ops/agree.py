"""Comparing an operation with its reference, in outputs and gradients."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LENGTHS = [1, 63, 100, 257]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}  # of the largest reference value


def drawn(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same in every dtype up to rounding, that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def documents(batch: int, length: int, seed: int = 3) -> Tensor:
    """Document numbers that begin at 0 or 1 and rise about every 20 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, length, generator=generator) < 0.05).cumsum(1)


def wide(tensors: Sequence[object]) -> list[object]:
    """The same numbers in fp64, as new leaves."""
    return [
        t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in tensors
    ]


def outputs(run: Callable[..., object], inputs: Sequence[object]) -> list[Tensor]:
    found = run(*inputs)
    return [found] if isinstance(found, Tensor) else list(found)


def gradients(found: list[Tensor], inputs: Sequence[object]) -> list[Tensor]:
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    weights = [drawn(*t.shape, dtype=torch.float64, seed=99 + n).to(t.dtype) for n, t in enumerate(found)]
    return list(torch.autograd.grad(found, leaves, weights))


def near(value: Tensor, reference: Tensor, tolerance: float) -> None:
    assert value.isfinite().all()
    scale = reference.abs().max().clamp(min=0.05)
    apart = (value.double() - reference.double()).abs().max() / scale
    assert apart <= tolerance, f"{apart:.1e} apart, {tolerance:.1e} allowed"


def agree(run: Callable, reference: Callable, *inputs: object, tolerance: float | None = None) -> None:
    """`run` on the inputs as they are against `reference` on the same numbers in fp64, outputs and gradients."""
    dtypes = [t.dtype for t in inputs if isinstance(t, Tensor) and t.is_floating_point()]
    tolerance = tolerance or max(TOLERANCE[dtype] for dtype in dtypes)
    exact = wide(inputs)
    found, expected = outputs(run, inputs), outputs(reference, exact)
    for one, other in zip(found, expected, strict=True):
        near(one, other, tolerance)
    for one, other in zip(gradients(found, inputs), gradients(expected, exact), strict=True):
        near(one, other, tolerance)
