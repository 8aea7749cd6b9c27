"""Experts dealt out over processes, against all experts in one."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.models import tiny_config
from tests.parallel.compare import apart, compare
from trimaran.errors import Refusal
from trimaran.model.moe import Experts
from trimaran.parallel.dispatch import DealtExperts


def drawn(kind: str, width: int) -> Experts:
    """Eight experts, the same on all ranks."""
    experts = Experts(tiny_config(kind), width).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return experts


CHOICES = {
    "all": range(8),
    "first": range(2),  # others get nothing from anybody
    "last": range(6, 8),
}


def tokens_of(rank: int, choices: str, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors, chosen experts and weights of the tokens of one rank; every rank has another number of them.

    Rank 1 never chooses expert 0, whatever the others do.
    """
    generator, count = torch.Generator().manual_seed(rank), 5 + 9 * rank
    among = [expert for expert in CHOICES[choices] if rank != 1 or expert]
    x_MI = torch.randn(count, 12, generator=generator, dtype=torch.float64)
    picks = [torch.randperm(len(among), generator=generator)[: min(k, len(among))] for _ in range(count)]
    ids_MK = torch.tensor(among)[torch.stack(picks)]
    return x_MI, ids_MK, torch.rand(ids_MK.shape, generator=generator, dtype=torch.float64)


def exact(kind: str, choices: str, k: int, size: int) -> None:
    """Outputs, and gradients of vectors, combine weights and experts, are those of the whole on all tokens."""
    whole, dealt = drawn(kind, 12), DealtExperts(drawn(kind, 12), dist.group.WORLD)
    wanted = {name: torch.zeros_like(parameter) for name, parameter in whole.named_parameters()}
    for rank in range(size):
        x_MI, ids_MK, weights_MK = tokens_of(rank, choices, k)
        given = x_MI.requires_grad_(), weights_MK.requires_grad_()
        out_MI = whole(x_MI, ids_MK, weights_MK)
        out_MI.square().sum().backward()
        for name, parameter in whole.named_parameters():
            wanted[name] += parameter.grad
            parameter.grad = None
        if rank == dist.get_rank():
            truth, mine = (out_MI.detach(), *(t.grad for t in given)), ids_MK
            others = [t.detach().clone().requires_grad_() for t in given]
    found_MI = dealt(others[0], mine, others[1])
    found_MI.square().sum().backward()
    for one, other in zip((found_MI.detach(), *(t.grad for t in others)), truth, strict=True):
        assert apart(one, other) <= 1e-12
    for name, parameter in dealt.named_parameters():
        other = wanted[name][dealt.first : dealt.first + dealt.own]
        assert parameter.grad is not None and (parameter.grad - other).abs().max() <= 1e-12, name
    with torch.no_grad():
        assert apart(dealt(others[0], mine, others[1]), truth[0]) <= 1e-12


def does_not_divide(size: int) -> None:
    config = tiny_config("moe", n_routed_experts=9, num_experts_per_tok=2)
    with pytest.raises(Refusal, match=r"n_routed_experts = 9 for parallel\.ep = 2"):
        DealtExperts(Experts(config, 12), dist.group.WORLD)


def nothing_to_deal(size: int) -> None:
    with pytest.raises(Refusal, match=r"parallel\.ep = 2 and no experts"):
        compare({"fsdp": size, "ep": size}, "dense")


def idle(size: int) -> None:
    """Training where the last rank's experts are never chosen."""
    compare({"fsdp": size, "ep": size}, "moe", changes={"num_experts_per_tok": 1, "n_group": 2, "topk_group": 1})


CASES = {
    f"ep exact, {kind}, {choices}, k {k}": (2, partial(exact, kind, choices, k))
    for kind in ("moe", "qwen")
    for choices, k in (("all", 3), ("all", 1), ("first", 1), ("last", 2))
}
CASES |= {
    "ep exact on 4": (4, partial(exact, "moe", "all", 3)),
    "ep exact on 4, two idle": (4, partial(exact, "moe", "last", 1)),
    "ep does not divide": (2, does_not_divide),
    "ep without experts": (2, nothing_to_deal),
    "ep of one choice": (2, idle),
    "ep of latent experts": (2, lambda size: compare({"fsdp": size, "ep": size}, "latent")),
    "ep of softmax": (2, lambda size: compare({"fsdp": size, "ep": size}, "qwen", accumulate=2)),
}
