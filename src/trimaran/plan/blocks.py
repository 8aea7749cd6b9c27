"""What one layer costs, counted from the shapes of `model/size.py`: work, traffic, memory and messages per token.

A `Block` is one letter of the pattern (or the draft block's, or the head). Counts are per token of one row and for
the whole layer; `costs.py` divides them among devices. Three kinds of weights, because they are spread differently:

    cut      tensor parallelism divides them (heads and widths); tokens of all tp parts meet every slice
    whole    every tp part has them (norms, router, latent maps); each part's own tokens meet them
    experts  spread over ep, the rest of the copies sharded over what is left

Values "passed" are read or written once in the forward pass by what is no matrix product (norms, activations, gates,
convolution, permutation); values "kept" wait for the backward pass. Attention counts 4 FLOPs per query, key and channel
over half of the row (causal). The scan counts its chunked form: 4 d N for states and outputs, 2 c d + 2 c G N inside
chunks of c (arXiv 2405.21060, section 6).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from trimaran.model.config import ATTENTION, ModelConfig
from trimaran.model.size import DRAFT, Group, block_groups

ROW_CUT = ("out_proj", "o_proj", "down_proj")  # the side that tp cuts is the input; of all others it is the output
WHOLE = ("gate.weight", "latent_proj")
HEAD = "head"


@dataclass(frozen=True)
class Product:
    """A matrix product of every token with weights [outputs, inputs]. cut: "in", "out" or "" (whole on every part)."""

    inputs: int
    outputs: int
    cut: str = ""


@dataclass(frozen=True, eq=False)
class Block:
    """The counts of one layer; see the module. Told apart by identity: there is one per kind and model."""

    letter: str
    width: int
    products: tuple[Product, ...] = ()
    experts: int = 0
    chosen: int = 0
    expert_products: tuple[Product, ...] = ()  # of one expert
    dispatched: int = 0  # values of a token sent to each chosen expert
    cut_weights: int = 0
    whole_weights: int = 0
    expert_weights: int = 0
    key_flops: int = 0  # forward FLOPs per earlier key
    window: int = 0  # 0: the whole row
    heads: int = 0
    kv: int = 0  # values of a token's keys and values
    scan_flops: int = 0  # of the chunked form, which is what runs
    step_flops: int = 0  # of the recurrence, which is what model FLOPs count
    state: int = 0  # values of the recurrent state
    passed_cut: int = 0
    passed_whole: int = 0
    kept_cut: int = 0
    kept_whole: int = 0
    kept_experts: int = 0  # per chosen expert, besides what is sent
    tensor: bool = True  # its input is gathered over tp and its output scattered

    @property
    def weights(self) -> int:
        return self.cut_weights + self.whole_weights + self.expert_weights

    def keys(self, sequence: int) -> float:
        """Mean number of keys that a query of a row sees."""
        if not self.window or self.window >= sequence:
            return (sequence + 1) / 2
        return self.window - self.window * (self.window - 1) / (2 * sequence)

    def forward_flops(self, sequence: int) -> float:
        """Model FLOPs of one token's forward pass in a row of `sequence`: chosen experts, causal attention."""
        dense = sum(2 * p.inputs * p.outputs for p in self.products)
        routed = self.chosen * sum(2 * p.inputs * p.outputs for p in self.expert_products)
        return dense + routed + self.step_flops + self.key_flops * self.keys(sequence)


@lru_cache(maxsize=256)
def block(config: ModelConfig, letter: str) -> Block:
    """The counts of one letter's layer."""
    groups = list(block_groups(config, letter, "", ""))
    dense = [g for g in groups if ".experts." not in g.name]
    whole = [g for g in dense if is_whole(g)]
    width = config.hidden_size
    counts: dict[str, Any] = {
        "letter": letter,
        "width": width,
        "products": tuple(product(g) for g in dense if g.product),
        "whole_weights": sum(g.parameters for g in whole),
        "cut_weights": sum(g.parameters for g in dense) - sum(g.parameters for g in whole),
        "passed_whole": 6 * width,  # norm: in, out; residual: two in, one out; the mixer's output
        "kept_whole": 2 * width,  # the block's input and its norm's output
    }
    if letter == "M":
        counts |= mamba(config)
    elif letter in ATTENTION:
        counts |= attention(config, letter)
    elif letter == "-":
        counts |= feedforward(config, config.intermediate_size)
    else:
        counts |= experts(config, [g for g in groups if ".experts." in g.name])
    return Block(**counts)


def is_whole(group: Group) -> bool:
    name = group.name
    own_norm = len(group.shape) == 1 and ".mixer." not in name
    return own_norm or "gate.e_" in name or any(text in name for text in WHOLE)


