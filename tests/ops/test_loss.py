"""Chunked cross-entropy against all logits at once."""

import threading
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tests.ops.agree import DTYPES, LENGTHS, drawn, near
from trimaran.model.linear import Embedding, Head, TiedHead
from trimaran.ops.loss import cross_entropy, cross_entropy_reference

WIDTH, VOCAB = 16, 97
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def head(kind: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Parameter]:
    weight = nn.Parameter(drawn(VOCAB, WIDTH, dtype=dtype, seed=1).detach())
    if kind == "plain":
        module = Head(WIDTH, VOCAB)
        module.weight = weight
        return module, weight
    table = Embedding(VOCAB, WIDTH)
    table.weight = weight
    return TiedHead(table), weight


@pytest.mark.parametrize("kind", ["plain", "tied"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_plain(kind, length, dtype):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(VOCAB, (length,), generator=generator)
    weights = torch.rand(length, generator=generator)
    weights[::3] = 0
    targets[::3] = -100  # ignored: its weight is 0
    found = []
    for run, chosen in ((cross_entropy, dtype), (cross_entropy_reference, torch.float64)):
        module, weight = head(kind, dtype)
        module, weight = module.to(chosen), next(module.parameters())
        hidden = drawn(length, WIDTH, dtype=dtype, seed=2).detach().to(chosen).requires_grad_()
        options = {"chunk": 40} if run is cross_entropy else {}
        loss = run(hidden, module, targets, weights, **options)
        (3 * loss).backward()
        found.append((loss.detach(), hidden.grad, weight.grad))
    for one, other in zip(*found):
        near(one, other, TOLERANCE[dtype])
    assert found[0][0].dtype == torch.promote_types(dtype, torch.float32)
    assert found[0][2].dtype == dtype


def test_huge_logits_stay_finite():
    module, weight = head("plain", torch.float32)
    weight.data *= 1e4
    hidden = drawn(50, WIDTH, dtype=torch.float32, seed=2)
    targets, weights = torch.arange(50), torch.ones(50)
    loss = cross_entropy(hidden, module, targets, weights)
    near(loss, cross_entropy_reference(hidden.double(), module.double(), targets, weights), 1e-5)
    loss.backward()
    assert hidden.grad.isfinite().all()


def test_no_gradient_asked_none_computed():
    module, weight = head("plain", torch.float32)
    with torch.no_grad():
        loss = cross_entropy(torch.randn(50, WIDTH), module, torch.arange(50), torch.ones(50))
    assert not loss.requires_grad and weight.grad is None


def test_frozen_head_passes_gradients_on():
    module, weight = head("plain", torch.float64)
    weight.requires_grad_(False)
    hidden = drawn(50, WIDTH, dtype=torch.float64, seed=2)
    cross_entropy(hidden, module, torch.arange(50), torch.ones(50)).backward()
    other = hidden.detach().requires_grad_()
    cross_entropy_reference(other, module, torch.arange(50), torch.ones(50)).backward()
    near(hidden.grad, other.grad, 1e-12)


class Exchange:
    """What threads tell each other: everybody's tensors, once all have come."""

    def __init__(self, parts: int):
        self.barrier, self.given = threading.Barrier(parts, timeout=20), [torch.empty(0)] * parts

    def all(self, rank: int, x: Tensor) -> Tensor:
        self.given[rank] = x
        self.barrier.wait()
        found = torch.stack(self.given)
        self.barrier.wait()
        return found


@dataclass
class Ids:
    """A stretch of the vocabulary, held by one thread of several."""

    first: int
    last: int
    rank: int
    exchange: Exchange
    parts: int

    def largest(self, x: Tensor) -> Tensor:
        return self.exchange.all(self.rank, x).amax(0)

    def sum(self, x: Tensor) -> Tensor:
        return self.exchange.all(self.rank, x).sum(0)


@pytest.mark.parametrize("borders", [(0, 40, VOCAB), (0, 1, 60, VOCAB)])
def test_parts_of_a_vocabulary_add_up_to_the_whole(borders):
    generator = torch.Generator().manual_seed(0)
    targets, weights = torch.randint(VOCAB, (50,), generator=generator), torch.rand(50, generator=generator)
    module, weight = head("plain", torch.float64)
    hidden = drawn(50, WIDTH, dtype=torch.float64, seed=2).detach().requires_grad_()
    loss = 0.3 * cross_entropy(hidden, module, targets, weights, chunk=20)
    truth = [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]
    parts = len(borders) - 1
    exchange, found = Exchange(parts), [[torch.empty(0)]] * parts

    def work(rank: int) -> None:
        first, last = borders[rank : rank + 2]
        part = Head(WIDTH, last - first)
        part.weight = nn.Parameter(weight.detach()[first:last].clone())
        part.stretch = Ids(first, last, rank, exchange, parts)
        own = hidden.detach().clone().requires_grad_()
        loss = 0.3 * cross_entropy(own, part, targets, weights, chunk=20)
        found[rank] = [loss.detach(), *torch.autograd.grad(loss, [own, part.weight])]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    losses, hiddens, weights_of = zip(*found)
    torch.testing.assert_close(sum(losses), truth[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(hiddens), truth[1], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(torch.cat(weights_of), truth[2], rtol=1e-11, atol=1e-13)
