"""Trimaran against its peers on a CPU: training step, prefill, decoding, with the same weights in the same process.

    python benchmarks/cpu.py --peers transformers --cases train,prefill,decode --json

Ours and the peer take turns, so that noise meets both; medians of `--repeat` turns (3 where a turn takes over 6 s, 2
over 20 s). Both sides' outputs are compared first: a case whose check fails is reported as red, without a speed.
Process CPU time stands beside wall time. The case `tiny` is the demo's model in training, ours alone.

peer: transformers at its defaults (sdpa attention, grouped_mm experts, cache), with `dt` unclamped in prefill, since
the clamp is not in the model. bf16 means bf16 weights in inference, and autocast over fp32 weights in training.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimaran.engine.plain import prefill
from trimaran.model import hub
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import HybridModel, build
from trimaran.ops.loss import cross_entropy
from trimaran.ops.memory import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = {
    "tiny": ("train 8x256",),
    "train": ("train 4x512",),
    "prefill": ("prefill 512", "prefill 2048", "prefill 8192"),
    "decode": ("decode b1", "decode b8", "decode b32"),
}
BLOCK = 1024  # tokens of a prompt that pass the model at once, carrying the state
PROMPT, NEW = 64, 24  # decoding: tokens before, tokens per turn
AGREE = {"fp32": 1e-3, "bf16": 5e-2}  # largest relative L2 distance of logits (and of the loss) to the peer's

SIZES = {
    "vocab_size": 16384,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "mamba_num_heads": 24,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 4,
    "chunk_size": 128,
}
MODELS = {
    "dense": ModelConfig(pattern="M-M-M*-" * 3, intermediate_size=3072, **SIZES),
    "moelat": ModelConfig(
        pattern="MEME*E" * 3,
        n_routed_experts=32,
        num_experts_per_tok=4,
        moe_latent_size=384,
        moe_intermediate_size=768,
        moe_shared_expert_intermediate_size=768,
        **SIZES,
    ),
}
TINY = ModelConfig(
    pattern="ME*E",
    mtp_pattern="*E",
    vocab_size=2048,
    hidden_size=192,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=48,
    mamba_num_heads=6,
    mamba_head_dim=64,
    ssm_state_size=32,
    n_groups=1,
    chunk_size=64,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_latent_size=96,
    moe_intermediate_size=192,
    moe_shared_expert_intermediate_size=384,
)


@dataclass(frozen=True)
class Side:
    """One turn of a case: `turn` does the work of `tokens` tokens and returns what is compared."""

    turn: Callable[[], Tensor]
    tokens: int


def random_tokens(batch: int, length: int, vocab: int, seed: int = 0) -> Tensor:
    """Ids with a long tail, as in text, so that experts are not loaded evenly by construction."""
    uniform = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))
    return (uniform**3 * vocab).long()


def training(model: nn.Module, loss: Callable[[], Tensor], tokens: int, dtype: str) -> Side:
    """One optimizer step, alike for both sides."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def turn() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()[None]

    return Side(turn, tokens)


def our_training(model: HybridModel, tokens: Tensor, dtype: str) -> Side:
    """Forward, backward, AdamW, on the targets that the peer's own loss takes."""
    weights = torch.ones(tokens.shape)
    weights[:, -1] = 0

    def loss() -> Tensor:
        hidden = model.hidden(tokens).flatten(0, 1)
        return cross_entropy(hidden, model.head, tokens.roll(-1, 1).flatten(), weights.flatten()) / weights.sum()

    return training(model, loss, tokens.numel(), dtype)


def tiny_training(model: HybridModel) -> Side:
    """The demo's step: packed documents, next token and draft block."""
    tokens = random_tokens(8, 258, model.config.vocab_size)
    inputs, one, two = (tokens[:, d : 256 + d] for d in range(3))
    ids = (torch.rand(inputs.shape, generator=torch.Generator().manual_seed(1)) < 1 / 1000).cumsum(1)
    weights = torch.full((inputs.numel(),), 1 / inputs.numel())

    def loss() -> Tensor:
        hidden = model.hidden(inputs, ids)
        deeper = model.mtp(hidden, one, ids)
        drafted = cross_entropy(deeper.flatten(0, 1), model.head, two.flatten(), weights)
        return cross_entropy(hidden.flatten(0, 1), model.head, one.flatten(), weights) + 0.2 * drafted

    return training(model, loss, inputs.numel(), "bf16")


