"""What every case of benchmarks/gpu.py shares: timing, agreement, and what the hardware could do at best.

The floors are those of a published H200: 989 TFLOP/s in bf16, and 4.3 TB/s, of the 4.8 on paper what large copies
reach. A decoding step must read every weight that it touches, all keys and values, and read and write the states:

    bytes = 2 (fixed + E(b) expert) + b (keys and values of the context + 8 ssm)
    E(b)  = experts a batch of b touches = E (1 - (1 - k/E)^b), for choices that are independent and even
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimaran.model.config import ModelConfig
from trimaran.model.size import count

BANDWIDTH, FLOPS = 4.3e12, 989e12  # bytes/s; bf16 products
AGREE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}  # largest relative L2 distance; routers' near ties flip in bf16


@dataclass(frozen=True)
class Scene:
    """Where a run takes place. small: toy sizes, for a test without a GPU."""

    device: str
    dtype: torch.dtype
    small: bool
    repeat: int
    backend: str  # the setting of ours


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: str) -> float:
    """Wall seconds of one turn, until the device has done it."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def seconds(work: Callable[[], object], scene: Scene) -> float:
    """Median wall seconds of `work`; the first turn is not counted."""
    return statistics.median([timed(work, scene.device) for _ in range(scene.repeat + 1)][1:])


def apart(found: Tensor, expected: Tensor) -> float:
    """Relative L2 distance; infinite where a number is none."""
    distance = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
    return distance if distance == distance else float("inf")


def red(distance: float, allowed: float) -> dict[str, str]:
    """What stands in a row in place of a speed."""
    return {"red": f"outputs {distance:.1e} apart, {allowed:.0e} allowed: no speed reported"}


def experts_touched(config: ModelConfig, batch: int) -> float:
    experts = config.n_routed_experts
    return experts * (1 - (1 - config.num_experts_per_tok / experts) ** batch)


def step_bytes(config: ModelConfig, batch: int, context: int) -> float:
    """Bytes that one decoding step in bf16 with fp32 states must move."""
    sizes = count(config)
    kinds = 3 if config.ffn == "swiglu" else 2
    expert = kinds * (config.moe_latent_size or config.hidden_size) * config.moe_intermediate_size
    layers = config.pattern.count("E")
    fixed = sizes.main - (0 if config.tie_embeddings else sizes.embedding) - layers * config.n_routed_experts * expert
    weights = 2 * (fixed + (layers * experts_touched(config, batch) * expert if layers else 0))
    memory = sizes.kv_bytes_per_token() * context + 2 * sizes.ssm_bytes_per_sequence()
    return weights + batch * memory


def step_bound(config: ModelConfig, batch: int, context: int) -> float:
    """Tokens per second of decoding that the memory of one H200 allows."""
    return batch * BANDWIDTH / step_bytes(config, batch, context)
