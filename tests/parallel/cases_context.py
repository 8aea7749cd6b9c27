"""Rows cut in pieces: what crosses the cuts, in outputs and gradients, against the same rows in one process.

In fp64, so that nothing but the order of sums may differ; training in fp32 is in `compare`.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.models import random_tokens, tiny
from tests.parallel.compare import apart, compare
from trimaran.errors import Refusal
from trimaran.model.hybrid import HybridModel
from trimaran.ops.attention import attention
from trimaran.parallel.collectives import before
from trimaran.parallel.context import Context, Reach, arriving

EXACT = 1e-12


def rows_of(lengths: list[list[int]], length: int) -> Tensor:
    """Document ids of rows whose documents are as long as said; the rest of a row is padding."""
    ids_BT = torch.full((len(lengths), length), -1)
    for row, documents in enumerate(lengths):
        start = 0
        for number, count in enumerate(documents):
            ids_BT[row, start : start + count] = number % 2 + 5  # ids repeat: a border is a change, not a new number
            start += count
    return ids_BT


ROWS = rows_of(
    [
        [24],  # one document through all pieces
        [6, 6, 6, 6],  # borders at the cuts of 4
        [12, 12],  # at the cut of 2
        [4, 13, 7],  # one that goes through three pieces of 4
        [5, 1, 1, 7, 10],
        [1] * 24,
        [23],  # padding
        [5, 8],  # pieces that are padding
        [18],  # padding that begins at a cut
        [2],
        [],  # nothing else
    ],
    24,
)
SHORT = rows_of([[8], [1, 6, 1], [3, 2, 3], [2, 2, 2, 2], [5], [1]], 8)  # pieces of 2 tokens, fewer than taps - 1


def summed(gradients: list[Tensor]) -> list[Tensor]:
    for gradient in gradients:
        dist.all_reduce(gradient)
    return gradients


def drafted(model: HybridModel, tokens_BT: Tensor, next_BT: Tensor, ids_BT: Tensor | None) -> list[Tensor]:
    """Hidden vectors of the trunk and of two depths behind it."""
    found = [model.hidden(tokens_BT, ids_BT)]
    for _ in range(2 if model.mtp is not None else 0):
        found.append(model.mtp(found[-1], next_BT, ids_BT))
    return found


def exact(kind: str, ids_BT: Tensor | None, length: int, size: int, most: int = 1 << 28, **changes: object) -> None:
    """Hidden vectors of all tokens and the gradients of all weights are those of one process."""
    batch, own = 3 if ids_BT is None else len(ids_BT), slice(*(length // size * (dist.get_rank() + i) for i in (0, 1)))
    tokens_BT, next_BT = (random_tokens(batch, length, seed=seed) for seed in (7, 8))
    model = tiny(kind, **changes).train()
    parameters = list(model.parameters())

    def gradients(outputs: list[Tensor], part: slice) -> list[Tensor]:
        generator = torch.Generator().manual_seed(9)
        total = torch.zeros((), dtype=torch.float64)
        for output in outputs:
            weights = torch.randn(batch, length, output.shape[-1], generator=generator, dtype=torch.float64)
            total = total + (output * weights[:, part]).sum()
        return list(torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True))

    truth = drafted(model, tokens_BT, next_BT, ids_BT)
    wanted = gradients(truth, slice(None))
    model.backbone.over = Context(dist.group.WORLD, model.device, most)
    found = drafted(model, tokens_BT[:, own], next_BT[:, own], None if ids_BT is None else ids_BT[:, own])
    for one, other in zip(found, truth, strict=True):
        assert apart(one.detach(), other[:, own].detach()) <= EXACT
    for (name, _), one, other in zip(model.named_parameters(), summed(gradients(found, own)), wanted, strict=True):
        assert apart(one, other) <= EXACT, name


def neighbours(size: int) -> None:
    """`before` brings the last places, however many pieces they lie in, and its gradient goes back where they lie."""
    whole = torch.randn(2, 3 * size, 5, dtype=torch.float64)
    rank, start = dist.get_rank(), 3 * dist.get_rank()
    for count in (0, 1, 3, 4, 3 * size):
        piece = whole[:, start : start + 3].clone().requires_grad_()
        found = before(piece, count, dist.group.WORLD)
        assert torch.equal(found, whole[:, max(start - count, 0) : start]), count
        (gradient,) = torch.autograd.grad((found * (rank + 1.0)).sum(), piece)
        wanted = torch.zeros(3 * size)
        for reader in range(size):
            wanted[max(3 * reader - count, 0) : 3 * reader] += reader + 1
        assert torch.equal(gradient[0, :, 0], wanted[start : start + 3].double()), count


def states(size: int) -> None:
    """`arriving` in sizes that the pieces do not divide: what `S <- decay S + own` says."""
    own = torch.randn(size, 2, 3, 5, 7, dtype=torch.float64)
    decay = torch.rand(size, 2, 3, dtype=torch.float64)
    wanted = torch.zeros_like(own[0])
    for before_us in range(dist.get_rank()):
        wanted = wanted * decay[before_us][..., None, None] + own[before_us]
    found = arriving(own[dist.get_rank()], decay[dist.get_rank()], dist.group.WORLD)
    assert torch.allclose(found, wanted, rtol=EXACT, atol=EXACT)


def not_kept(size: int) -> None:
    """What the kernel saves for backward of whole rows is let go behind the forward, and brought again."""
    q, kv = torch.randn(2, 4, 4, 8, requires_grad=True), torch.randn(2, 4, 2, 2, 8)
    reach = Reach(kv, 4 * (size - 1), dist.group.WORLD)
    reach.bring(q)
    whole = reach.whole.clone()
    reach.whole.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(reach.leave, reach.find):
        k, v = reach.whole.unbind(2)
        out = attention(q, k, v, torch.ones(4, k.shape[1], dtype=torch.bool), False, 0.3)
    reach.forget()
    with pytest.raises(AssertionError):  # of `find`: nothing else has kept them
        out.sum().backward(retain_graph=True)
    reach.bring(q)
    assert torch.equal(reach.whole, whole)
    out.sum().backward()
    k, v = whole.unbind(2)
    again = q.detach().clone().requires_grad_()
    attention(again, k, v, torch.ones(4, k.shape[1], dtype=torch.bool), False, 0.3).sum().backward()
    assert torch.equal(q.grad, again.grad)


def padding_in_front(size: int) -> None:
    """Refused in all processes, whichever piece it lies in."""
    model, ids_BT = tiny("mamba"), torch.full((1, 4), 5)
    if dist.get_rank() == 0:
        ids_BT[0, 1] = -1
    model.backbone.over = Context(dist.group.WORLD, model.device)
    with pytest.raises(Refusal, match="padding in front"):
        model.hidden(random_tokens(1, 4), ids_BT)


CASES = {
    "cp exact on 2": (2, partial(exact, "everything", ROWS, 24)),
    "cp exact on 4": (4, partial(exact, "everything", ROWS, 24)),
    "cp exact, a small window": (4, partial(exact, "window", ROWS, 24, sliding_window=4)),
    "cp exact, a window of two": (2, partial(exact, "window", ROWS, 24, sliding_window=2)),
    "cp exact, without documents": (4, partial(exact, "everything", None, 24)),
    "cp exact, without masks": (4, partial(exact, "everything", ROWS, 24, most=0)),
    "cp exact, without documents or masks": (2, partial(exact, "rope", None, 24, most=0)),
    "cp exact, short pieces": (4, partial(exact, "everything", SHORT, 8)),
    "cp exact on the sphere": (2, partial(exact, "ngpt", ROWS, 24)),
    "cp neighbours": (4, neighbours),
    "cp states": (4, states),
    "cp keys are not kept": (2, not_kept),
    "cp padding in front": (2, padding_in_front),
    "cp recomputed": (2, lambda size: compare({"cp": size}, "everything", train={"recompute": "M*WE"})),
    "cp of llama": (2, lambda size: compare({"cp": size}, "llama", accumulate=2)),
    "cp 4": (4, lambda size: compare({"cp": size}, "everything")),
}
