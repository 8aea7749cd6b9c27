"""Published models by name, and one dial for small ones.

Provenance stands beside each field. MLM: Megatron-LM, examples/post_training/modelopt/conf/nvidia (patterns, widths,
scaling, initial std). Card: NVIDIA's report and model card. Hub: the config.json of the release or of a fine-tune of
it. Sum: no source names it, and the parameter count of the published checkpoint fixes it. (?): not confirmed.
"""

import math
import re

from trimaran.config import named
from trimaran.errors import Refusal
from trimaran.model.config import ModelConfig, RopeScaling
from trimaran.model.size import ShapeOnly, count

PRESETS: dict[str, str] = {
    "nemotron-h-8b": "trimaran.model.presets:nemotron_h_8b",
    "nemotron-h-47b": "trimaran.model.presets:nemotron_h_47b",
    "nemotron-h-56b": "trimaran.model.presets:nemotron_h_56b",
    "nano-12b-v2": "trimaran.model.presets:nano_12b_v2",
    "nano-9b-v2": "trimaran.model.presets:nano_9b_v2",
    "nano-3": "trimaran.model.presets:nano_3",
    "super-3": "trimaran.model.presets:super_3",
    "ultra-3": "trimaran.model.presets:ultra_3",
    "lightning-3.5": "trimaran.model.presets:lightning_3_5",
    "qwen3-30b-a3b": "trimaran.model.presets:qwen3_30b_a3b",
    "llama3-8b": "trimaran.model.presets:llama3_8b",
    "llama3-70b": "trimaran.model.presets:llama3_70b",
    "llama3-405b": "trimaran.model.presets:llama3_405b",
    "gpt-oss-20b": "trimaran.model.shapes:gpt_oss_20b",
    "gpt-oss-120b": "trimaran.model.shapes:gpt_oss_120b",
    "deepseek-v3": "trimaran.model.shapes:deepseek_v3",
    "kimi-k2": "trimaran.model.shapes:kimi_k2",
}
SIZE = re.compile(r"(\d+(?:\.\d+)?)([kmb])")
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}


def preset(name: str) -> ModelConfig | ShapeOnly:
    """A published model by name, a small one by size ("2m", "150m", "1.5b"), or any `package.module:object`."""
    if SIZE.fullmatch(name):
        return sized(name)[0]
    found = named(name, PRESETS, "model")
    model = found() if callable(found) else found
    if not isinstance(model, ModelConfig | ShapeOnly):
        raise Refusal(f"{name} is a {type(model).__name__}", "a ModelConfig or a function that returns one", "fix it")
    return model


def nemotron_h_8b() -> ModelConfig:
    """Nemotron-H 8B (arXiv 2504.03624)."""
    return ModelConfig(
        pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",  # MLM
        hidden_size=4096,  # MLM
        intermediate_size=21504,  # MLM
        num_attention_heads=32,  # MLM
        num_key_value_heads=8,  # MLM
        head_dim=128,  # MLM
        mamba_num_heads=128,  # MLM
        mamba_head_dim=64,  # MLM
        ssm_state_size=128,  # MLM
        n_groups=8,  # MLM
        initializer_range=0.02,  # (?)
        max_position_embeddings=8192,  # Card
    )


def nemotron_h_47b() -> ModelConfig:
    """Nemotron-H 47B, pruned from 56B, with runs of feed-forwards and of Mamba-2 (arXiv 2504.03624)."""
    return ModelConfig(
        pattern="M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*"  # MLM
        "-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-",
        hidden_size=8192,  # MLM
        intermediate_size=30720,  # MLM
        num_attention_heads=64,  # MLM
        num_key_value_heads=8,  # MLM
        head_dim=128,  # MLM
        mamba_num_heads=256,  # MLM
        mamba_head_dim=64,  # MLM
        ssm_state_size=256,  # MLM
        n_groups=8,  # MLM
        initializer_range=0.02,  # (?)
        max_position_embeddings=8192,  # Card
    )