def product(group: Group) -> Product:
    outputs, inputs = group.shape
    if is_whole(group):
        return Product(inputs, outputs)
    return Product(inputs, outputs, "in" if any(text in group.name for text in ROW_CUT) else "out")


def gates(config: ModelConfig) -> int:
    """Values per hidden channel that a feed-forward computes before its down map."""
    return 3 if config.ffn == "swiglu" else 2  # up, (gate,) and their activation


def feedforward(config: ModelConfig, hidden: int) -> dict[str, Any]:
    return {"passed_cut": gates(config) * hidden, "kept_cut": gates(config) * hidden}


def attention(config: ModelConfig, letter: str) -> dict[str, Any]:
    queries, kv = config.num_attention_heads * config.head_dim, 2 * config.num_key_value_heads * config.head_dim
    turned = 2 * (queries + kv // 2) if letter in "RW" or config.qk_norm else 0
    return {
        "key_flops": 4 * queries,
        "window": config.sliding_window if letter == "W" else 0,
        "heads": config.num_attention_heads,
        "kv": kv,
        "passed_cut": turned + 2 * queries + kv,
        "kept_cut": 2 * queries + kv + (turned // 2),
    }


def mamba(config: ModelConfig) -> dict[str, Any]:
    inner, conv, state = config.mamba_width, config.conv_width, config.ssm_state_size
    chunk, groups, heads = config.chunk_size, config.n_groups, config.mamba_num_heads
    chunk_states = 2 * inner * state // chunk  # fp32 counts as two values
    return {
        "scan_flops": 4 * inner * state + 2 * chunk * inner + 2 * chunk * groups * state,
        "step_flops": 5 * inner * state,  # as in model/size.py
        "state": inner * state,
        "passed_cut": 2 * conv + (conv + inner + heads) + 2 * chunk_states + 3 * inner,
        "kept_cut": (inner + conv + heads) + conv + chunk_states + 2 * inner,
    }


def experts(config: ModelConfig, groups: list[Group]) -> dict[str, Any]:
    latent, hidden = config.moe_latent_size or config.hidden_size, config.moe_intermediate_size
    shared, count, chosen = (
        config.moe_shared_expert_intermediate_size,
        config.n_routed_experts,
        config.num_experts_per_tok,
    )
    within = 2 * latent if config.moe_latent_size else 0
    inner = gates(config) * shared
    return {
        "experts": count,
        "chosen": chosen,
        "expert_products": tuple(Product(g.shape[1], g.shape[0]) for g in groups),
        "expert_weights": sum(g.parameters for g in groups),
        "dispatched": latent,
        "passed_cut": inner,
        "passed_whole": 6 * config.hidden_size + 2 * count + within,
        "kept_cut": inner,
        "kept_whole": 2 * config.hidden_size + 2 * count + within,
        "kept_experts": gates(config) * hidden,
        "tensor": bool(shared),
    }


@lru_cache(maxsize=64)
def head(config: ModelConfig) -> Block:
    """The map to the vocabulary and its loss, which passes the logits four times in fp32."""
    return Block(
        letter=HEAD,
        width=config.hidden_size,
        products=(Product(config.hidden_size, config.vocab_size, "out"),),
        cut_weights=0 if config.tie_embeddings else config.vocab_size * config.hidden_size,
        whole_weights=config.hidden_size,
        passed_cut=8 * config.vocab_size,
        kept_whole=2 * config.hidden_size,
    )


@lru_cache(maxsize=64)
def draft(config: ModelConfig) -> tuple[Block, ...]:
    """The blocks of the draft (MTP) and the map that joins its two inputs, as one depth passes them."""
    if not config.mtp_pattern:
        return ()
    width = config.hidden_size
    joint = Block(
        letter=DRAFT,
        width=width,
        products=(Product(2 * width, width),),
        whole_weights=2 * width * width + 3 * width,
        passed_whole=8 * width,
        kept_whole=5 * width,
        tensor=False,
    )
    return (joint, *(block(config, letter) for letter in config.mtp_pattern))


def model_flops(config: ModelConfig, sequence: int) -> float:
    """Model FLOPs of training on one token, forward and backward: 3 x forward, causal attention, no recomputation.

    The draft block counts once per trained depth, with its own pass through the head.
    """
    once = sum(block(config, letter).forward_flops(sequence) for letter in config.pattern)
    once += head(config).forward_flops(sequence)
    depth = sum(part.forward_flops(sequence) for part in (*draft(config), head(config))) if config.mtp_pattern else 0
    return 3 * (once + config.mtp_depth * depth)
