"""Published training speeds, with what is known of how each was run: what `planner.py` fits to and predicts.

Units: TFLOP/s per GPU as published. Flops per step follow each publication's own formula, since only the step's time is
compared. A micro-batch or a number of virtual stages of 0 was not published: the planner's own best is taken there.
"""

from dataclasses import dataclass, replace

from trimaran.model.config import ModelConfig
from trimaran.model.presets import preset
from trimaran.plan.blocks import model_flops
from trimaran.plan.layout import Layout
from trimaran.plan.practice import Practice

# Megatron-LM of 2021: no sequence parallelism, unfused attention, everything recomputed, fp16 with fp32 masters.
MEGATRON_2021 = Practice(
    sequence_parallel=False,
    fused_attention=False,
    shards_weights=False,
    regathers=False,
    sums_last=False,
    hides_data=False,
    even_stages=True,
    scan_by_state=False,
    weight=2,
    gradient=2,
    optimizer=12,
    message=2,
    summed=2,
    loss_chunk=0,
)
# Megatron-Core of 2024 with --overlap-grad-reduce --overlap-param-gather --tp-comm-overlap, distributed optimizer.
MEGATRON_2024 = replace(
    MEGATRON_2021,
    sequence_parallel=True,
    fused_attention=True,
    hides_data=True,
    hides_tensor=True,
    hides_pipeline=True,
    keeps_gathered=False,
    gradient=4,
    summed=4,
)
# Llama 3 (arXiv 2407.21783, 3.3.2): optimizer and gradients sharded, weights not gathered again, balanced CP.
META = replace(MEGATRON_2024, hides_tensor=False, balanced_context=True)


@dataclass(frozen=True)
class Row:
    """One published run."""

    table: str
    name: str
    config: ModelConfig
    hardware: str
    practice: Practice
    layout: Layout
    sequence: int
    batch: int
    published: float  # TFLOP/s per GPU
    flops: float  # of a step, as published
    open: bool = False  # micro-batch and virtual stages were not published


def gpt(layers: int, width: int, heads: int, vocabulary: int) -> ModelConfig:
    """A GPT of Megatron's: multi-head attention, a feed-forward of four widths, tied embeddings."""
    return ModelConfig(
        pattern="*-" * layers,
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        tie_embeddings=True,
    )


def megatron_flops(layers: int, width: int, vocabulary: int, sequence: int, batch: int, passes: int) -> float:
    """24 x passes B s l h^2 (1 + s / 6h + V / (4 passes l h)): passes 4 with full recomputation, 3 without."""
    scores, head = sequence / (6 * width), vocabulary / (4 * passes * layers * width)
    return 24 * passes * batch * sequence * layers * width**2 * (1 + scores + head)


# billions | layers | hidden | heads | tp | pp | GPUs | batch | micro-batch | layers a virtual stage (0: all) | TFLOP/s
# arXiv 2104.04473, table 1; micro-batches and virtual stages: Megatron-LM, examples/sc21/run_table_1.sh.
SC21 = (
    (1.7, 24, 2304, 24, 1, 1, 32, 512, 16, 0, 137),
    (3.6, 30, 3072, 32, 2, 1, 64, 512, 16, 0, 138),
    (7.5, 36, 4096, 32, 4, 1, 128, 512, 16, 0, 142),
    (18.4, 40, 6144, 48, 8, 1, 256, 1024, 8, 0, 135),
    (39.1, 48, 8192, 64, 8, 2, 512, 1536, 4, 0, 138),
    (76.1, 60, 10240, 80, 8, 4, 1024, 1792, 2, 5, 140),
    (145.6, 80, 12288, 96, 8, 8, 1536, 2304, 2, 5, 148),
    (310.1, 96, 16384, 128, 8, 16, 1920, 2160, 1, 3, 155),
    (529.6, 105, 20480, 128, 8, 35, 2520, 2520, 1, 1, 163),
    (1008.0, 128, 25600, 160, 8, 64, 3072, 3072, 1, 0, 163),
)
# billions | heads | hidden | layers | tp | pp | dp | batch | TFLOP/s. Megatron-LM README 2024: sequence 4096, V 131072.
WEAK = (
    (1.7, 16, 2048, 24, 1, 1, 48, 192, 408.8),
    (7.1, 32, 4096, 30, 2, 1, 48, 192, 465.9),
    (16, 48, 6144, 32, 4, 1, 48, 192, 489.1),
    (32, 56, 7168, 48, 8, 1, 48, 384, 459.6),
    (70, 64, 8192, 84, 8, 2, 48, 384, 419.7),
    (119, 80, 10240, 92, 8, 4, 48, 768, 420.5),
    (177, 96, 12288, 96, 8, 6, 48, 1152, 432.8),
    (314, 128, 16384, 96, 8, 8, 48, 1152, 474.4),
    (462, 144, 18432, 112, 8, 16, 48, 3072, 459.9),
)
# GPUs | dp | MFU, a rounded percentage. The same README: 177B, tp 8, pp 6, batch 1152.
STRONG = ((96, 2, 0.47), (4608, 96, 0.42))
# GPUs | cp | dp | sequence | rows per dp | TFLOP/s. arXiv 2407.21783, table 4; tp 8, pp 16. Row 3: dp 8 multiplies.
LLAMA = ((8192, 1, 64, 8192, 32, 430.0), (16384, 1, 128, 8192, 16, 400.0), (16384, 16, 8, 131072, 16, 380.0))


