"""The case `kernels` of benchmarks/gpu.py: each twin at Nemotron 3 Nano's shapes beside its floors, torch and rivals.

A row says the seconds of ours and of the same operation with our kernels forbidden ("torch"), the least that bytes and
products could take, and, for operations that fla-core or mamba-ssm have and that are installed, theirs. The outputs of
all are compared first.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import AGREE, BANDWIDTH, FLOPS, Scene, apart, red, seconds
from torch import Tensor

from trimaran.ops import activation, backend, conv, experts, norm, ssd
from trimaran.ops.paged import paged_attention


@dataclass(frozen=True)
class Shapes:
    """Of one layer: Nano's, or a toy's."""

    tokens: int
    rows: int  # of a decoding step
    context: int
    hidden: int
    heads: int
    width: int
    groups: int
    size: int
    experts: int
    k: int
    inner: int


NANO = Shapes(8192, 64, 8192, 2688, 64, 64, 8, 128, 128, 6, 1856)
TOY = Shapes(20, 2, 40, 24, 2, 8, 1, 16, 4, 2, 16)


@dataclass(frozen=True)
class Kernel:
    """One operation: what it computes (its first output is compared), and its least bytes and products."""

    name: str
    work: Callable[[], Tensor]
    bytes: float
    flops: float = 0.0
    rivals: dict[str, Callable[[], Tensor]] | None = None


class Drawn:
    """Operands of one layer."""

    def __init__(self, s: Shapes, scene: Scene):
        self.s, self.scene = s, scene
        self.generator = torch.Generator(scene.device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = False) -> Tensor:
        drawn = torch.randn(*shape, generator=self.generator, device=self.scene.device)
        return drawn.to(dtype or self.scene.dtype).requires_grad_(grad)

    def scan(self, grad: bool) -> tuple[Tensor, ...]:
        """x, dt, A, B, C."""
        s = self.s
        dt = F.softplus(self(1, s.tokens, s.heads, dtype=torch.float32) - 4).detach().requires_grad_(grad)
        A = -torch.arange(1, s.heads + 1, device=self.scene.device, dtype=torch.float32) / s.heads * 8
        x, B, C = (self(1, s.tokens, *shape, grad=grad) for shape in ((s.heads, s.width), *((s.groups, s.size),) * 2))
        return x, dt, A, B, C


def both_ways(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Tensor]:
    """Forward and backward; what is compared is the first leaf's gradient."""

    def work() -> Tensor:
        out = forward()
        return torch.autograd.grad(out, leaves, torch.ones_like(out))[0]

    return work


def mamba_kernels(d: Drawn) -> Iterator[Kernel]:
    s, item = d.s, d.scene.dtype.itemsize
    inner = s.heads * s.width
    channels = inner + 2 * s.groups * s.size
    x, weight, bias = d(1, s.tokens, channels, grad=True), d(channels, 4, grad=True), d(channels, grad=True)

    def convolved() -> Tensor:
        return conv.causal_conv_silu(x, weight, bias)

    rivals = conv_rivals(x, weight, bias)
    yield Kernel("conv", convolved, 2 * x.numel() * item, rivals=rivals)
    yield Kernel("conv both ways", both_ways(convolved, [x, weight, bias]), 5 * x.numel() * item)
    for grad in (False, True):
        scanned = d.scan(grad)
        # C.B per group; per head the chunk's mix, the state's write and its read, in chunks of 64
        flops = 2 * s.tokens * (s.groups * 64 * s.size + s.heads * (64 * s.width + 2 * s.width * s.size))
        moved = sum(t.numel() * t.element_size() for t in scanned) + 4 * scanned[0].numel()

        def scan(operands: tuple[Tensor, ...] = scanned) -> Tensor:
            return ssd.ssd(*operands)[0]

        if grad:
            yield Kernel("ssd both ways", both_ways(scan, [scanned[0], *scanned[3:]]), 3 * moved, 3.5 * flops)
        else:
            yield Kernel("ssd", scan, moved, flops, scan_rivals(scanned))
    y, z, w = d(1, s.tokens, inner, dtype=torch.float32), d(1, s.tokens, inner), d(inner)
    moved = y.numel() * (4 + 2 * item)
    yield Kernel("gated norm", lambda: norm.gated_rms_norm(y, z, w, s.groups, 1e-5), moved)
    h, v = d(1, s.tokens, s.hidden), d(s.hidden)
    yield Kernel("norm", lambda: norm.rms_norm(h, v, 1e-5), 2 * h.numel() * item)


