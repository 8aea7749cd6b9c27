"""nGPT against a forward pass written out from the paper's formulas, and the sphere it promises."""

import pytest
import torch

from tests.models import random_tokens, tiny
from trimaran.errors import Refusal
from trimaran.model import hub
from trimaran.model.linear import Embedding, Linear
from trimaran.model.size import count
from trimaran.model.sphere import COLUMNS, project


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def rotated(x_THK: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions as complex numbers."""
    length, _, width = x_THK.shape
    freq = (theta ** -(torch.arange(0, width, 2) / width)).double()  # tables of frequencies are fp32 everywhere
    turn = torch.polar(torch.ones(length, width // 2, dtype=torch.float64), torch.arange(length)[:, None] * freq)
    pair = torch.complex(x_THK[..., : width // 2], x_THK[..., width // 2 :]) * turn[:, None]
    return torch.cat([pair.real, pair.imag], -1)


def paper_forward(model, tokens_T: torch.Tensor) -> torch.Tensor:
    """The formulas of arXiv 2410.01131 for a model of R and - blocks, one sequence, fp64."""
    config, weights = model.config, model.state_dict()
    width, dim, groups = config.hidden_size, config.head_dim, config.num_key_value_heads
    shared = config.num_attention_heads // groups
    h = weights["backbone.embeddings.weight"][tokens_T]
    for index, letter in enumerate(config.pattern):
        mine = {k.split("mixer.")[-1]: v for k, v in weights.items() if k.startswith(f"backbone.layers.{index}.mixer.")}
        if letter == "R":
            q, k, v = (h @ mine[f"{n}_proj.weight"].T for n in "qkv")
            q, k, v = q.view(len(h), -1, dim), k.view(len(h), -1, dim), v.view(len(h), -1, dim)
            s_qk = (mine["s_qk.weight"] * width**0.5).view(groups, dim)
            q = unit(rotated(q, config.rope_theta)) * s_qk.repeat_interleave(shared, 0)
            k = (unit(rotated(k, config.rope_theta)) * s_qk).repeat_interleave(shared, 1)
            scores = torch.einsum("thk,shk->hts", q, k) * dim**0.5
            hidden = torch.ones(len(h), len(h)).triu(1).bool()
            attended = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            out = torch.einsum("hts,shk->thk", attended, v.repeat_interleave(shared, 1)).flatten(1)
            mixed = out @ mine["o_proj.weight"].T
        else:
            u = mine["s_u.weight"] * (h @ mine["up_proj.weight"].T)
            g = mine["s_v.weight"] * width**0.5 * (h @ mine["gate_proj.weight"].T)
            mixed = (u * torch.nn.functional.silu(g)) @ mine["down_proj.weight"].T
        alpha = (weights[f"backbone.layers.{index}.alpha.weight"] * 0.05 * width**0.5).abs()
        h = unit(h + alpha * (unit(mixed) - h))
    return weights["lm_head.s_z.weight"] * width**0.5 * (h @ weights["lm_head.weight"].T)


@torch.no_grad()
def test_forward_is_the_papers():
    model, tokens = tiny("ngpt", pattern="R-R-"), random_tokens(1, 63)
    torch.testing.assert_close(model(tokens)[0], paper_forward(model, tokens[0]), rtol=0, atol=1e-10)


@torch.no_grad()
def test_hidden_vectors_and_weights_are_on_the_sphere():
    model = tiny("ngpt")
    ones = torch.ones(1, 40, dtype=torch.float64)
    torch.testing.assert_close(model.hidden(random_tokens(1, 40)).norm(dim=-1), ones)
    for _, parameter in model.named_parameters():
        parameter.mul_(1.7).add_(0.01)
    project(model)
    seen = 0
    for name, module in model.named_modules():
        if isinstance(module, (Linear, Embedding)):
            axis = 0 if name.rsplit(".", 1)[-1] in COLUMNS else 1
            lengths = module.weight.norm(dim=axis)
            torch.testing.assert_close(lengths, torch.ones_like(lengths))
            assert module.weight.shape[axis] == model.config.hidden_size
            seen += 1
    assert seen == 2 + 4 * 2 + 3 * 2 + 2  # embedding and head, R and *, two feed-forwards, Mamba


@pytest.mark.filterwarnings("ignore:no hub architecture")
@pytest.mark.parametrize("pattern", ["R-M*-", "R-R-"])
def test_sizes_and_checkpoints_know_the_sphere(pattern, tmp_path):
    model = tiny("ngpt", torch.float32, pattern=pattern)
    assert count(model.config).total == sum(p.numel() for p in model.parameters())
    hub.save(model, tmp_path / "sphere")
    again = hub.load(tmp_path / "sphere")
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes", [{"tie_embeddings": True}, {"pattern": "ME"}, {"qk_norm": True}, {"mtp_pattern": "R"}]
)
def test_what_the_paper_does_not_define_is_refused(changes):
    with pytest.raises(Refusal, match="ngpt"):
        tiny("ngpt", **changes)
