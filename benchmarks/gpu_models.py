"""The cases `nano`, `qwen`, `transformers` and `train` of benchmarks/gpu.py: whole models with random weights.

Decoding is engine.captured's step over a memory whose states are filled directly, as long as the context says; its
share is of the bound that memory sets (gpu_timing.step_bound). Before anything is timed, the twins are compared with
the references on a short prompt and three steps.
"""

import gc
import tempfile
from collections.abc import Sequence as Many
from typing import Any

import torch
from cpu_sides import load_transformers, random_tokens
from gpu_timing import AGREE, FLOPS, Scene, apart, red, seconds, step_bound, timed
from torch import Tensor

from trimaran.engine.captured import CapturedStep
from trimaran.engine.paged import Segment
from trimaran.engine.pages import Memory, Sequence
from trimaran.engine.plain import prefill
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import HybridModel, build
from trimaran.model.presets import nano_3, qwen3_30b_a3b
from trimaran.model.size import count
from trimaran.ops import backend
from trimaran.ops.loss import cross_entropy

BATCHES, CONTEXT = (1, 8, 64, 256), 8192
LENGTHS = (8192, 16384, 24576)  # at which steps of 8k in / 16k out are sampled
STEPS = 16  # per measurement
SPARE = 6 << 30  # bytes left alone beside weights and memory
TRAINED = ModelConfig(  # 2 billion, latent experts
    pattern="MEMEM*E" * 3 + "ME",
    vocab_size=65536,
    hidden_size=2048,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=128,
    mamba_num_heads=64,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=8,
    n_routed_experts=64,
    num_experts_per_tok=4,
    moe_latent_size=1024,
    moe_intermediate_size=1024,
    moe_shared_expert_intermediate_size=2048,
)


