"""What a model is: one pattern string, a few sizes, a few switches.

One letter is one pre-norm residual block, x + mixer(norm(x)):

    M  Mamba-2                        E  experts (latent when moe_latent_size is set)
    *  attention without positions    -  dense feed-forward
    R  full attention with RoPE       W  sliding-window attention with RoPE

Fields carry the hub's names where the hub has one, so that config.json and this page read alike.
"""

from typing import Literal

from pydantic import Field, model_validator

from trimaran.config import Settings
from trimaran.errors import Refusal

LETTERS = {
    "M": "Mamba-2",
    "*": "attention without positions",
    "E": "experts",
    "-": "dense feed-forward",
    "W": "sliding-window attention with RoPE",
    "R": "full attention with RoPE",
}
ATTENTION = "*RW"  # letters that keep keys and values


class RopeScaling(Settings):
    """Llama-3.1's frequency rescaling (`rope_type: llama3`): low frequencies divided by `factor`, a ramp between."""

    factor: float = Field(gt=0)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    original_max_position_embeddings: int = Field(8192, gt=0)


class ModelConfig(Settings):
    """Sizes and switches of one model. Counts are numbers of things; widths are in channels."""

    pattern: str = Field(min_length=1)
    vocab_size: int = Field(131072, gt=0)
    hidden_size: int = Field(gt=0)

    # attention: * R W
    num_attention_heads: int = Field(32, gt=0)
    num_key_value_heads: int = Field(8, gt=0)
    head_dim: int = Field(128, gt=0)
    qk_norm: bool = False
    rope_theta: float = Field(10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    sliding_window: int = Field(512, gt=0)

    # Mamba-2: M
    mamba_num_heads: int = Field(128, gt=0)
    mamba_head_dim: int = Field(64, gt=0)
    ssm_state_size: int = Field(128, gt=0)
    n_groups: int = Field(8, gt=0)
    conv_kernel: int = Field(4, gt=1)
    use_conv_bias: bool = True
    chunk_size: int = Field(128, gt=0)  # a tile of the computation, not of the meaning
    time_step_min: float = 0.001  # initialisation only: dt is never clamped
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4

    # feed-forward: - and E
    ffn: Literal["relu2", "swiglu"] = "relu2"
    intermediate_size: int = Field(21504, gt=0)
    n_routed_experts: int = Field(8, gt=0)
    num_experts_per_tok: int = Field(2, gt=0)
    moe_intermediate_size: int = Field(7688, gt=0)
    moe_shared_expert_intermediate_size: int = Field(7688, ge=0)  # 0: no shared expert
    moe_latent_size: int | None = Field(None, gt=0)
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = Field(1, gt=0)
    topk_group: int = Field(1, gt=0)

    # the whole model
    residual: Literal["prenorm", "ngpt"] = "prenorm"  # ngpt: hidden vectors on the unit sphere, see model/sphere.py
    tie_embeddings: bool = False
    mtp_pattern: str = ""  # the block that predicts one token further, e.g. "*E"; empty: none
    mtp_depth: int = Field(1, gt=0)  # depths trained; the weights are the same at every depth
    layer_norm_epsilon: float = Field(1e-5, ge=0)
    initializer_range: float = Field(0.02, gt=0)
    max_position_embeddings: int = Field(4096, gt=0)  # a note about training: nothing depends on it
    pad_token_id: int | None = Field(0, ge=0)  # None, here and below: the model has no such token
    bos_token_id: int | None = Field(1, ge=0)
    eos_token_id: int | None = Field(2, ge=0)
    stop_token_ids: tuple[int, ...] = ()  # further ids that end a text, where the hub lists several, as in [2, 11]

    @property
    def mamba_width(self) -> int:
        """Channels of x and z inside a Mamba-2 mixer."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_width(self) -> int:
        """Channels that pass the causal convolution: x, B and C together."""
        return self.mamba_width + 2 * self.n_groups * self.ssm_state_size

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        check_letters("pattern", self.pattern, LETTERS)
        # The draft block has keys and values but no recurrent state (facts of the released models), so drafting rolls
        # back by trimming alone.
        check_letters("mtp_pattern", self.mtp_pattern, {k: v for k, v in LETTERS.items() if k != "M"})
        letters = set(self.pattern + self.mtp_pattern)
        if letters & set(ATTENTION):
            check_divides(
                "num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads
            )
        if letters & set("RW"):
            check_divides("head_dim", self.head_dim, "2 (rotary pairs)", 2)
        if "M" in letters:
            check_divides("mamba_num_heads", self.mamba_num_heads, "n_groups", self.n_groups)
        if "E" in letters:
            check_router(self)
        if self.residual == "ngpt":
            check_sphere(self)
        return self


def check_letters(field: str, pattern: str, allowed: dict[str, str]) -> None:
    for place, letter in enumerate(pattern):
        if letter not in allowed:
            known = ", ".join(f"{k} ({v})" for k, v in allowed.items())
            raise Refusal(
                f"{field} has {letter!r} at place {place}", known, f"correct the letter in {field} = {pattern!r}"
            )


def check_divides(field: str, value: int, divisor_field: str, divisor: int) -> None:
    if value % divisor:
        near = max(divisor, value // divisor * divisor)
        raise Refusal(f"{field} = {value}", f"a multiple of {divisor_field} = {divisor}", f"try {field} = {near}")


def check_sphere(config: ModelConfig) -> None:
    """nGPT says nothing of experts or of a draft block, forbids tied embeddings, and has a q-k norm of its own."""
    for field, wanted in (("mtp_pattern", ""), ("tie_embeddings", False), ("qk_norm", False)):
        if getattr(config, field) != wanted:
            found = f'{field} = {getattr(config, field)!r} with residual = "ngpt"'
            raise Refusal(found, repr(wanted), f'set {field} = {wanted!r} or residual = "prenorm"')
    if "E" in config.pattern:
        raise Refusal('experts (E) with residual = "ngpt"', "M * R W -", 'use - or set residual = "prenorm"')


def check_router(config: ModelConfig) -> None:
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    check_divides("n_routed_experts", experts, "n_group", config.n_group)
    if config.topk_group > config.n_group:
        raise Refusal(f"topk_group = {config.topk_group}", f"1 to n_group = {config.n_group}", "lower topk_group")
    reachable = experts // config.n_group * config.topk_group
    if chosen > reachable:
        raise Refusal(
            f"num_experts_per_tok = {chosen}",
            f"1 to {reachable}, the experts in the topk_group chosen groups",
            "lower num_experts_per_tok or raise n_routed_experts",
        )
