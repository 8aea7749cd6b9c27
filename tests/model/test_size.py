"""The formulas equal the model: every tensor of every preset and of random configurations, built without memory."""

import random

import pytest
import torch

from tests.models import KINDS, random_tokens, tiny, tiny_config
from trimaran.model.config import LETTERS, ModelConfig
from trimaran.model.hybrid import build
from trimaran.model.names import pieces
from trimaran.model.presets import PRESETS, preset
from trimaran.model.size import ShapeOnly, count, groups
from trimaran.model.state import State


def random_config(seed: int) -> ModelConfig:
    draw = random.Random(seed)
    kv, groups_, n_group = draw.choice([1, 2, 4]), draw.choice([1, 2, 4]), draw.choice([1, 2])
    return ModelConfig(
        pattern="".join(draw.choices(list(LETTERS), k=draw.randint(1, 12))),
        vocab_size=draw.randint(3, 300),
        hidden_size=draw.randint(1, 80),
        num_attention_heads=kv * draw.randint(1, 4),
        num_key_value_heads=kv,
        head_dim=2 * draw.randint(1, 16),
        qk_norm=draw.random() < 0.5,
        mamba_num_heads=groups_ * draw.randint(1, 5),
        mamba_head_dim=draw.randint(1, 20),
        ssm_state_size=draw.randint(1, 40),
        n_groups=groups_,
        conv_kernel=draw.randint(2, 5),
        use_conv_bias=draw.random() < 0.5,
        ffn=draw.choice(["relu2", "swiglu"]),
        router=draw.choice(["sigmoid", "softmax"]),
        intermediate_size=draw.randint(1, 100),
        n_routed_experts=n_group * draw.randint(3, 8),
        num_experts_per_tok=draw.randint(1, 3),
        n_group=n_group,
        moe_intermediate_size=draw.randint(1, 50),
        moe_shared_expert_intermediate_size=draw.choice([0, 17]),
        moe_latent_size=draw.choice([None, 12]),
        tie_embeddings=draw.random() < 0.5,
        mtp_pattern="".join(draw.choices("*E-RW", k=draw.randint(0, 3))),
    )


def same_as_model(config: ModelConfig) -> None:
    kind = "trimaran"
    built = {name: tuple(tensor.shape) for name, tensor in build(config, "meta").state_dict().items()}
    formula = {g.name.replace(".*", ""): (g.copies, *g.shape) if ".*" in g.name else g.shape for g in groups(config)}
    assert formula == built
    sizes = count(config)
    assert sizes.total == sum(torch.Size(shape).numel() for shape in built.values())
    assert sizes.tensors == sum(1 for name, shape in built.items() for _ in pieces(name, shape, kind))


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = preset(name)
    if not isinstance(config, ShapeOnly):
        same_as_model(config)


@pytest.mark.parametrize("seed", range(40))
def test_random_configurations(seed):
    same_as_model(random_config(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_active_parameters(kind):
    """Counted by hand: everything but the draft block, less the experts that a token does not meet."""
    config = tiny_config(kind)
    idle = config.n_routed_experts - config.num_experts_per_tok
    built = {name: tensor for name, tensor in build(config, "meta").state_dict().items() if not name.startswith("mtp.")}
    experts = sum(t.numel() * idle // config.n_routed_experts for name, t in built.items() if ".experts." in name)
    assert count(config).active == sum(t.numel() for t in built.values()) - experts


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_state(kind):
    """Against a state that holds 40 tokens."""
    model, sizes = tiny(kind, torch.float32), count(tiny_config(kind))
    state = model.new_state(1)
    with torch.no_grad():
        model(random_tokens(1, 40), state=state)
    ssm = sum(layer.ssm.numel() for layer in state.layers if hasattr(layer, "ssm"))
    tail = sum(layer.tail.numel() for layer in state.layers if hasattr(layer, "ssm"))
    assert sizes.ssm_bytes_per_sequence() == 4 * ssm
    assert sizes.conv_bytes_per_sequence() == 2 * tail
    assert sizes.memory.kv_per_token == cached(state, model.config.pattern, "*R") / 40
    windows = model.config.pattern.count("W")
    assert sizes.window_bytes_per_sequence() == windows * model.config.sliding_window * 2 * 2 * 2 * 8


def cached(state: State, pattern: str, letters: str) -> int:
    kept = [layer for layer, letter in zip(state.layers, pattern, strict=True) if letter in letters]
    return sum(layer.k[:, :40].numel() + layer.v[:, :40].numel() for layer in kept)


def test_published_bytes():
    """Ultra: the fp32 Mamba state equals 64 Ki tokens of fp8 keys and values (the report's statement)."""
    ultra = count(preset("ultra-3"))
    assert ultra.ssm_bytes_per_sequence() == 65536 * ultra.kv_bytes_per_token(1) == 384 * 2**20
    table = {"nemotron-h-56b": (40960, 864), "nano-12b-v2": (24576, 140), "nano-3": (6144, 46), "super-3": (8192, 160)}
    for name, (kv, ssm) in table.items():
        sizes = count(preset(name))
        assert (sizes.kv_bytes_per_token(), sizes.ssm_bytes_per_sequence() / 2**20) == (kv, ssm)
    assert count(preset("super-3")).draft_kv_bytes_per_token() == 1024
    assert count(preset("deepseek-v3")).kv_bytes_per_token() == 61 * 576 * 2


def test_flops_of_a_transformer():
    """Llama: two per weight but the input table, and four per key, head and channel in every layer."""
    sizes = count(preset("llama3-8b"))
    norms = (2 * 32 + 1) * 4096
    assert sizes.flops_per_token(0) == 2 * (sizes.total - sizes.embedding - norms)
    assert sizes.flops_per_token(1000) - sizes.flops_per_token(0) == 1000 * 32 * 4 * 4096
    tied = count(preset("llama3-8b").replace(tie_embeddings=True))
    assert tied.flops_per_token(0) == sizes.flops_per_token(0)


def test_windows_stop_growing():
    sizes = count(tiny_config("window"))
    assert sizes.flops_per_token(16) == sizes.flops_per_token(1000) > sizes.flops_per_token(15)
    assert sizes.state_bytes(16) == sizes.state_bytes(1000) > sizes.state_bytes(15)