def nemotron_h_56b() -> ModelConfig:
    """Nemotron-H 56B (arXiv 2504.03624)."""
    return ModelConfig(
        pattern="M-M-M-M*" + 9 * "-M-M-M-M-M*" + "-M-M-M-M-M-",  # MLM
        hidden_size=8192,  # MLM
        intermediate_size=32768,  # MLM
        num_attention_heads=64,  # MLM
        num_key_value_heads=8,  # MLM
        head_dim=128,  # MLM
        mamba_num_heads=256,  # MLM
        mamba_head_dim=64,  # MLM
        ssm_state_size=256,  # MLM
        n_groups=8,  # MLM
        initializer_range=0.0099,  # MLM
        max_position_embeddings=8192,  # Card
    )


def nano_12b_v2() -> ModelConfig:
    """Nemotron Nano 12B v2 (arXiv 2508.14444)."""
    return ModelConfig(
        pattern="M-M-M-M*" + 5 * "-M-M-M-M*" + "-M-M-M-M-",  # MLM, examples/rl/model_configs
        hidden_size=5120,  # MLM
        intermediate_size=20480,  # MLM
        num_attention_heads=40,  # MLM
        num_key_value_heads=8,  # MLM
        head_dim=128,  # MLM
        mamba_num_heads=128,  # MLM
        mamba_head_dim=80,  # MLM and Megatron-Bridge; some pages quote 64, which misses the parameter count
        ssm_state_size=128,  # MLM
        n_groups=8,  # MLM
        initializer_range=0.0125,  # MLM
        max_position_embeddings=131072,  # Card
    )


def nano_9b_v2() -> ModelConfig:
    """Nemotron Nano 9B v2, pruned from 12B v2; the Mamba heads stayed (arXiv 2508.14444)."""
    return ModelConfig(
        pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",  # Megatron-Bridge
        hidden_size=4480,  # Card
        intermediate_size=15680,  # Card
        num_attention_heads=40,  # Megatron-Bridge
        num_key_value_heads=8,  # Megatron-Bridge
        head_dim=128,  # Megatron-Bridge
        mamba_num_heads=128,  # Megatron-Bridge
        mamba_head_dim=80,  # Megatron-Bridge
        ssm_state_size=128,  # Megatron-Bridge
        n_groups=8,  # Megatron-Bridge
        initializer_range=0.0125,  # (?) the parent's
        max_position_embeddings=131072,  # Card
    )


def nano_3() -> ModelConfig:
    """Nemotron 3 Nano, 30B-A3B (arXiv 2512.20848)."""
    return ModelConfig(
        pattern="MEMEM*" + 4 * "EMEMEM*" + "EMEMEMEM*" + "EMEMEMEME",  # MLM; Hub
        hidden_size=2688,  # MLM; Hub
        num_attention_heads=32,  # MLM; Hub
        num_key_value_heads=2,  # MLM; Hub
        head_dim=128,  # MLM; Hub (32 x 128 = 4096, not the width)
        mamba_num_heads=64,  # MLM; Hub
        mamba_head_dim=64,  # MLM; Hub
        ssm_state_size=128,  # MLM
        n_groups=8,  # MLM; Hub
        chunk_size=128,  # Hub
        n_routed_experts=128,  # MLM; Hub
        num_experts_per_tok=6,  # MLM; Hub
        moe_intermediate_size=1856,  # MLM; Hub
        intermediate_size=1856,  # Hub; no dense feed-forward uses it
        moe_shared_expert_intermediate_size=3712,  # MLM; Hub (the report's "2 shared experts" are one, twice as wide)
        routed_scaling_factor=2.5,  # MLM
        initializer_range=0.0173,  # MLM, as trained (Hub says 0.02)
        max_position_embeddings=262144,  # Hub
    )


def lightning_3_5() -> ModelConfig:
    """Nemotron 3.5 Lightning, 30B-A3B: Nano 3's shapes and a draft block."""
    return nano_3().replace(
        mtp_pattern="*E",  # Megatron-Bridge model card; Sum
        mtp_depth=2,  # (?) as Super
        max_position_embeddings=262144,  # Card
    )


