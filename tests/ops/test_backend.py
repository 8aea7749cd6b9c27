"""One setting says which twins may run."""

import pytest
import torch

from tests.ops.agree import drawn
from trimaran.errors import Refusal
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import build
from trimaran.ops import backend, native
from trimaran.ops.loss import cross_entropy

SMALL = ModelConfig(
    pattern="ME*-M",
    vocab_size=64,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=16,
    n_groups=2,
    chunk_size=16,
    intermediate_size=48,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_latent_size=16,
    moe_intermediate_size=24,
    moe_shared_expert_intermediate_size=24,
)


def test_words_forbid_and_force():
    with backend.using("-torch.ssd,-native"):
        assert not backend.allowed("torch.ssd") and not backend.allowed("native.linear")
        assert backend.allowed("torch.norm")
        assert backend.record()["forbidden"] == sorted(["torch.ssd", *(f"native.{t}" for t in backend.TWINS["native"])])
    with backend.using("reference,torch.norm"):
        assert backend.allowed("torch.norm") and not backend.allowed("torch.conv")
    assert backend.allowed("torch.ssd") and backend.record()["backend"] == "auto"


@pytest.mark.parametrize("setting", ["fast", "-fast", "native.everything", "torch.", "auto,reference2"])
def test_an_unknown_word_is_refused_and_changes_nothing(setting):
    with pytest.raises(Refusal, match=r"ops\.backend"):
        backend.choose(setting)
    assert backend.record()["backend"] == "auto"


def test_a_forced_twin_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: "no native kernels were built")
    with pytest.raises(Refusal, match="no native kernels were built"):
        backend.choose("native")
    backend.choose("-native")
    backend.choose("auto")


def test_all_forbidden_gives_the_formulas(monkeypatch):
    """No fast form is entered, neither forward, nor backward, nor in decoding; and the numbers are the same."""
    from trimaran.ops import attention, conv, experts, loss, norm, ssd

    model = build(SMALL)
    tokens = torch.randint(0, 64, (2, 37), generator=torch.Generator().manual_seed(1))

    def run():
        model.zero_grad()
        hidden = model.hidden(tokens[:, :-1])
        value = cross_entropy(hidden.flatten(0, 1), model.head, tokens[:, 1:].flatten(), torch.ones(72))
        value.backward()
        with torch.no_grad():
            state = model.new_state(2)
            outs = [model(tokens[:, :30], state=state), *(model(tokens[:, n : n + 1], state=state) for n in (30, 31))]
        return [value.detach(), *(p.grad.clone() for p in model.parameters()), torch.cat(outs, 1)]

    fast = run()
    forbidden = [ssd.ChunkedScan, conv.CausalConvSiLU, norm.RMSNorm, norm.GatedRMSNorm, attention.CPUTraining]
    forbidden += [experts.ToExperts, experts.FromExperts, loss.ChunkedCrossEntropy]

    def entered(*args):
        raise AssertionError("a fast form ran")

    for function in forbidden:
        monkeypatch.setattr(function, "apply", entered)
    with backend.using("reference"):
        plain = run()
    for one, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)


def test_each_family_can_be_forbidden_alone():
    model, x = build(SMALL), torch.arange(5)[None]
    with torch.no_grad():
        expected = model(x)
        for family in ("torch", "native"):
            with backend.using(f"-{family}"):
                torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_narrow_norm_reference_keeps_the_dtype():
    from trimaran.ops.norm import gated_rms_norm

    y, gate, weight = (drawn(3, 8, dtype=torch.bfloat16, seed=n) for n in range(3))
    with backend.using("reference"):
        assert gated_rms_norm(y, gate, weight[0], 2, 1e-5).dtype == torch.bfloat16
