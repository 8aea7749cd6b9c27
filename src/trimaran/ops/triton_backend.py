"""When the kernels for a GPU may run (the family `triton` of ops.backend).

They take tensors on a GPU, of a dtype that its matrix units know. Without a GPU, triton's interpreter runs the same
kernels on the CPU, slowly: TRITON_INTERPRET=1 in the environment asks for it, and then a twin runs only where the
setting names it (`ops.backend = "triton"`), so that nobody meets it unasked.

Asking costs no import of triton; the kernels' own files import it.
"""

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from trimaran.ops import backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def interpreted() -> bool:
    """Whether triton's interpreter stands in for a GPU in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def missing() -> str | None:
    """Why the kernels cannot run here; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'trimaran[gpu]')"
    if not torch.cuda.is_available() and not interpreted():
        return "torch finds no GPU"
    return None


def runs(twin: str, x: Tensor) -> bool:
    """Whether the twin may run on x and what lies beside it."""
    if not x.is_cuda and not (interpreted() and backend.forced(twin)):
        return False
    return x.dtype in DTYPES and backend.allowed(twin) and missing() is None


def steps(count: int) -> Any:
    """The number of a kernel's loop steps as the kernel takes it: the interpreter cannot loop over what it converts."""
    import triton.language as tl

    return tl.constexpr(count) if interpreted() else count