def expert_kernels(d: Drawn) -> Iterator[Kernel]:
    s, item = d.s, d.scene.dtype.itemsize
    up = d(s.tokens, s.inner)
    yield Kernel("relu2", lambda: activation.relu2(up), 2 * up.numel() * item)
    chosen = torch.rand(s.tokens, s.experts, generator=d.generator, device=d.scene.device).topk(s.k).indices
    plan = experts.plan(chosen, torch.rand(s.tokens, s.k, device=d.scene.device), s.experts, s.hidden * s.inner)
    assert isinstance(plan, experts.Dispatch)
    out = d(len(plan.token_S), s.hidden)
    moved = s.tokens * s.hidden * (s.k * item + 4)
    yield Kernel("from experts", lambda: experts.from_experts(out, plan), moved)


def step_kernels(d: Drawn) -> Iterator[Kernel]:
    s, item = d.s, d.scene.dtype.itemsize
    page = 32
    depth = math.ceil(s.context / page)
    k, v = (d(s.rows * depth * page, 2, 128) for _ in range(2))
    q, table = d(s.rows, 32, 128), torch.arange(s.rows * depth, device=d.scene.device).view(s.rows, depth)
    length = torch.full((s.rows,), s.context, device=d.scene.device)
    moved = 2 * s.rows * s.context * 2 * 128 * item
    yield Kernel("paged", lambda: paged_attention(q, k, v, table, length, page, None, 128**-0.5), moved)


def scan_rivals(operands: tuple[Tensor, ...]) -> dict[str, Callable[[], Tensor]]:
    """mamba-ssm's scan and fla's, the latter with q = C, k = B, v = dt x and log decay dt A."""
    x, dt, A, B, C = operands
    rivals: dict[str, Callable[[], Tensor]] = {}
    if not x.is_cuda:
        return rivals
    if importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        rivals["mamba-ssm"] = lambda: mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256)
    if importlib.util.find_spec("fla"):
        from fla.ops.simple_gla import chunk_simple_gla

        shared = x.shape[2] // B.shape[2]
        q, key = (t.repeat_interleave(shared, 2) for t in (C, B))
        rivals["fla"] = lambda: chunk_simple_gla(q, key, (x * dt[..., None]).to(x.dtype), dt * A, scale=1.0)[0]
    return rivals


def conv_rivals(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    if not x.is_cuda or not importlib.util.find_spec("fla"):
        return {}
    from fla.modules.conv import causal_conv1d

    return {"fla": lambda: causal_conv1d(x, weight, bias, activation="silu")[0]}


def each(work: Callable[[], Tensor], scene: Scene) -> float:
    """Seconds of one call among several in a row: a kernel is shorter than the wait for it."""
    calls = 1 if scene.small else 20

    def several() -> None:
        for _ in range(calls):
            work()

    return seconds(several, scene) / calls


def row(kernel: Kernel, scene: Scene) -> dict[str, Any]:
    """Ours, torch's and the rivals' seconds, and the share of the floor that ours reaches."""
    with backend.using(f"{scene.backend},-triton"):
        expected = kernel.work().detach()
        plain = each(kernel.work, scene)
    with backend.using(scene.backend):
        distance = apart(kernel.work().detach(), expected)
        ours = each(kernel.work, scene)
    floor = max(kernel.bytes / BANDWIDTH, kernel.flops / FLOPS)
    found: dict[str, Any] = {"kernel": kernel.name, "apart": distance, "floor_us": floor * 1e6}
    if not distance <= AGREE[scene.dtype]:
        return found | red(distance, AGREE[scene.dtype])
    found |= {"us": ours * 1e6, "torch_us": plain * 1e6, "share": floor / ours}
    for name, work in (kernel.rivals or {}).items():
        far = apart(work().detach(), expected)
        found[name] = red(far, AGREE[scene.dtype]) if far > AGREE[scene.dtype] else {"us": each(work, scene) * 1e6}
    return found


def kernels(scene: Scene) -> list[dict[str, Any]]:
    """All rows. Ours run as `scene.backend` says; with "auto" on a CPU they are not ours, and the rows say so."""
    drawn = Drawn(TOY if scene.small else NANO, scene)
    return [row(one, scene) for made in (mamba_kernels, expert_kernels, step_kernels) for one in made(drawn)]