def shrunk(config: ModelConfig) -> ModelConfig:
    """The same kinds of layers at toy size."""
    toy: dict[str, Any] = {"hidden_size": 16, "vocab_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    toy |= {"head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 2}
    toy |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 16}
    toy |= {"moe_latent_size": 8 if config.moe_latent_size else None, "chunk_size": 16}
    toy |= {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    if config.moe_shared_expert_intermediate_size:
        toy["moe_shared_expert_intermediate_size"] = 16
    pattern = "MEM*E" if "M" in config.pattern else "RERE"
    return config.replace(pattern=pattern, **toy)


def built(config: ModelConfig, scene: Scene) -> HybridModel:
    model = build(shrunk(config) if scene.small else config, device=scene.device, dtype=scene.dtype)
    return model.eval().requires_grad_(False)


def room_for(context: int, scene: Scene) -> int:
    """Tokens of a row that begins at `context` and makes all measurements."""
    return context + STEPS * (scene.repeat + 1) + 2


def filled(model: HybridModel, rows: int, context: int, room: int) -> tuple[Memory, list[Sequence]]:
    """A memory of `rows` sequences that seem to have read `context` tokens, and may grow to `room`."""
    memory = Memory(model, rows=rows, pages=rows * -(-room // 32))
    sequences = []
    for _ in range(rows):
        sequence = memory.open()
        assert sequence is not None and memory.reserve(sequence, room)
        sequence.length = context
        sequences.append(sequence)
    for held in (memory.kv, memory.ssm, memory.tail):
        held.normal_(0, 0.5)
    return memory, sequences


def fits(model: HybridModel, rows: int, context: int, scene: Scene) -> bool:
    if scene.device != "cuda":
        return True
    gc.collect()
    torch.cuda.empty_cache()
    return rows * count(model.config).state_bytes(room_for(context, scene)) + SPARE < torch.cuda.mem_get_info()[0]


@torch.no_grad()
def trusted(model: HybridModel, scene: Scene, setting: str) -> Tensor:
    """Logits behind a prompt of three blocks and behind each of three steps, with the twins that `setting` allows.

    The reference's steps are ordinary passes: it may ask things of the device, which a captured step must not."""
    tokens = random_tokens(1, 71, model.config.vocab_size).to(scene.device)
    with backend.using(setting):
        memory = Memory(model, rows=2, pages=8)
        sequence = memory.open()
        assert sequence is not None and memory.reserve(sequence, 80)
        logits = []
        for part in tokens[:, :68].split(32, 1):
            state = memory.view([Segment(sequence, part.shape[1])])
            logits.append(model(part, state=state)[0, -1:])
        step = CapturedStep(model, memory, 1, 80)
        for token in tokens[0, 68:].split(1):
            if setting == "reference":
                logits.append(model(token[None], state=memory.view([Segment(sequence, 1)]))[0])
            else:
                logits.append(step(token, [sequence]).clone())
    return torch.cat(logits)


def step_seconds(model: HybridModel, rows: int, context: int, scene: Scene) -> float:
    """Seconds of one decoding step, each token chosen by the one before."""
    room = room_for(context, scene)
    memory, sequences = filled(model, rows, context, room)
    step = CapturedStep(model, memory, rows, room)
    tokens = torch.ones(rows, dtype=torch.long, device=scene.device)
    with backend.using(scene.backend):
        for _ in range(2):  # compiles, then captures
            tokens = step(tokens, sequences).argmax(-1)

        def work() -> None:
            token = tokens
            for _ in range(STEPS):
                token = step(token, sequences).argmax(-1)

        return seconds(work, scene) / STEPS


def decoding(model: HybridModel, batches: Many[int], context: int, scene: Scene) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for batch in batches:
        found: dict[str, Any] = {"work": "decode", "batch": batch, "context": context}
        if not fits(model, batch, context, scene):
            rows.append(found | {"red": "does not fit"})
            continue
        each = step_seconds(model, batch, context, scene)
        bound = step_bound(model.config, batch, context)
        rows.append(found | {"tokens_per_s": batch / each, "bound": bound, "share": batch / each / bound})
    return rows


def prefilling(model: HybridModel, length: int, scene: Scene) -> dict[str, Any]:
    tokens = random_tokens(1, length, model.config.vocab_size).to(scene.device)

    def work() -> object:
        with torch.no_grad(), backend.using(scene.backend):
            return prefill(model, tokens.tolist())

    each = seconds(work, scene)
    share = length * count(model.config).flops_per_token(length // 2) / each / FLOPS
    return {"work": "prefill", "length": length, "seconds": each, "tokens_per_s": length / each, "share": share}


def long_answers(model: HybridModel, prompt: float, scene: Scene) -> dict[str, Any]:
    """8k in / 16k out at the largest batch that fits: steps sampled at three lengths, a trapezoid between them."""
    lengths = (24, 48, 72) if scene.small else LENGTHS
    batches = (2,) if scene.small else (256, 128, 64, 32, 16, 8)
    batch = next(one for one in batches if fits(model, one, lengths[-1], scene))
    steps = [step_seconds(model, batch, length, scene) for length in lengths]
    width = lengths[1] - lengths[0]
    total = batch * prompt + width * (steps[0] / 2 + steps[1] + steps[2] / 2)
    written = batch * (lengths[2] - lengths[0])
    return {"work": "8k in, 16k out", "batch": batch, "step_s": steps, "tokens_per_s": written / total}


def served(config: ModelConfig, scene: Scene) -> list[dict[str, Any]]:
    """Prefill, decoding and long answers of one model, behind its check."""
    model = built(config, scene)
    distance = apart(trusted(model, scene, scene.backend), trusted(model, scene, "reference"))
    if not distance <= AGREE[scene.dtype]:
        return [{"work": "check", "apart": distance} | red(distance, AGREE[scene.dtype])]
    first = prefilling(model, 40 if scene.small else CONTEXT, scene)
    rows = decoding(model, (1, 2) if scene.small else BATCHES, 24 if scene.small else CONTEXT, scene)
    return [{"work": "check", "apart": distance}, first, *rows, long_answers(model, first["seconds"], scene)]


def nano(scene: Scene) -> list[dict[str, Any]]:
    """nano-3 with random weights."""
    return served(nano_3(), scene)


def qwen(scene: Scene) -> list[dict[str, Any]]:
    """qwen3-30b-a3b's shape in the same engine."""
    return served(qwen3_30b_a3b(), scene)


def peer(scene: Scene) -> list[dict[str, Any]]:
    """transformers beside ours on the same weights: nano-3 with 13 of its 52 layers, so that a disk holds them."""
    config = nano_3().replace(pattern=nano_3().pattern[:13])
    ours = built(config, scene)
    with tempfile.TemporaryDirectory() as folder:
        ours.save(folder)
        theirs = load_transformers(folder, scene.dtype).to(scene.device).eval()
    rows = []
    for batch in (1, 2) if scene.small else (1, 8):
        rows.append(beside(ours, theirs, batch, 24 if scene.small else 2048, scene))
    return rows


@torch.no_grad()
def beside(ours: HybridModel, theirs: Any, batch: int, context: int, scene: Scene) -> dict[str, Any]:
    """Decoding of both behind the same prompts, fed the same tokens."""
    tokens = random_tokens(batch, context + STEPS, ours.config.vocab_size).to(scene.device)
    found: dict[str, Any] = {"work": "decode", "batch": batch, "context": context, "layers": len(ours.config.pattern)}
    cache = theirs(input_ids=tokens[:, :context], use_cache=True, logits_to_keep=1).past_key_values
    memory = Memory(ours, rows=batch, pages=batch * (context + STEPS + 40) // 32 + batch)
    sequences = [memory.open() for _ in range(batch)]
    for row, sequence in enumerate(sequences):
        assert sequence is not None and memory.reserve(sequence, context + STEPS)
        with backend.using(scene.backend):
            ours.hidden(tokens[row : row + 1, :context], state=memory.view([Segment(sequence, context)]))
    step, spent, distance = CapturedStep(ours, memory, batch, context + STEPS), {"ours": 0.0, "theirs": 0.0}, 0.0
    for place in range(context, context + STEPS):
        logits: dict[str, Tensor] = {}

        def our_turn(place: int = place, logits: dict[str, Tensor] = logits) -> None:
            with backend.using(scene.backend):
                logits["ours"] = step(tokens[:, place], sequences)

        def their_turn(place: int = place, logits: dict[str, Tensor] = logits) -> None:
            given = {"input_ids": tokens[:, place : place + 1], "past_key_values": cache, "use_cache": True}
            logits["theirs"] = theirs(**given).logits[:, -1]

        for name, turn in (("ours", our_turn), ("theirs", their_turn)):
            taken = timed(turn, scene.device)
            spent[name] += taken if place >= context + 3 else 0.0  # the first compile and capture
        distance = max(distance, apart(logits["ours"], logits["theirs"]))
    if not distance <= AGREE[scene.dtype]:
        return found | red(distance, AGREE[scene.dtype])
    speeds = {f"{name}_tokens_per_s": batch * (STEPS - 3) / taken for name, taken in spent.items()}
    return found | speeds | {"ratio": spent["theirs"] / spent["ours"], "apart": distance}


def train(scene: Scene) -> list[dict[str, Any]]:
    """Steps of AdamW on a latent-MoE hybrid of about 2 billion: bf16 autocast over fp32 weights."""
    config, rows, length = (shrunk(TRAINED), 2, 24) if scene.small else (TRAINED, 4, 4096)
    model = build(config, device=scene.device).train()
    model.recompute("E")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = random_tokens(rows, length, config.vocab_size).to(scene.device)
    weights = torch.full((tokens.numel(),), 1 / tokens.numel(), device=scene.device)

    def loss() -> Tensor:
        with torch.autocast(scene.device, torch.bfloat16, enabled=scene.dtype == torch.bfloat16):
            hidden = model.hidden(tokens).flatten(0, 1)
            return cross_entropy(hidden, model.head, tokens.roll(-1, 1).flatten(), weights)

    def work() -> None:
        with backend.using(scene.backend):
            loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    losses = []
    for setting in ("auto,-triton", scene.backend):
        with backend.using(setting), torch.no_grad():
            losses.append(loss())
    distance = apart(losses[1], losses[0])
    found = {"work": "train", "parameters": count(config).total, "active": count(config).active, "apart": distance}
    if not distance <= AGREE[scene.dtype]:
        return [found | red(distance, AGREE[scene.dtype])]
    speed = tokens.numel() / seconds(work, scene)
    mfu = 3 * count(config).flops_per_token(length // 2) * speed / FLOPS
    memory = torch.cuda.max_memory_allocated() if scene.device == "cuda" else None
    return [found | {"rows": rows, "length": length, "tokens_per_s": speed, "mfu": mfu, "memory": memory}]
