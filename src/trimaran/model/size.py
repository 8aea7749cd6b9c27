"""How large a model is, from its shapes alone: parameters, bytes of state, FLOPs. Allocates nothing.

Conventions. `active`: what one token touches, both embedding matrices counted, `num_experts_per_tok` routed experts
per layer, the draft block (MTP) left out; reports that count the input table as a look-up subtract `embedding`. FLOPs:
two per multiply-accumulate of the forward pass of one token, attention over `context` earlier tokens, the recurrence
in its step form; norms, softmax and activations are left out. Bytes of state: keys, values and the convolution's tail
in bf16, the recurrent state in fp32.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from trimaran.model.config import ATTENTION, LETTERS, ModelConfig

PARTS = {letter: f"{letter}  {meaning}" for letter, meaning in LETTERS.items()}
EMBEDDING, HEAD, NORM, DRAFT = "embedding", "head", "final norm", "draft block (MTP)"


@dataclass(frozen=True)
class Group:
    """Checkpoint tensors of one name and shape.

    copies: how many there are (experts), in one tensor if `stacked`; used: how many of them one token passes through;
    product: a token is multiplied by it, at 2 FLOPs per element.
    """

    part: str
    name: str
    shape: tuple[int, ...]
    copies: int = 1
    used: int = 1
    product: bool = True
    stacked: bool = False

    @property
    def parameters(self) -> int:
        return prod(self.shape) * self.copies


@dataclass(frozen=True)
class Memory:
    """What the layers keep, in numbers of values, and the work that grows with the context or needs no weights."""

    kv_per_token: int = 0  # full attention
    draft_kv_per_token: int = 0
    window_kv_per_token: int = 0  # sliding windows, which stop growing after `window` tokens
    window: int = 0
    ssm_per_sequence: int = 0
    conv_per_sequence: int = 0
    flops_per_key: int = 0
    flops_per_window_key: int = 0
    flops_fixed: int = 0


@dataclass(frozen=True)
class Sizes:
    """See the module's conventions. `parts`: part -> (parameters, active parameters, tensors)."""

    total: int
    main: int  # without the draft block
    active: int
    embedding: int  # the input table's share of `total`
    tensors: int
    parts: dict[str, tuple[int, int, int]]
    memory: Memory
    flops_weights: int

    @property
    def draft(self) -> int:
        return self.total - self.main

    def kv_bytes_per_token(self, value_bytes: int = 2) -> int:
        """Growth of keys and values per token of full-attention layers, without the draft block."""
        return self.memory.kv_per_token * value_bytes

    def draft_kv_bytes_per_token(self, value_bytes: int = 2) -> int:
        return self.memory.draft_kv_per_token * value_bytes

    def window_bytes_per_sequence(self, value_bytes: int = 2) -> int:
        """Keys and values of sliding-window layers once their windows are full."""
        return self.memory.window_kv_per_token * self.memory.window * value_bytes

    def ssm_bytes_per_sequence(self, value_bytes: int = 4) -> int:
        return self.memory.ssm_per_sequence * value_bytes

    def conv_bytes_per_sequence(self, value_bytes: int = 2) -> int:
        return self.memory.conv_per_sequence * value_bytes

    def state_bytes(self, context: int) -> int:
        """All state of one sequence of `context` tokens, without the draft block."""
        window = self.memory.window_kv_per_token * min(context, self.memory.window) * 2
        growing = self.kv_bytes_per_token() * context
        return growing + window + self.ssm_bytes_per_sequence() + self.conv_bytes_per_sequence()

    def flops_per_token(self, context: int = 0) -> int:
        """Forward FLOPs of one token that looks back on `context` tokens."""
        memory = self.memory
        seen = memory.flops_per_key * context + memory.flops_per_window_key * min(context, memory.window)
        return self.flops_weights + memory.flops_fixed + seen

    def bytes(self, value_bytes: int = 2) -> int:
        return self.total * value_bytes


@dataclass(frozen=True)
class ShapeOnly:
    """A published model that is sized here but not computed: `why` says what our layers lack."""

    name: str
    layers: str
    why: str
    groups: tuple[Group, ...]
    memory: Memory
    tied: bool = False


def count(model: ModelConfig | ShapeOnly) -> Sizes:
    """The sizes of a model that is never built."""
    if isinstance(model, ShapeOnly):
        return add_up(model.groups, model.memory, model.tied)
    return add_up(groups(model), memory(model), model.tie_embeddings)


def add_up(model_groups: Iterable[Group], kept: Memory, tied: bool) -> Sizes:
    parts: dict[str, tuple[int, int, int]] = {}
    flops = 0
    for group in model_groups:
        active = 0 if group.part == DRAFT else prod(group.shape) * group.used
        tensors = 1 if group.stacked else group.copies
        before = parts.get(group.part, (0, 0, 0))
        parts[group.part] = (before[0] + group.parameters, before[1] + active, before[2] + tensors)
        # A look-up multiplies nothing, unless the same table also serves as the head.
        multiplied = tied if group.part == EMBEDDING else group.product
        flops += 2 * active * multiplied
    total, used, files = (sum(column) for column in zip(*parts.values()))
    draft = parts.get(DRAFT, (0, 0, 0))[0]
    return Sizes(total, total - draft, used, parts[EMBEDDING][0], files, parts, kept, flops)