def sc21() -> list[Row]:
    rows = []
    for size, layers, width, heads, tp, pp, gpus, batch, micro, chunk, speed in SC21:
        config = gpt(layers, width, heads, 51200)
        virtual = layers // pp // chunk if chunk else 1
        layout = Layout(gpus // tp // pp, 1, 1, tp, pp, 1, micro, virtual, "*-")
        practice = replace(MEGATRON_2021, hides_data=pp == 1)  # the script takes torch's DDP there, Megatron's own else
        flops = megatron_flops(layers, width, 51200, 2048, batch, 4)
        rows.append(Row("SC21, A100", f"{size}B", config, "a100", practice, layout, 2048, batch, speed, flops))
    return rows


def weak() -> list[Row]:
    rows = []
    for size, heads, width, layers, tp, pp, dp, batch, speed in WEAK:
        config = gpt(layers, width, heads, 131072)
        layout = Layout(1, dp, 1, tp, pp)
        flops = megatron_flops(layers, width, 131072, 4096, batch, 3)
        name = "weak scaling, H100"
        rows.append(Row(name, f"{size}B", config, "h100", MEGATRON_2024, layout, 4096, batch, speed, flops, True))
    return rows


def strong() -> list[Row]:
    """For the trend alone: the shares are rounded, so these rows are in no fit."""
    rows = []
    for gpus, dp, share in STRONG:
        config, layout = gpt(96, 12288, 96, 131072), Layout(1, dp, 1, 8, 6)
        flops = megatron_flops(96, 12288, 131072, 4096, 1152, 3)
        name, speed = f"177B, {gpus} GPUs", round(share * 989.4, 1)
        row = Row("strong scaling, H100", name, config, "h100", MEGATRON_2024, layout, 4096, 1152, speed, flops, True)
        rows.append(row)
    return rows


def llama() -> list[Row]:
    """The count of flops is not stated; causal attention is taken, as NVIDIA's later tables have it."""
    config, rows = preset("llama3-405b"), []
    assert isinstance(config, ModelConfig)
    for gpus, cp, dp, sequence, each, speed in LLAMA:
        layout = Layout(1, dp, cp, 8, 16)
        flops = model_flops(config, sequence) * sequence * each * dp
        name = f"405B, {gpus} GPUs, {sequence // 1024}k"
        rows.append(Row("Llama 3, H100", name, config, "h100", META, layout, sequence, each * dp, speed, flops, True))
    return rows


def published() -> list[Row]:
    return [*sc21(), *weak(), *llama()]


# NeMo AutoModel: weights and gradients sharded, bf16 messages, tokens sent once per node (DeepEP).
AUTOMODEL = Practice(message=2, dispatch_once=True, keeps_gathered=False, stream=2)
# preset | changes | GPUs | rows | micro-batch | tokens/s/GPU. H100, bf16, sequence 4096, fsdp = ep = GPUs.
# NeMo AutoModel's performance summary, 26.02 and October 2025; Super is taken without its draft block, as the published
# ratio of TFLOP/s and tokens/s says.
UNSEEN = (
    ("nano-3", {}, 8, 512, 4, 16789),
    ("qwen3-30b-a3b", {}, 8, 512, 4, 12040),
    ("super-3", {"mtp_pattern": ""}, 64, 512, 2, 4497),
)


def unseen() -> list[tuple[Row, float]]:
    """Runs of models with experts, and their published tokens/s per GPU."""
    rows = []
    for name, changes, gpus, batch, micro, speed in UNSEEN:
        config = preset(name)
        assert isinstance(config, ModelConfig)
        layout = Layout(fsdp=gpus, ep=gpus, micro_batch=micro)
        rows.append(
            (Row("AutoModel", name, config.replace(**changes), "h100", AUTOMODEL, layout, 4096, batch, 0, 0), speed)
        )
    return rows