def peer_training(model: Any, tokens: Tensor, dtype: str) -> Side:
    def loss() -> Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    return training(model, loss, tokens.numel(), dtype)


def our_prefill(model: HybridModel, tokens: Tensor) -> Side:
    model.eval()

    @torch.no_grad()
    def turn() -> Tensor:
        return model.head(prefill(model, tokens.tolist(), BLOCK, drafting=False)[1])[:, -1]

    return Side(turn, tokens.numel())


def peer_prefill(model: Any, tokens: Tensor) -> Side:
    model.eval()

    @torch.no_grad()
    def turn() -> Tensor:
        return model(input_ids=tokens, use_cache=True, logits_to_keep=1).logits[:, -1]

    return Side(turn, tokens.numel())


def our_decoding(model: HybridModel, tokens: Tensor) -> Side:
    """NEW tokens per turn on a cache that grows; given tokens are fed, so that both sides read the same."""
    model.eval()
    with torch.no_grad():
        state, _ = prefill(model, tokens[:, :PROMPT].tolist(), BLOCK, drafting=False)

    @torch.no_grad()
    def turn() -> Tensor:
        for n in range(NEW):
            logits = model(tokens[:, PROMPT + n : PROMPT + n + 1], state=state)[:, -1]
            logits.argmax(-1)
        return logits

    return Side(turn, len(tokens) * NEW)


