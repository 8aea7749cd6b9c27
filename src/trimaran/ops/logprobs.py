"""Log-probabilities of given tokens over a large vocabulary, a chunk of tokens at a time.

    logp_m = z_m[target_m] - log sum_v exp(z_m[v]),  z = head(hidden) / temperature

No more than [chunk, V] logits ever exist: forward keeps none, backward makes them once more. That is a second product
by the head, and the price of a loss that may be any function of the log-probabilities (`ops.loss` needs none, because
cross-entropy is one that is known beforehand). The gradient by the logits is written down,
(one-hot - softmax) / temperature; `head` may be any module, its parameters' gradients add up in at least fp32.

Shapes: M tokens, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trimaran.ops.numbers import at_least_fp32


def token_logprobs(
    hidden_MD: Tensor, head: nn.Module, targets_M: Tensor, chunk: int = 1024, temperature: float = 1.0
) -> Tensor:
    """Natural log-probabilities [M] of `targets_M` under head(hidden) / temperature, in at least fp32; differentiable.

    hidden_MD: final hidden vectors; targets_M: token ids; chunk: rows whose logits exist at once.
    """
    return token_laws(hidden_MD, head, targets_M, chunk, temperature)[0]


def token_laws(
    hidden_MD: Tensor, head: nn.Module, targets_M: Tensor, chunk: int = 1024, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(`token_logprobs`, the entropies [M] of the same laws in nats, without gradient)."""
    parameters = [p for p in head.parameters() if p.requires_grad]
    return ChunkedLogprobs.apply(hidden_MD, head, targets_M, chunk, temperature, *parameters)


def token_laws_reference(
    hidden_MD: Tensor, head: nn.Module, targets_M: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The same, on all logits at once."""
    law_MV = (at_least_fp32(head(hidden_MD)) / temperature).log_softmax(-1)
    entropy_M = -(law_MV.exp() * law_MV).sum(-1).detach()
    return law_MV.gather(1, targets_M[:, None])[:, 0], entropy_M


class ChunkedLogprobs(torch.autograd.Function):
    """Forward in chunks, and again in backward, which needs the gradient of the loss by each log-probability."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Module, targets: Tensor, chunk: int, temperature: float, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        found = []
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            found.append(laws(at_least_fp32(head(hidden[part])) / temperature, targets[part]))
        empty = at_least_fp32(hidden.new_empty(0))
        logprobs, entropies = (torch.cat([empty, *column]) for column in (zip(*found) if found else ((), ())))
        ctx.head, ctx.chunk, ctx.temperature = head, chunk, temperature
        ctx.autocast = torch.is_autocast_enabled(hidden.device.type)
        ctx.save_for_backward(hidden, targets, *parameters)  # parameters: so that a change before backward is noticed
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, *parameters = ctx.saved_tensors
        kind = hidden.device.type
        hidden_grad = torch.empty_like(hidden)
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            # backward runs outside of the caller's autocast
            with torch.enable_grad(), torch.autocast(kind, torch.bfloat16, enabled=ctx.autocast):
                piece = hidden[part].detach().requires_grad_()
                logits = at_least_fp32(ctx.head(piece))
            logits_grad = gradient(logits.detach() / ctx.temperature, targets[part], grad[part] / ctx.temperature)
            piece_grad, *grads = torch.autograd.grad(logits, [piece, *parameters], logits_grad)
            hidden_grad[part] = piece_grad
            for running, one in zip(sums, grads, strict=True):
                running += one
        return (hidden_grad, None, None, None, None, *(g.to(p.dtype) for g, p in zip(sums, parameters, strict=True)))


def laws(logits_MV: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities of the targets, entropies), each [M].

    H = log Z - sum_v p_v z_v, with z less its largest: a token without mass adds 0, never 0 * -inf.
    """
    shifted_MV = logits_MV - logits_MV.amax(-1, keepdim=True)
    log_Z_M = shifted_MV.logsumexp(-1)
    law_MV = (shifted_MV - log_Z_M[:, None]).exp()
    entropy_M = log_Z_M - (law_MV * shifted_MV).sum(-1)
    return shifted_MV.gather(1, targets_M[:, None])[:, 0] - log_Z_M, entropy_M


def gradient(logits_MV: Tensor, targets_M: Tensor, grad_M: Tensor) -> Tensor:
    """(one-hot - softmax) times the gradient of each log-probability."""
    grad_M1 = grad_M.to(logits_MV.dtype)[:, None]
    return (logits_MV.softmax(-1) * -grad_M1).scatter_add(1, targets_M[:, None], grad_M1)
