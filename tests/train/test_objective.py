"""What a step minimises, against sums written out by hand; and that cutting a step into parts changes nothing."""

import math

import pytest
import torch

from tests.models import random_documents, random_tokens, tiny
from trimaran.data.batch import Batch
from trimaran.errors import Refusal
from trimaran.model.moe import MoE
from trimaran.train.loop import parts
from trimaran.train.objective import Pretraining, streams


def packed(rows: int = 8, length: int = 40) -> Batch:
    """Rows of several documents whose ids fall and repeat; some end in padding, some documents go on past the row."""
    tokens, ids = random_tokens(rows, length), random_documents(rows, length).int()
    following = random_tokens(rows, 1, seed=8)[:, 0]
    ids[1, 30:] = ids[5, 7:] = -1
    goes_on = torch.arange(rows) % 2 == 0
    targets, weights = torch.zeros_like(tokens), torch.zeros(rows, length)
    for row in range(rows):
        for t in range(length):
            last = t == length - 1
            if ids[row, t] >= 0 and (goes_on[row] if last else ids[row, t] == ids[row, t + 1]):
                targets[row, t] = following[row] if last else tokens[row, t + 1]
                weights[row, t] = 1
    return Batch(tokens.where(ids >= 0, 0), targets, ids, weights)


def test_targets_further_on_stop_at_borders_row_ends_and_padding():
    batch = packed()
    batch.weights_BT[0, 3:9] = 0.5  # as a loss mask would have it
    found = streams(batch, 3)
    rows, length = batch.tokens_BT.shape
    for depth, one in enumerate(found.depths):
        counted = 0.0
        for row in range(rows):
            for t in range(length):
                ids = batch.doc_ids_BT[row].tolist()
                within = t + depth < length and ids[t] >= 0 and len(set(ids[t : t + depth + 1])) == 1
                weight = float(batch.weights_BT[row, t + depth]) if within else 0.0
                assert bool(one.weights_BT[row, t] > 0) == (weight > 0), (depth, row, t)
                counted += weight
                if weight and depth:
                    assert one.next_BT[row, t] == batch.tokens_BT[row, t + depth]
                if weight:
                    assert one.targets_BT[row, t] == batch.targets_BT[row, t + depth]
        raw = batch.weights_BT.roll(-depth, 1)
        torch.testing.assert_close(one.weights_BT, raw * (one.weights_BT > 0) / counted)
        assert int(one.targets_BT.min()) >= 0 and int(one.targets_BT.max()) < 97
    assert found.depths[0].next_BT is None


def test_terms_are_the_sums_of_their_definition(model):
    batch = packed()
    objective = Pretraining(model, mtp_scale=0.3, aux_loss=0.01, router_bias_rate=1e-3)
    loss, terms = objective.terms(objective.streams(batch))
    hidden, expected = model.hidden(batch.tokens_BT, batch.doc_ids_BT), []
    auxes = [
        float(stats.aux.detach()) for block in model.modules() if isinstance(block, MoE) for stats in block.take_stats()
    ]
    for one in streams(batch, 2).depths:
        if one.next_BT is not None:
            hidden = model.mtp(hidden, one.next_BT, batch.doc_ids_BT)
        losses = torch.nn.functional.cross_entropy(
            model.head(hidden).flatten(0, 1), one.targets_BT.flatten(), reduction="none"
        )
        counted = (one.weights_BT > 0).flatten()
        expected.append(float(losses[counted].mean().detach()))
    auxes += [
        float(stats.aux.detach()) for block in model.modules() if isinstance(block, MoE) for stats in block.take_stats()
    ]
    assert [float(terms[name]) for name in ("loss", "mtp_1", "mtp_2")] == pytest.approx(expected, rel=1e-6)
    assert float(terms["aux"]) == pytest.approx(sum(auxes) / 4, rel=1e-9)
    assert len(auxes) == 4, "two blocks of the trunk, the draft block twice"
    total = expected[0] + 0.3 / 2 * (expected[1] + expected[2]) + 0.01 * sum(auxes)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("count", [2, 3, 4, 8, 20])
def test_a_step_in_parts_is_the_same_step(count):
    found = []
    for pieces in (1, count):
        model = tiny("latent", torch.float64, mtp_depth=2).train()
        objective = Pretraining(model, mtp_scale=0.3, aux_loss=0.01, router_bias_rate=1e-3)
        seen: dict[str, float] = {}
        for part in parts(objective.streams(packed()), pieces):
            loss, terms = objective.terms(part)
            loss.backward()
            for name, term in terms.items():
                seen[name] = seen.get(name, 0.0) + float(term)
        seen["max_vio"] = float(objective.observed()["max_vio"])
        objective.after_step()
        tensors = {name: one.grad for name, one in model.named_parameters()}
        found.append((seen, tensors | dict(model.named_buffers())))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    for name, tensor in found[0][1].items():
        assert tensor is not None and tensor.abs().sum() > 0, name
        torch.testing.assert_close(found[1][1][name], tensor, rtol=1e-9, atol=1e-13, msg=name)


def test_the_draft_block_may_train_on_some_steps_only(model):
    objective = Pretraining(model, mtp_scale=0.3, aux_loss=0.0, router_bias_rate=0.0, mtp_every=3)
    for step in range(7):
        found = objective.terms(objective.streams(packed(), step))[1]
        assert ("mtp_2" in found) == (step % 3 == 0)


def test_mtp_without_a_target_costs_nothing_and_trains_nothing_wrong(model):
    ids = torch.arange(16).view(1, 16).int() // 2  # documents of two tokens: no token after next
    weights = torch.tensor([[1.0, 0.0] * 8])
    batch = Batch(random_tokens(1, 16), random_tokens(1, 16, seed=1), ids, weights)
    objective = Pretraining(model, mtp_scale=0.3, aux_loss=0.0, router_bias_rate=1e-3)
    loss, terms = objective.terms(objective.streams(batch))
    loss.backward()
    assert float(terms["mtp_1"]) == float(terms["mtp_2"]) == 0
    assert all(math.isfinite(float(one.grad.sum())) for one in model.parameters() if one.grad is not None)


def test_scale_zero_leaves_the_draft_block_out(model):
    objective = Pretraining(model, mtp_scale=0.0, aux_loss=0.0, router_bias_rate=1e-3)
    loss, terms = objective.terms(objective.streams(packed()))
    loss.backward()
    assert set(terms) == {"loss", "aux"}
    assert all(one.grad is None for one in model.mtp.parameters())


def test_an_empty_loss_mask_is_refused():
    batch = packed()
    with pytest.raises(Refusal, match="without a target"):
        streams(Batch(batch.tokens_BT, batch.targets_BT, batch.doc_ids_BT, torch.zeros(8, 40)), 1)