def super_3() -> ModelConfig:
    """Nemotron 3 Super, 120B-A12B with latent experts and a draft block (arXiv 2604.12374)."""
    return ModelConfig(
        pattern="MEMEMEM*" + 2 * "EMEMEMEM*" + 4 * "EMEMEMEMEM*" + "EMEMEMEM*" + "EMEMEMEME",  # MLM
        hidden_size=4096,  # MLM
        num_attention_heads=32,  # MLM
        num_key_value_heads=2,  # MLM
        head_dim=128,  # MLM
        mamba_num_heads=128,  # MLM
        mamba_head_dim=64,  # MLM
        ssm_state_size=128,  # MLM
        n_groups=8,  # MLM
        n_routed_experts=512,  # MLM
        num_experts_per_tok=22,  # MLM
        moe_intermediate_size=2688,  # MLM
        moe_shared_expert_intermediate_size=5376,  # MLM
        moe_latent_size=1024,  # MLM
        routed_scaling_factor=5.0,  # MLM
        mtp_pattern="*E",  # Card; Sum
        mtp_depth=2,  # Card: two depths trained, one block stored
        initializer_range=0.014,  # MLM
        max_position_embeddings=262144,  # (?) the card promises up to 1M
    )


def ultra_3() -> ModelConfig:
    """Nemotron 3 Ultra, 550B-A55B with latent experts and a draft block."""
    return ModelConfig(
        pattern="MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*"  # MLM
        "EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        hidden_size=8192,  # MLM
        num_attention_heads=64,  # MLM
        num_key_value_heads=2,  # MLM
        head_dim=128,  # MLM
        mamba_num_heads=256,  # MLM
        mamba_head_dim=64,  # MLM
        ssm_state_size=128,  # MLM
        n_groups=8,  # MLM
        n_routed_experts=512,  # MLM
        num_experts_per_tok=22,  # MLM
        moe_intermediate_size=5120,  # MLM
        moe_shared_expert_intermediate_size=10240,  # MLM
        moe_latent_size=2048,  # MLM
        routed_scaling_factor=5.0,  # MLM
        mtp_pattern="*E",  # Card; the sum rounds to the hub page's 561B
        mtp_depth=2,  # Card
        initializer_range=0.0099,  # MLM
        max_position_embeddings=262144,  # (?)
    )


def qwen3_30b_a3b() -> ModelConfig:
    """Qwen3-30B-A3B (arXiv 2505.09388); all fields from copies of its config.json."""
    return ModelConfig(
        pattern="RE" * 48,
        vocab_size=151936,
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        qk_norm=True,
        rope_theta=1e6,
        ffn="swiglu",
        intermediate_size=6144,  # unused: no layer is dense
        n_routed_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        moe_shared_expert_intermediate_size=0,
        router="softmax",
        norm_topk_prob=True,
        layer_norm_epsilon=1e-6,
        max_position_embeddings=40960,
        pad_token_id=None,
        bos_token_id=151643,
        eos_token_id=151645,
    )


def llama3(layers: int, width: int, heads: int, hidden: int) -> ModelConfig:
    """Llama 3.1 (arXiv 2407.21783, table 3); the rest from copies of its config.json."""
    return ModelConfig(
        pattern="R-" * layers,
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=8,  # the 405B was first uploaded with 16, its own keys and values twice over
        head_dim=128,
        ffn="swiglu",
        rope_theta=500000.0,
        rope_scaling=RopeScaling(factor=8.0),
        layer_norm_epsilon=1e-5,
        max_position_embeddings=131072,
        pad_token_id=None,
        bos_token_id=128000,
        eos_token_id=128001,
    )


def llama3_8b() -> ModelConfig:
    return llama3(layers=32, width=4096, heads=32, hidden=14336)


def llama3_70b() -> ModelConfig:
    return llama3(layers=80, width=8192, heads=64, hidden=28672)


def llama3_405b() -> ModelConfig:
    return llama3(layers=126, width=16384, heads=128, hidden=53248)


