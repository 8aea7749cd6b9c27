"""Blocks that keep no activations: their forward is computed again when the gradient asks for it.

Memory for time, chosen per kind of layer by `HybridModel.recompute`: worth it for a kind whose activations are large
for their FLOPs, at the price of one more forward of that kind. torch.utils.checkpoint without reentry does it, so
outputs and gradients are the same bits. No layer draws random numbers, so no generator's state is kept.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimaran.model.moe import MoE


def again(step: Callable[..., Tensor], mixer: nn.Module, *given: Any) -> Tensor:
    """`step(*given)`, of which nothing but the inputs is kept. mixer: the part of it that may be an expert block."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), counted_once(mixer)

    found: Tensor = checkpoint(step, *given, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return found


@contextmanager
def counted_once(mixer: nn.Module) -> Iterator[None]:
    """What a router noted in the first forward stands; what it notes in here is forgotten."""
    if not isinstance(mixer, MoE):
        yield
        return
    noted, mixer.stats = mixer.stats, []
    try:
        yield
    finally:
        mixer.stats = noted
