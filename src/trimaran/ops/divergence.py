"""Divergence of a student's law from a teacher's over a large vocabulary, a chunk of places at a time.

    forward    T^2 * sum_m w_m sum_v p_mv (log p_mv - log q_mv)     p = softmax(teacher / T), q = softmax(student / T)
    reverse    T^2 * sum_m w_m sum_v q_mv (log q_mv - log p_mv)

T softens both laws, and T^2 keeps the size of the gradient (Hinton et al., arXiv 1503.02531). By the student's logits:

    forward    w T (q - p)
    reverse    w T q (log q - log p - KL)

As in `ops.loss`, the gradient of a chunk is taken as soon as its loss is known, so no more than a chunk of logits of
either side ever exists. Several students may be held against one teacher: its logits are then computed once.

Shapes: K students, M places, D width, V ids.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimaran.ops.numbers import at_least_fp32

Way = Literal["forward", "reverse"]


def forward_kl(
    hidden_KMD: Tensor,
    head: nn.Module,
    teacher_MD: Tensor,
    teacher_head: nn.Module,
    weights_M: Tensor,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """(the sum over all students, differentiable; the sums of each [K], not differentiable) in at least fp32.

    hidden_KMD: final hidden vectors of the students, which share `head`; teacher_MD: those of the teacher, to whose
    law nothing is passed back. chunk: rows of logits of the students that exist at once.
    """
    return divergence("forward", hidden_KMD, head, teacher_MD, teacher_head, weights_M, temperature, chunk)


def reverse_kl(
    hidden_KMD: Tensor,
    head: nn.Module,
    teacher_MD: Tensor,
    teacher_head: nn.Module,
    weights_M: Tensor,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """As `forward_kl`, the other way round: the student's own law is what the mean is taken over."""
    return divergence("reverse", hidden_KMD, head, teacher_MD, teacher_head, weights_M, temperature, chunk)


def divergence(
    way: Way,
    hidden_KMD: Tensor,
    head: nn.Module,
    teacher_MD: Tensor,
    teacher_head: nn.Module,
    weights_M: Tensor,
    temperature: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """`forward_kl` or `reverse_kl`."""
    if len(teacher_MD) != hidden_KMD.shape[1]:
        raise ValueError(f"{hidden_KMD.shape[1]} places of the students, {len(teacher_MD)} of the teacher")
    parameters = [p for p in head.parameters() if p.requires_grad]
    found: tuple[Tensor, Tensor] = ChunkedDivergence.apply(
        hidden_KMD, head, teacher_MD, teacher_head, weights_M, temperature, chunk, way, *parameters
    )
    return found


def divergence_reference(
    way: Way,
    hidden_KMD: Tensor,
    head: nn.Module,
    teacher_MD: Tensor,
    teacher_head: nn.Module,
    weights_M: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The same, on all logits at once."""
    with torch.no_grad():
        teacher_MV = (at_least_fp32(teacher_head(teacher_MD)) / temperature).log_softmax(-1)
    student_KMV = (at_least_fp32(head(hidden_KMD)) / temperature).log_softmax(-1)
    if way == "forward":
        kl_KM = (teacher_MV.exp() * (teacher_MV - student_KMV)).sum(-1)
    else:
        kl_KM = (student_KMV.exp() * (student_KMV - teacher_MV)).sum(-1)
    sums_K = temperature**2 * (kl_KM * weights_M.to(kl_KM.dtype)).sum(-1)
    return sums_K.sum(), sums_K.detach()


class ChunkedDivergence(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks; backward only scales what forward found."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: nn.Module,
        teacher: Tensor,
        teacher_head: nn.Module,
        weights: Tensor,
        temperature: float,
        chunk: int,
        way: Way,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[8:])
        wide = torch.promote_types(hidden.dtype, torch.float32)
        totals = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if wanted else hidden.new_empty(0)
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters if wanted]
        places = max(1, chunk // max(1, len(hidden)))
        for start in range(0, len(teacher), places):
            part = slice(start, start + places)
            target = at_least_fp32(teacher_head(teacher[part])).div(temperature).log_softmax(-1)
            with torch.set_grad_enabled(wanted):
                piece = hidden[:, part].detach().requires_grad_(wanted)
                logits = at_least_fp32(head(piece))
            losses, logits_grad = losses_and_gradient(way, logits.detach(), target, weights[part], temperature)
            totals += losses
            if wanted:
                piece_grad, *grads = torch.autograd.grad(logits, [piece, *parameters], logits_grad)
                hidden_grad[:, part] = piece_grad
                for running, grad in zip(sums, grads, strict=True):
                    running += grad
        ctx.save_for_backward(*([hidden_grad, *sums] if wanted else []))
        ctx.dtypes = [p.dtype for p in parameters]
        ctx.mark_non_differentiable(totals)
        return totals.sum(), totals

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, *sums = ctx.saved_tensors
        grads = [(g * scale).to(dtype) for g, dtype in zip(sums, ctx.dtypes, strict=True)]
        return (hidden_grad * scale.to(hidden_grad.dtype), *[None] * 7, *grads)


def losses_and_gradient(
    way: Way, logits_KMV: Tensor, target_MV: Tensor, weights_M: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The weighted sums [K] and their gradients by the logits. target_MV: the teacher's log-probabilities."""
    weights_M = weights_M.to(logits_KMV.dtype)
    law_MV = target_MV.exp()
    log_KMV = (logits_KMV / temperature).log_softmax(-1)
    if way == "forward":
        kl_KM = (law_MV * (target_MV - log_KMV)).sum(-1)
        grad_KMV = log_KMV.exp_().sub_(law_MV)
    else:
        own_KMV, apart_KMV = log_KMV.exp(), log_KMV - target_MV
        kl_KM = (own_KMV * apart_KMV).sum(-1)
        grad_KMV = own_KMV.mul_(apart_KMV.sub_(kl_KM[..., None]))
    return temperature**2 * (kl_KM * weights_M).sum(-1), grad_KMV.mul_(weights_M[:, None] * temperature)