def sized(size: str = "2m", vocab_size: int = 2048) -> tuple[ModelConfig, str]:
    """The Nemotron-3-shaped model nearest to `size` parameters in all, and the arithmetic that led to it.

    size: a number with k, m or b. One width decides everything else (`of_width`).
    """
    match = SIZE.fullmatch(size)
    if match is None:
        raise Refusal(f"size {size!r}", "a number with k, m or b, such as 2m or 1.5b", "write size=2m")
    wanted = float(match[1]) * UNITS[match[2]]
    widths = [*range(32, 128, 16), *range(128, 8193, 32)]  # whole Mamba heads
    smallest, largest = (count(of_width(w, vocab_size)[0]).total for w in (widths[0], widths[-1]))
    if not smallest / 1.5 <= wanted <= largest * 1.5:
        raise Refusal(
            f"size {size} with a vocabulary of {vocab_size}",
            f"{smallest:,} to {largest:,} parameters",
            "choose another size or vocab_size",
        )
    low, high = 0, len(widths) - 1
    while low < high:  # the count grows with the width
        middle = (low + high) // 2
        if count(of_width(widths[middle], vocab_size)[0]).total < wanted:
            low = middle + 1
        else:
            high = middle
    nearby = [of_width(w, vocab_size) for w in widths[max(0, low - 1) : low + 1]]
    config, steps = min(nearby, key=lambda one: abs(math.log(count(one[0]).total / wanted)))
    sizes = count(config)
    steps.append(f"parameters = {sizes.total:,} for {wanted:,.0f} asked; active per token {sizes.active:,}")
    return config, "\n".join(steps)


def of_width(width: int, vocab_size: int) -> tuple[ModelConfig, list[str]]:
    """Every size from one width D, in the family's proportions, with a line of arithmetic for each."""
    attention_layers = max(1, round(width / 448))  # Nano 3: 2688 / 448 = 6
    if attention_layers > 1:
        pattern, drawn = attention_layers * "MEMEM*E" + "ME", f"{attention_layers} x MEMEM*E, then ME"
    else:
        pattern = "MEM*E" if width < 256 else "MEMEM*EME"
        drawn = pattern
    head_dim = 32 if width < 256 else 64 if width < 1024 else 128
    heads = max(2, 2 * round(width / head_dim / 2))
    mamba_dim = 32 if width < 128 else 64
    mamba_heads = 2 * width // mamba_dim
    groups = next(g for g in (8, 4, 2, 1) if g == 1 or (mamba_heads % g == 0 and mamba_heads >= 8 * g))
    state = 32 if width < 256 else 64 if width < 512 else 128
    experts, chosen = next(pair for top, pair in EXPERTS_BY_WIDTH.items() if width < top)
    latent = width // 2 if width < 1024 else width // 4
    std = min(0.02, 0.9 / math.sqrt(width))
    config = ModelConfig(
        pattern=pattern,
        vocab_size=vocab_size,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=head_dim,
        mamba_num_heads=mamba_heads,
        mamba_head_dim=mamba_dim,
        ssm_state_size=state,
        n_groups=groups,
        chunk_size=64 if width < 512 else 128,
        n_routed_experts=experts,
        num_experts_per_tok=chosen,
        moe_latent_size=latent,
        moe_intermediate_size=width,
        moe_shared_expert_intermediate_size=2 * width,
        mtp_pattern="*E",
        initializer_range=round(std, 4),
    )
    return config, [
        f"width D = {width}",
        f"depth: one attention layer per 448 of D, {attention_layers}: {drawn} ({len(pattern)} blocks)",
        f"attention: D / {head_dim}, made even: {heads} heads x {head_dim}, 2 of keys and values",
        f"Mamba-2: 2 D / {mamba_dim} = {mamba_heads} heads x {mamba_dim}, groups {groups}, state {state}",
        f"experts: {experts}, {chosen} per token, hidden D = {width}, latent D / {width // latent} = {latent}; "
        f"shared 2 D = {2 * width}",
        f"draft block: *E; embeddings: 2 x {vocab_size} x D = {2 * vocab_size * width:,}",
    ]


# Below this width: (experts, chosen per token).
EXPERTS_BY_WIDTH = {256: (8, 2), 512: (16, 2), 1024: (32, 4), 2048: (64, 4), 1 << 30: (128, 6)}
