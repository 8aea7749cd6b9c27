"""Cross-entropy over a large vocabulary, a chunk of tokens at a time.

The gradient of a chunk is taken as soon as its loss is known, so that no more than [chunk, V] logits ever exist and
nothing is computed twice. `head` may be any module (plain, quantised, LoRA, tied): its parameters' gradients are found
by autograd inside the chunk and added up in at least fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimaran.ops.numbers import at_least_fp32


def cross_entropy(
    hidden_MD: Tensor, head: nn.Module, targets_M: Tensor, weights_M: Tensor, chunk: int = 1024
) -> Tensor:
    """sum_m weights_m * CE(head(hidden_m), targets_m), a differentiable scalar in at least fp32.

    hidden_MD: final hidden vectors; targets_M: token ids (ignored where the weight is 0); weights_M: loss weights.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    return ChunkedCrossEntropy.apply(hidden_MD, head, targets_M, weights_M, chunk, *parameters)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks; backward only scales what forward found."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Module, targets: Tensor, weights: Tensor, chunk: int, *parameters: Tensor
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[5:])
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if wanted else None
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters if wanted]
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(wanted):
                piece = hidden[part].detach().requires_grad_(wanted)
                losses = F.cross_entropy(at_least_fp32(head(piece)), targets[part].clamp(min=0), reduction="none")
                loss = (losses * weights[part].to(losses.dtype)).sum()
            total += loss.detach()
            if wanted:
                piece_grad, *grads = torch.autograd.grad(loss, [piece, *parameters])
                hidden_grad[part] = piece_grad
                for running, grad in zip(sums, grads, strict=True):
                    running += grad
        ctx.save_for_backward(*([hidden_grad, *sums] if wanted else []))
        ctx.dtypes = [p.dtype for p in parameters]
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, *sums = ctx.saved_tensors
        grads = [(g * scale).to(dtype) for g, dtype in zip(sums, ctx.dtypes, strict=True)]
        return (hidden_grad * scale.to(hidden_grad.dtype), None, None, None, None, *grads)
