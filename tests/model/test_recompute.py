"""Recomputed blocks: the same bits, the routers counted once, less kept."""

import pytest
import torch

from tests.models import KINDS, random_documents, random_tokens, tiny
from trimaran.data.batch import Batch
from trimaran.errors import Refusal
from trimaran.model.hybrid import HybridModel
from trimaran.train.objective import Pretraining
from trimaran.train.recipe import TrainSettings


def batch() -> Batch:
    tokens, ids = random_tokens(3, 41), random_documents(3, 41)
    ids[1, 30:] = -1
    weights = torch.zeros(3, 40)
    weights[:, :-1] = ((ids[:, 1:40] == ids[:, :39]) & (ids[:, :39] >= 0)).float()
    return Batch(tokens[:, :-1], tokens[:, 1:], ids[:, :-1].to(torch.int32), weights)


def taught(model: HybridModel) -> tuple[torch.Tensor, dict, dict, list]:
    """Loss, terms, gradients and loads of one step in two parts."""
    objective = Pretraining(model.train(), mtp_scale=0.3, aux_loss=1e-2, router_bias_rate=1e-3)
    whole = objective.streams(batch())
    total, terms = torch.zeros(()), {}
    for start, stop in ((0, 2), (2, 3)):
        loss, seen = objective.terms(whole.rows(start, stop))
        loss.backward()
        total, terms = total + loss.detach(), {name: terms.get(name, 0) + value for name, value in seen.items()}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return total, terms, gradients, objective.balance.loads


def kept(model: HybridModel) -> int:
    """Bytes that a training forward keeps for its backward, weights aside."""
    own, seen = {p.data_ptr() for p in model.parameters()}, {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = model.train().hidden(random_tokens(2, 64))
    del held
    return sum(seen.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits(kind):
    plain, spared = tiny(kind, torch.float32), tiny(kind, torch.float32)
    letters = "".join(sorted(set(plain.config.pattern + plain.config.mtp_pattern)))
    assert len(spared.recompute(letters)) == len(plain.config.pattern + plain.config.mtp_pattern)
    (loss, terms, gradients, loads), (loss2, terms2, gradients2, loads2) = taught(plain), taught(spared)
    assert loss == loss2 and terms == terms2
    assert gradients.keys() == gradients2.keys()
    assert all(gradients[name].equal(gradients2[name]) for name in gradients)
    assert len(loads) == len(loads2) and all(a.equal(b) for a, b in zip(loads, loads2, strict=True))


def test_less_is_kept_for_every_letter():
    everything = kept(tiny("everything", torch.float32))
    sizes = {}
    for letter in "M*E-WR":
        model = tiny("everything", torch.float32)
        model.recompute(letter)
        sizes[letter] = kept(model)
    model.recompute("M*E-WR")
    assert all(size < everything for size in sizes.values()), (everything, sizes)
    assert kept(model) < everything / 4


def test_a_state_moves_on_once():
    model = tiny("everything").train()
    tokens = random_tokens(2, 12)
    whole = model.hidden(tokens)
    model.recompute("M*E-WR")
    state = model.new_state(2)
    pieces = [model.hidden(tokens[:, :5], state=state), model.hidden(tokens[:, 5:], state=state)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    pieces[1].square().sum().backward()
    assert all(p.grad is not None for p in model.backbone.layers.parameters())


def test_letters_that_are_not_there_are_refused():
    with pytest.raises(Refusal, match="letters of 'ME\\*'"):
        tiny("moe").recompute("M-")
    with pytest.raises(Refusal, match="remove 'x'"):
        TrainSettings(steps=1, lr=1e-3, recompute="Mx")
