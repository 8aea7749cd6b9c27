"""Tiny models for the tests: one per letter and switch, with weights far from zero so that mistakes show."""

from collections.abc import Mapping

import torch

from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import HybridModel, build

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 16,
    "intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "initializer_range": 0.3,
}
LATENT = {"moe_latent_size": 16}
QWEN = {"ffn": "swiglu", "router": "softmax", "qk_norm": True, "moe_shared_expert_intermediate_size": 0}

KINDS: dict[str, dict] = {
    "mamba": {"pattern": "MM"},
    "attention": {"pattern": "M**"},
    "rope": {"pattern": "RR"},
    "window": {"pattern": "MW"},
    "dense": {"pattern": "M-M*-"},
    "moe": {"pattern": "ME*E", "routed_scaling_factor": 2.5},
    "grouped-moe": {"pattern": "ME*E", "n_group": 4, "topk_group": 2},
    "latent": {"pattern": "ME*E", **LATENT, "mtp_pattern": "*E"},
    "llama": {"pattern": "R-R-", "ffn": "swiglu", "tie_embeddings": True},
    "qwen": {"pattern": "RERE", **QWEN},
    "ngpt": {"pattern": "R-M*-", "ffn": "swiglu", "residual": "ngpt"},
    "everything": {"pattern": "M*EW-RE", **LATENT, "qk_norm": True, "mtp_pattern": "*E", "n_group": 2, "topk_group": 1},
}


def tiny_config(kind: str, **changes: object) -> ModelConfig:
    return ModelConfig(**{**SIZES, **KINDS[kind], **changes})


def tiny(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object) -> HybridModel:
    """A random model of the given kind, in evaluation mode, with router biases that change some choices."""
    model = build(tiny_config(kind, **changes), dtype=dtype, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.2, generator=generator)
            elif tensor.ndim == 1:
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.1)
    return model


def random_tokens(batch: int, length: int, vocab: int = 97, seed: int = 7) -> torch.Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_documents(batch: int, length: int, seed: int = 3) -> torch.Tensor:
    """Document ids with a new document about every 20 tokens, different in every row; ids also fall and repeat."""
    generator = torch.Generator().manual_seed(seed)
    borders = torch.rand(batch, length, generator=generator) < 0.05
    return borders.cumsum(1) % 3 + 5


def chained(follows: Mapping[int, int], vocabulary: int) -> HybridModel:
    """A model that says follows[token] after each token, whatever came before: written into its embedding and head."""
    model = tiny("attention", torch.float32, vocab_size=vocabulary, hidden_size=64)
    with torch.no_grad():
        for layer in model.backbone.layers:
            mixer = layer.mixer
            (mixer.out_proj if hasattr(mixer, "out_proj") else mixer.o_proj).weight.zero_()
        model.backbone.norm_f.weight.fill_(1)
        model.lm_head.weight.zero_()
        for token, following in follows.items():
            model.lm_head.weight[following] += model.backbone.embeddings.weight[token]
    return model
