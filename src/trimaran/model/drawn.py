"""The weights of a new model one module at a time, for models that no single process has room for."""

from collections.abc import Iterator

import torch
from torch import Tensor

from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import HybridModel, allocate, initialise_module
from trimaran.model.mamba import CausalConv, Mamba


def drawn(
    config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and buffer of `build(config, device, dtype, seed)`, the same bit for bit."""
    with torch.device("meta"):
        model = HybridModel(config)
    generator = torch.Generator(device).manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, CausalConv):  # drawn with its mixer
            continue
        parts = {name: module} | ({f"{name}.conv1d": module.conv1d} if isinstance(module, Mamba) else {})
        for part in parts.values():
            allocate(part, device, dtype)
        initialise_module(name, module, config, generator)
        for path, part in parts.items():
            for own, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
                yield f"{path}.{own}", tensor.detach()
            allocate(part, "meta", dtype)
