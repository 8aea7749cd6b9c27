"""Cross-entropy over a large vocabulary, a chunk of tokens at a time.

The gradient of a chunk is taken as soon as its loss is known, so that no more than [chunk, V] logits ever exist and
nothing is computed twice. The gradient by the logits is written down, w (softmax - one-hot); `head` may be any module
(plain, quantised, LoRA, tied): its parameters' gradients are found by autograd inside the chunk and added up in at
least fp32.

A head whose `stretch` is set has the logits of some ids alone; others have the rest. Then the largest logit, the sum of
the exponentials and the target's logit are found between them, each returns an equal part of the loss, and the gradient
by its own logits is that of the whole.
"""

from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimaran.ops import backend, native_training
from trimaran.ops.numbers import at_least_fp32


class Stretch(Protocol):
    """The ids [first, last) of a vocabulary that `parts` processes hold between them."""

    @property
    def first(self) -> int: ...
    @property
    def last(self) -> int: ...
    @property
    def parts(self) -> int: ...
    def largest(self, x: Tensor) -> Tensor: ...
    def sum(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class Scoring(Protocol):
    """A head whose logits are these, widened; None: they are more than that."""

    def scores(self, x: Tensor, /) -> Tensor | None: ...


def cross_entropy(
    hidden_MD: Tensor, head: nn.Module, targets_M: Tensor, weights_M: Tensor, chunk: int = 1024
) -> Tensor:
    """sum_m weights_m * CE(head(hidden_m), targets_m), a differentiable scalar in at least fp32.

    hidden_MD: final hidden vectors; targets_M: token ids (ignored where the weight is 0); weights_M: loss weights, no
    gradient. chunk: rows whose logits exist at once.
    """
    if not backend.allowed("torch.loss") and getattr(head, "stretch", None) is None:
        return cross_entropy_reference(hidden_MD, head, targets_M, weights_M)
    parameters = [p for p in head.parameters() if p.requires_grad]
    return ChunkedCrossEntropy.apply(hidden_MD, head, targets_M, weights_M, chunk, *parameters)


def cross_entropy_reference(hidden_MD: Tensor, head: nn.Module, targets_M: Tensor, weights_M: Tensor) -> Tensor:
    """The same, on all logits at once."""
    losses_M = F.cross_entropy(at_least_fp32(head(hidden_MD)), targets_M.clamp(min=0), reduction="none")
    return (losses_M * weights_M.to(losses_M.dtype)).sum()


class ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks; backward only scales what forward found."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Module, targets: Tensor, weights: Tensor, chunk: int, *parameters: Tensor
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[5:])
        stretch: Stretch | None = getattr(head, "stretch", None)
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if wanted else hidden.new_empty(0)
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters if wanted]
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(wanted):
                piece = hidden[part].detach().requires_grad_(wanted)
                logits, narrow = logits_of(head, piece)
            given = logits.detach(), targets[part].clamp(min=0), weights[part]
            if narrow or (stretch is None and native_training.takes_loss(logits)):
                loss, logits_grad = native_training.loss_and_gradient(*given, in_place=narrow)
            else:
                loss, logits_grad = loss_and_gradient(*given) if stretch is None else part_of_loss(*given, stretch)
            total += loss
            if wanted:
                piece_grad, *grads = torch.autograd.grad(logits, [piece, *parameters], logits_grad)
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


def logits_of(head: nn.Module, hidden_MD: Tensor) -> tuple[Tensor, bool]:
    """The logits in at least fp32, or (True) as the head's product left them: nobody else reads them, and a kernel
    widens them on its way."""
    heard = head._forward_hooks or head._forward_pre_hooks  # somebody waits for the head's own call
    if getattr(head, "stretch", None) is None and not heard and backend.allowed("native.loss"):
        scores = head.scores(hidden_MD) if isinstance(head, Scoring) else None
        if scores is not None and native_training.takes_loss(scores):
            return scores, True
        if scores is not None:
            return at_least_fp32(scores), False
    return at_least_fp32(head(hidden_MD)), False


def loss_and_gradient(logits_MV: Tensor, targets_M: Tensor, weights_M: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of losses and its gradient by the logits.

    The largest probability is 1 / sum_v exp(logit_v - max), so that log-sum-exp comes out of the softmax for the price
    of one more maximum.
    """
    weights_M = weights_M.to(logits_MV.dtype)
    grad_MV = logits_MV.softmax(-1)
    target_M1 = targets_M[:, None]
    losses_M = logits_MV.amax(-1) - grad_MV.amax(-1).log() - logits_MV.gather(1, target_M1)[:, 0]
    grad_MV.scatter_add_(1, target_M1, torch.full_like(target_M1, -1, dtype=grad_MV.dtype)).mul_(weights_M[:, None])
    return (losses_M * weights_M).sum(), grad_MV


def part_of_loss(logits_MV: Tensor, targets_M: Tensor, weights_M: Tensor, stretch: Stretch) -> tuple[Tensor, Tensor]:
    """`loss_and_gradient` where these are the logits of a stretch: this process's part of the loss, the gradient of the
    whole by its own logits."""
    weights_M = weights_M.to(logits_MV.dtype)
    own_M1 = ((targets_M >= stretch.first) & (targets_M < stretch.last))[:, None]
    place_M1 = torch.where(own_M1, targets_M[:, None] - stretch.first, 0)
    largest_M1 = stretch.largest(logits_MV.amax(-1, keepdim=True))
    grad_MV = (logits_MV - largest_M1).exp_()
    found_M2 = torch.cat([grad_MV.sum(-1, keepdim=True), logits_MV.gather(1, place_M1) * own_M1], 1)
    sum_M1, target_M1 = stretch.sum(found_M2).split(1, 1)
    losses_M = (largest_M1 + sum_M1.log() - target_M1)[:, 0]
    grad_MV.div_(sum_M1).scatter_add_(1, place_M1, -own_M1.to(grad_MV.dtype)).mul_(weights_M[:, None])
    return (losses_M * weights_M).sum() / stretch.parts, grad_MV