def groups(config: ModelConfig) -> Iterator[Group]:
    """Every tensor of the checkpoint, grouped, in the order of the model."""
    width = config.hidden_size
    yield Group(EMBEDDING, "backbone.embeddings.weight", (config.vocab_size, width))
    for index, letter in enumerate(config.pattern):
        yield from block_groups(config, letter, f"backbone.layers.{index}", PARTS[letter])
    if config.residual == "prenorm":
        yield Group(NORM, "backbone.norm_f.weight", (width,), product=False)
    if not config.tie_embeddings:
        yield Group(HEAD, "lm_head.weight", (config.vocab_size, width))
    if config.residual == "ngpt":
        yield Group(HEAD, "lm_head.s_z.weight", (config.vocab_size,), product=False)
    for index, letter in enumerate(config.mtp_pattern):
        block = f"mtp.layers.{index}"
        yield from block_groups(config, letter, block, DRAFT)
        if index == 0:
            yield Group(DRAFT, f"{block}.enorm.weight", (width,), product=False)
            yield Group(DRAFT, f"{block}.hnorm.weight", (width,), product=False)
            yield Group(DRAFT, f"{block}.eh_proj.weight", (width, 2 * width))
        if index == len(config.mtp_pattern) - 1:
            yield Group(DRAFT, f"{block}.final_layernorm.weight", (width,), product=False)


def block_groups(config: ModelConfig, letter: str, block: str, part: str) -> Iterator[Group]:
    """The tensors of one layer: of the kind `letter`, named under `block`, counted as `part`."""
    own = "norm" if config.residual == "prenorm" else "alpha"
    yield Group(part, f"{block}.{own}.weight", (config.hidden_size,), product=False)
    if letter == "M":
        shapes = mamba_shapes(config)
    elif letter in ATTENTION:
        shapes = attention_shapes(config)
    elif letter == "-":
        shapes = ffn_shapes(config, config.intermediate_size, config.hidden_size)
    else:
        yield from expert_groups(config, f"{block}.mixer", part)
        shapes = moe_shapes(config)
    if config.residual == "ngpt":
        shapes |= sphere_shapes(config, letter)
    for name, shape in shapes.items():
        yield Group(part, f"{block}.mixer.{name}", shape, product=len(shape) == 2)


def sphere_shapes(config: ModelConfig, letter: str) -> dict[str, tuple[int, ...]]:
    """The learned vectors that nGPT adds to a mixer."""
    if letter == "M":
        return {"s_in.weight": mamba_shapes(config)["in_proj.weight"][:1]}
    if letter in ATTENTION:
        return {"s_qk.weight": (config.num_key_value_heads * config.head_dim,)}
    gates = ("s_u", "s_v") if config.ffn == "swiglu" else ("s_u",)
    return {f"{name}.weight": (config.intermediate_size,) for name in gates}


def mamba_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    heads, inner, conv = config.mamba_num_heads, config.mamba_width, config.conv_width
    shapes: dict[str, tuple[int, ...]] = {
        "in_proj.weight": (inner + conv + heads, config.hidden_size),
        "conv1d.weight": (conv, 1, config.conv_kernel),
    }
    if config.use_conv_bias:
        shapes["conv1d.bias"] = (conv,)
    return shapes | {
        "A_log": (heads,),
        "D": (heads,),
        "dt_bias": (heads,),
        "norm.weight": (inner,),
        "out_proj.weight": (config.hidden_size, inner),
    }


def attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    width, dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    shapes: dict[str, tuple[int, ...]] = {
        "q_proj.weight": (queries, width),
        "k_proj.weight": (keys, width),
        "v_proj.weight": (keys, width),
        "o_proj.weight": (width, queries),
    }
    if config.qk_norm:
        shapes |= {"q_norm.weight": (dim,), "k_norm.weight": (dim,)}
    return shapes


def ffn_shapes(config: ModelConfig, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"up_proj.weight": (hidden, width), "down_proj.weight": (width, hidden)}
    if config.ffn == "swiglu":
        shapes["gate_proj.weight"] = (hidden, width)
    return shapes


def expert_groups(config: ModelConfig, mixer: str, part: str) -> Iterator[Group]:
    inner = config.moe_latent_size or config.hidden_size
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    for name, shape in ffn_shapes(config, config.moe_intermediate_size, inner).items():
        yield Group(part, f"{mixer}.experts.*.{name}", shape, experts, chosen)


def moe_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """All of an expert block but its routed experts."""
    width, latent, shared = config.hidden_size, config.moe_latent_size, config.moe_shared_expert_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"gate.weight": (config.n_routed_experts, width)}
    if config.router == "sigmoid":
        shapes["gate.e_score_correction_bias"] = (config.n_routed_experts,)
    if shared:
        inside = ffn_shapes(config, shared, width)
        shapes |= {f"shared_experts.{name}": shape for name, shape in inside.items()}
    if latent:
        shapes |= {"fc1_latent_proj.weight": (latent, width), "fc2_latent_proj.weight": (width, latent)}
    return shapes


def memory(config: ModelConfig) -> Memory:
    """State and weightless work of all layers."""
    mambas = config.pattern.count("M")
    full = sum(config.pattern.count(letter) for letter in "*R")
    windows = config.pattern.count("W")
    kv = 2 * config.num_key_value_heads * config.head_dim
    key_flops = 4 * config.num_attention_heads * config.head_dim  # scores and weighted values
    cells = config.mamba_width * config.ssm_state_size
    # Per cell of the state: decay 1, write 2, read 2; then D x, and the convolution at 2 per tap.
    step = 5 * cells + 2 * config.mamba_width + 2 * config.conv_kernel * config.conv_width
    return Memory(
        kv_per_token=full * kv,
        draft_kv_per_token=sum(config.mtp_pattern.count(letter) for letter in ATTENTION) * kv,
        window_kv_per_token=windows * kv,
        window=config.sliding_window if windows else 0,
        ssm_per_sequence=mambas * cells,
        conv_per_sequence=mambas * config.conv_width * (config.conv_kernel - 1),
        flops_per_key=full * key_flops,
        flops_per_window_key=windows * key_flops,
        flops_fixed=mambas * step,
    )
