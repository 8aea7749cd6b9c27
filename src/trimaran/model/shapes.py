"""Published models that people compare with and that our layers do not compute: sizes only.

Figures are the public config.json of each release (openai/gpt-oss-*, deepseek-ai/DeepSeek-V3, moonshotai/Kimi-K2),
seen again for this page in copies of those files; the totals reproduce the published counts (tests/model/test_presets).
"""

from collections.abc import Iterator

from trimaran.model.size import DRAFT, EMBEDDING, HEAD, NORM, Group, Memory, ShapeOnly

ATTENTION, DENSE, EXPERTS = "attention", "dense feed-forward", "experts"


def gpt_oss(name: str, layers: int, experts: int) -> ShapeOnly:
    """Every other layer sees a window of 128; queries have learned sinks; all maps have biases (arXiv 2508.10925)."""
    width, heads, kv_heads, dim, hidden, chosen, window = 2880, 64, 8, 64, 2880, 4, 128
    groups = [Group(EMBEDDING, "model.embed_tokens.weight", (201088, width))]
    for layer in range(layers):
        at = f"model.layers.{layer}"
        groups += [Group(ATTENTION, f"{at}.input_layernorm.weight", (width,), product=False)]
        for map_, rows in (("q", heads * dim), ("k", kv_heads * dim), ("v", kv_heads * dim)):
            groups += linear(ATTENTION, f"{at}.self_attn.{map_}_proj", rows, width)
        groups += linear(ATTENTION, f"{at}.self_attn.o_proj", width, heads * dim)
        groups += [Group(ATTENTION, f"{at}.self_attn.sinks", (heads,), product=False)]
        groups += [Group(EXPERTS, f"{at}.post_attention_layernorm.weight", (width,), product=False)]
        groups += linear(EXPERTS, f"{at}.mlp.router", experts, width)
        for map_, rows, columns in (("gate_up", 2 * hidden, width), ("down", width, hidden)):
            stack = f"{at}.mlp.experts.{map_}_proj"
            groups += [Group(EXPERTS, stack, (rows, columns), experts, chosen, stacked=True)]
            groups += [Group(EXPERTS, f"{stack}_bias", (rows,), experts, chosen, product=False, stacked=True)]
    groups += [
        Group(NORM, "model.norm.weight", (width,), product=False),
        Group(HEAD, "lm_head.weight", (201088, width)),
    ]
    kv, flops = 2 * kv_heads * dim * layers // 2, 4 * heads * dim * layers // 2
    memory = Memory(
        kv_per_token=kv,
        window_kv_per_token=kv,
        window=window,
        flops_per_key=flops,
        flops_per_window_key=flops,
    )
    drawn = f"{layers} x (attention, experts); attention alternates between a window of {window} and the whole context"
    return ShapeOnly(name, drawn, "attention sinks and biases", tuple(groups), memory)


def linear(part: str, name: str, rows: int, columns: int) -> list[Group]:
    return [Group(part, f"{name}.weight", (rows, columns)), Group(part, f"{name}.bias", (rows,), product=False)]


def gpt_oss_20b() -> ShapeOnly:
    return gpt_oss("gpt-oss-20b", layers=24, experts=32)


def gpt_oss_120b() -> ShapeOnly:
    return gpt_oss("gpt-oss-120b", layers=36, experts=128)


def latent_attention(name: str, vocab: int, heads: int, experts: int, dense: int, draft: bool) -> ShapeOnly:
    """DeepSeek-V3's shape (arXiv 2412.19437): multi-head latent attention, `dense` plain layers, then experts.

    The cache holds the 512 + 64 compressed values per layer; the FLOPs per key are those of the expanded form. The
    draft module counts only what it does not share with the trunk.
    """
    width, layers = 7168, 61
    groups = [Group(EMBEDDING, "model.embed_tokens.weight", (vocab, width))]
    for layer in range(layers):
        groups += latent_layer(f"model.layers.{layer}", heads, 0 if layer < dense else experts)
    groups += [Group(NORM, "model.norm.weight", (width,), product=False), Group(HEAD, "lm_head.weight", (vocab, width))]
    if draft:
        at = f"model.layers.{layers}"
        inside = [*latent_layer(at, heads, experts), Group(DRAFT, f"{at}.eh_proj.weight", (width, 2 * width))]
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            inside.append(Group(DRAFT, f"{at}.{norm}.weight", (width,), product=False))
        groups += [Group(DRAFT, g.name, g.shape, g.copies, g.used, g.product) for g in inside]
    memory = Memory(
        kv_per_token=layers * (512 + 64),
        draft_kv_per_token=(512 + 64) * draft,
        flops_per_key=2 * heads * (128 + 64 + 128) * layers,
    )
    drawn = f"{layers} layers of latent attention; {dense} dense feed-forward, then experts"
    return ShapeOnly(name, drawn, "multi-head latent attention", tuple(groups), memory)


def latent_layer(at: str, heads: int, experts: int) -> Iterator[Group]:
    """One layer; experts 0: a dense feed-forward."""
    width, q_rank, kv_rank, rope, plain, value = 7168, 1536, 512, 64, 128, 128
    attention: dict[str, tuple[int, ...]] = {
        "q_a_proj": (q_rank, width),
        "q_a_layernorm": (q_rank,),
        "q_b_proj": (heads * (plain + rope), q_rank),
        "kv_a_proj_with_mqa": (kv_rank + rope, width),
        "kv_a_layernorm": (kv_rank,),
        "kv_b_proj": (heads * (plain + value), kv_rank),
        "o_proj": (width, heads * value),
    }
    yield Group(ATTENTION, f"{at}.input_layernorm.weight", (width,), product=False)
    for name, shape in attention.items():
        yield Group(ATTENTION, f"{at}.self_attn.{name}.weight", shape, product=len(shape) == 2)
    part = EXPERTS if experts else DENSE
    yield Group(part, f"{at}.post_attention_layernorm.weight", (width,), product=False)
    maps = {"gate_proj": (0, 1), "up_proj": (0, 1), "down_proj": (1, 0)}
    for name, (rows, columns) in maps.items():
        dense, expert = (18432, width), (2048, width)
        if not experts:
            yield Group(DENSE, f"{at}.mlp.{name}.weight", (dense[rows], dense[columns]))
            continue
        shape = (expert[rows], expert[columns])
        yield Group(EXPERTS, f"{at}.mlp.experts.*.{name}.weight", shape, experts, 8)
        yield Group(EXPERTS, f"{at}.mlp.shared_experts.{name}.weight", shape)
    if experts:
        yield Group(EXPERTS, f"{at}.mlp.gate.weight", (experts, width))
        yield Group(EXPERTS, f"{at}.mlp.gate.e_score_correction_bias", (experts,), product=False)


def deepseek_v3() -> ShapeOnly:
    return latent_attention("deepseek-v3", vocab=129280, heads=128, experts=256, dense=3, draft=True)


def kimi_k2() -> ShapeOnly:
    return latent_attention("kimi-k2", vocab=163840, heads=64, experts=384, dense=1, draft=False)