def peer_decoding(model: Any, tokens: Tensor) -> Side:
    model.eval()
    with torch.no_grad():
        cache = model(input_ids=tokens[:, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def turn() -> Tensor:
        for n in range(NEW):
            token = tokens[:, PROMPT + n : PROMPT + n + 1]
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
            logits.argmax(-1)
        return logits

    return Side(turn, len(tokens) * NEW)


def sides(case: str, dtype: str, ours: HybridModel, peer: Any) -> list[Side]:
    """Ours and the peer's turn of one case."""
    vocab = ours.config.vocab_size
    if case == "train 4x512":
        tokens = random_tokens(4, 512, vocab)
        return [our_training(ours, tokens, dtype), peer_training(peer, tokens, dtype)]
    kind, size = case.split()
    if kind == "prefill":
        tokens = random_tokens(1, int(size), vocab)
        return [our_prefill(ours, tokens), peer_prefill(peer, tokens)]
    tokens = random_tokens(int(size[1:]), PROMPT + NEW, vocab)
    return [our_decoding(ours, tokens), peer_decoding(peer, tokens)]


def take_turns(both: list[Side], repeat: int) -> tuple[float, list[list[float]], list[list[float]]]:
    """Relative distance of the first outputs, then wall and CPU seconds of each side's turns."""
    first = [side.turn().double() for side in both]
    apart = float((first[0] - first[-1]).norm() / first[-1].norm())
    wall, cpu = [[] for _ in both], [[] for _ in both]
    for n in range(repeat):
        for index, side in enumerate(both):
            started, burnt = time.perf_counter(), time.process_time()
            side.turn()
            wall[index].append(time.perf_counter() - started)
            cpu[index].append(time.process_time() - burnt)
        slowest = max(map(sum, zip(*wall)))
        if n + 1 >= (2 if slowest > 20 else 3 if slowest > 6 else repeat):
            break
    return apart, wall, cpu


def row(case: str, model: str, dtype: str, both: list[Side], repeat: int) -> dict[str, Any]:
    """Speeds in tokens per second; `ratio` is ours over the peer's, `cpu_ratio` the same per second of CPU time."""
    apart, wall, cpu = take_turns(both, repeat)
    result: dict[str, Any] = {"case": case, "model": model, "dtype": dtype, "repeats": len(wall[0])}
    if not apart <= AGREE[dtype]:
        return {**result, "red": f"outputs {apart:.1e} apart, allowed {AGREE[dtype]:.0e}: no speed reported"}
    seconds, burnt = [statistics.median(t) for t in wall], [statistics.median(t) for t in cpu]
    result |= {"ours": round(both[0].tokens / seconds[0], 1), "cpu_s": round(burnt[0], 3)}
    if len(both) > 1:
        result |= {
            "peer": round(both[1].tokens / seconds[1], 1),
            "ratio": round(seconds[1] / seconds[0], 3),
            "peer_cpu_s": round(burnt[1], 3),
            "cpu_ratio": round(burnt[1] / burnt[0], 3),
            "apart": float(f"{apart:.1e}"),
        }
    return result


def load_peer(folder: str, dtype: torch.dtype) -> Any:
    """transformers' own model from the folder that ours wrote."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return model


def measure(cases: list[str], models: list[str], dtypes: list[str], repeat: int) -> Iterator[dict[str, Any]]:
    """One row after the other; training comes last in fp32, since it changes the weights."""
    if "train 8x256" in cases:
        yield row("train 8x256", "tiny", "bf16", [tiny_training(build(TINY))], 4 * repeat)
    inference = [case for case in cases if case.startswith(("prefill", "decode"))]
    for name in models:
        with tempfile.TemporaryDirectory() as folder:
            hub.save(build(MODELS[name]), folder)
            for dtype in dtypes:
                for stored, todo in ((DTYPES[dtype], inference), (torch.float32, CASES["train"])):
                    chosen = [case for case in todo if case in cases]
                    if not chosen:
                        continue
                    ours, peer = hub.load(folder, dtype=stored), load_peer(folder, stored)
                    for case in chosen:
                        yield row(case, name, dtype, sides(case, dtype, ours, peer), repeat)
                    del ours, peer


def conditions() -> dict[str, Any]:
    """Versions, hardware, threads, date."""
    import transformers

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": names[0] if names else platform.processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def line(result: dict[str, Any]) -> str:
    """A row as text."""
    head = f"{result['model']:7s} {result['dtype']:5s} {result['case']:13s}"
    if "red" in result:
        return f"{head} RED: {result['red']}"
    if "peer" not in result:
        return f"{head} {result['ours']:9.1f} tok/s   {result['cpu_s']:.2f} s CPU"
    return (
        f"{head} {result['ours']:9.1f} tok/s against {result['peer']:9.1f}: {result['ratio']:5.2f}x wall, "
        f"{result['cpu_ratio']:5.2f}x CPU ({result['cpu_s']:.2f} s CPU)"
    )


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of ours over the peer's speed, one panel per dtype; 1 is the peer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if "ratio" in r]
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    figure, axes = plt.subplots(1, len(dtypes), figsize=(5 * len(dtypes), 3.6), sharey=True, squeeze=False)
    for axis, dtype in zip(axes[0], dtypes):
        models = list(dict.fromkeys(r["model"] for r in rows))
        cases = list(dict.fromkeys(r["case"] for r in rows))
        for n, model in enumerate(models):
            ratio = {r["case"]: r["ratio"] for r in rows if (r["model"], r["dtype"]) == (model, dtype)}
            places = [place + 0.8 * n / len(models) for place in range(len(cases))]
            bars = axis.bar(places, [ratio.get(case, 0) for case in cases], 0.75 / len(models), label=model)
            axis.bar_label(bars, fmt="%.1f", fontsize=7)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(
            [place + 0.4 - 0.4 / len(models) for place in range(len(cases))], cases, rotation=40, ha="right"
        )
        axis.set_title(dtype)
        axis.legend(frameon=False)
    axes[0][0].set_ylabel("speed, transformers = 1")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def choice(allowed: list[str], text: str) -> list[str]:
    asked = text.split(",")
    for word in asked:
        if word not in allowed:
            raise SystemExit(f"{word!r} is not one of {', '.join(allowed)}")
    return asked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", default="transformers", help="transformers")
    parser.add_argument("--cases", default="tiny,train,prefill,decode", help="kinds, or single cases as in the table")
    parser.add_argument("--models", default="dense,moelat")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep-memory", action="store_true", help="freed memory stays with the process (both sides)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json and NAME.png")
    asked = parser.parse_args()
    choice(["transformers"], asked.peers)
    single = [case for kind in CASES.values() for case in kind]
    cases = [case for word in choice([*CASES, *single], asked.cases) for case in (CASES.get(word) or (word,))]
    torch.set_num_threads(asked.threads)
    kept = asked.keep_memory and keep_freed_memory()
    result: dict[str, Any] = {"conditions": conditions() | {"keep_memory": kept}, "rows": []}
    started = time.monotonic()
    for found in measure(cases, choice([*MODELS], asked.models), choice([*DTYPES], asked.dtypes), asked.repeat):
        result["rows"].append(found)
        print(f"{time.monotonic() - started:5.0f} s  {line(found)}", file=sys.stderr, flush=True)
    if asked.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{asked.save}.json").write_text(json.dumps(result, indent=2) + "\n")
        picture(result["rows"], RESULTS / f"{asked.save}.png")
    if asked.json:
        print(json.dumps(result, indent=2))
    return 1 if any("red" in found for found in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
