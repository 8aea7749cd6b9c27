"""The unrolled draft block against loops that do one place, one text and one step at a time."""

import pytest
import torch

from tests.models import random_tokens, tiny
from trimaran.errors import Refusal
from trimaran.model.hybrid import HybridModel
from trimaran.rl.unroll import Healing, Unrolled, Written, unrolled
from trimaran.train.loop import parts

LENGTHS = ((9, 17), (5, 11), (12, 30), (3, 8), (4, 6), (20, 21))  # tokens of the prompt and of all, per text
DEPTH, T = 4, 2.0


def text(number: int) -> tuple[list[int], list[bool]]:
    prompt, whole = LENGTHS[number]
    tokens = random_tokens(1, whole, seed=number)[0].tolist()
    return tokens, [place >= prompt for place in range(whole)]


def written(rows: list[list[int]], width: int = 48) -> Written:
    """Rows that hold these texts, padded."""
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    ids, said = torch.full_like(tokens, -1), torch.zeros_like(tokens, dtype=torch.bool)
    for row, numbers in enumerate(rows):
        at = 0
        for number in numbers:
            words, mine = text(number)
            part = slice(at, at + len(words))
            tokens[row, part], said[row, part], ids[row, part] = torch.tensor(words), torch.tensor(mine), number
            at += len(words)
    return Written(tokens, ids, said)


def healing(model: HybridModel, **settings: object) -> Healing:
    return Healing(model, **{"depth": DEPTH, "temperature": T, "seed": 3, "chunk": 20, **settings})


def gradients(model: HybridModel) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def plain_loss(model: HybridModel, streams: Unrolled) -> torch.Tensor:
    """The loss, text by text, in lists."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(streams.tokens_BT)):
        for document in streams.doc_ids_BT[row].unique():
            if document < 0:
                continue
            at = (streams.doc_ids_BT[row] == document).nonzero()[:, 0]
            tokens = streams.tokens_BT[row, at][None]
            trunk = model.hidden(tokens).detach()
            laws = (model.head(trunk) / T).log_softmax(-1)[0]
            stands = [trunk]
            for k in range(DEPTH):
                picked = [stands[int(streams.sources_BKT[row, k, place])][:, t] for t, place in enumerate(at)]
                out = model.mtp(torch.stack(picked, 1)[:, :-1], tokens[:, 1:])
                stands.append(torch.cat([torch.full_like(out[:, :1], torch.nan), out], 1))
                student = (model.head(out) / T).log_softmax(-1)[0]
                for t in range(len(at) - 1):
                    weight = streams.weights_BT[row, at[t]]
                    kl = (laws[t + 1].exp() * (laws[t + 1] - student[t])).sum()
                    total = total + weight * T**2 / DEPTH * kl
    return total


def test_what_is_drafted_counts_and_prompts_are_read_with_the_trunk():
    streams = unrolled(written([[1, 4]], width=20), DEPTH, torch.Generator().manual_seed(0))
    # text 1: 5 of 11 tokens are the prompt's, so 6 ... 10 may be drafted, each two places before; text 4: 4 of 6
    drafted = [*range(4, 9), 11 + 3]
    assert streams.weights_BT[0].nonzero()[:, 0].tolist() == drafted
    assert torch.allclose(streams.weights_BT.sum(), torch.ones(()))
    assert streams.following_BT[0, :10].tolist() == text(1)[0][1:] and streams.following_BT[0, 10] == 0
    assert not streams.sources_BKT[0, :, :5].any() and not streams.sources_BKT[0, :, 11:15].any()
    assert not streams.sources_BKT[:, 0].any() and streams.sources_BKT.max() == DEPTH - 1


@pytest.mark.parametrize("pattern", ["*E", "W-"])
def test_equals_the_loops_packed_and_in_parts(pattern):
    model = tiny("latent", mtp_pattern=pattern, intermediate_size=48)
    objective = healing(model)
    streams = objective.streams(written([[0, 1], [2, 3], [4], [5]]), step=7)
    plain = plain_loss(model, streams)
    plain.backward()
    expected = gradients(model)
    assert expected
    for count in (1, 2, 4):
        losses = []
        for part in parts(streams, count):
            loss, terms = objective.terms(part)
            loss.backward()
            losses.append(loss.detach())
            assert torch.isclose(terms["loss"], sum(terms[f"kl_{k}"] for k in range(1, DEPTH + 1)) / DEPTH)
        # weights are fp32, and rounded once
        torch.testing.assert_close(sum(losses), plain.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(gradients(model), expected, rtol=1e-5, atol=1e-8)


def test_the_second_step_reads_what_drafting_reads():
    """A block without memory: fed its own output, it says at t what an engine that drafts from t - 1 says next."""
    model = tiny("latent", mtp_pattern="-", intermediate_size=48)
    objective = healing(model, depth=2)
    streams = objective.streams(written([[2]], width=30))
    streams.sources_BKT[:, 1] = streams.weights_BT > 0
    found: list[torch.Tensor] = []
    model.mtp.register_forward_hook(lambda module, inputs, out: found.append(out))
    objective.terms(streams)
    place = int(streams.weights_BT[0].nonzero()[3])
    first = model.mtp(model.hidden(streams.tokens_BT)[:, place - 1 : place], streams.tokens_BT[:, place : place + 1])
    second = model.mtp(first, streams.tokens_BT[:, place + 1 : place + 2])
    torch.testing.assert_close(found[1][:, place], second[:, 0])


def test_nothing_but_the_draft_block_learns():
    model = tiny("latent").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objective = healing(model, router_bias_rate=0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(12):
        loss, terms = objective.terms(objective.streams(written([[0, 1], [2, 3]]), step))
        optimizer.zero_grad()
        loss.backward()
        assert "max_vio" in objective.observed()
        optimizer.step()
        objective.after_step()
        losses.append(float(terms["loss"]))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("mtp.") for name in changed)
    assert "mtp.layers.1.mixer.gate.e_score_correction_bias" in changed
    assert losses[-1] < 0.8 * losses[0]


def test_draws_depend_on_seed_and_step_alone():
    model = tiny("latent")
    batch = written([[0, 1], [2, 3]])
    one, same = healing(model).streams(batch, 5), healing(model).streams(batch, 5)
    assert torch.equal(one.sources_BKT, same.sources_BKT)
    for other in (healing(model).streams(batch, 6), healing(model, seed=4).streams(batch, 5)):
        assert not torch.equal(one.sources_BKT, other.sources_BKT)


def test_refuses_what_cannot_teach():
    with pytest.raises(Refusal, match="draft block"):
        healing(tiny("mamba"))
    with pytest.raises(Refusal, match="too short"):
        healing(tiny("latent")).streams(written([[5]]))
