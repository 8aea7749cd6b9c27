"""Load balancing by the router's bias."""

import torch

from tests.models import tiny, tiny_config
from trimaran.model.layout import lay_out
from trimaran.model.moe import MoE
from trimaran.train.balance import Balance


def skewed(experts: int = 32, chosen: int = 4) -> MoE:
    """One MoE block whose router prefers some experts by far."""
    config = tiny_config(
        "moe",
        n_routed_experts=experts,
        num_experts_per_tok=chosen,
        moe_intermediate_size=8,
        moe_shared_expert_intermediate_size=0,
        hidden_size=16,
    )
    torch.manual_seed(0)
    block = MoE(config).train()
    for tensor in (*block.parameters(), block.gate.e_score_correction_bias):
        torch.nn.init.normal_(tensor, 0, 0.1)
    block.gate.e_score_correction_bias.zero_()
    with torch.no_grad():
        block.gate.weight[:, 0] = torch.linspace(-0.5, 0.5, experts)
    return block


def rows(count: int, seed: int) -> torch.Tensor:
    x = torch.randn(1, count, 16, generator=torch.Generator().manual_seed(seed))
    x[..., 0] = 1
    return x


def test_the_worst_load_falls_towards_the_mean():
    block = skewed()
    balance = Balance(block, rate=1e-3)
    seen = []
    for step in range(800):
        block(rows(256, step), lay_out(1, 256, torch.device("cpu")))
        balance.collect()
        seen.append(float(balance.violation()))
        balance.step()
    first, last = sum(seen[:20]) / 20, sum(seen[-20:]) / 20
    assert first > 1.5 and last < 0.5 and last < first / 4, (first, last)


def test_one_update_per_step_by_the_sign_over_all_parts():
    block = skewed(8, 2)
    balance = Balance(block, rate=0.01)
    loads = []
    for part in (0, 1):
        block(rows(64, part), lay_out(1, 64, torch.device("cpu")))
        loads.append(block.stats[0].load_E.clone())
        balance.collect()
    bias = block.gate.e_score_correction_bias
    assert not bias.any(), "nothing moves before the step"
    load = loads[0] + loads[1]
    assert load.sum() == 2 * 128
    assert float(balance.violation()) == float(load.max() / load.mean() - 1)
    balance.step()
    torch.testing.assert_close(bias, 0.01 * torch.sign(load.mean() - load))
    assert bias.dtype == torch.float32
    balance.step()  # without tokens: nothing changes
    torch.testing.assert_close(bias, 0.01 * torch.sign(load.mean() - load))


def test_the_bias_shifts_the_choice_as_a_whole_without_effect():
    block, x = skewed(), rows(64, 0)[0]
    _, ids, weights = block.gate(x)
    block.gate.e_score_correction_bias += 7.0
    _, shifted_ids, shifted_weights = block.gate(x)
    order, shifted_order = ids.argsort(1), shifted_ids.argsort(1)
    assert torch.equal(ids.gather(1, order), shifted_ids.gather(1, shifted_order))
    torch.testing.assert_close(weights.gather(1, order), shifted_weights.gather(1, shifted_order))


def test_a_softmax_router_is_balanced_by_the_loss_alone():
    model = tiny("qwen", torch.float32).train()
    before = [tensor.clone() for tensor in model.state_dict().values()]
    balance = Balance(model, rate=0.1)
    model.hidden(torch.randint(97, (2, 16)))
    total, count = balance.collect()
    assert count == 2 and float(total.detach()) >= 2 * 0.99
    balance.step()
    assert all(torch.equal(one, other) for one, other in zip(before, model.state_dict().values()))


def test_validation_leaves_no_statistics():
    model = tiny("latent", torch.float32).train()
    balance = Balance(model, rate=0.1)
    with torch.no_grad():
        model.hidden(torch.randint(97, (2, 16)))
    assert balance.collect() is None


def test_nobody_watching_leaves_nothing_behind():
    """A training loop that never asks for the statistics must not hold every graph it ever made."""
    model = tiny("latent", torch.float32).train()
    for _ in range(2):
        model.hidden(torch.randint(97, (2, 16)))
    assert not any(block.stats for block in model.modules() if isinstance(block, MoE))
