"""What low precision costs a small hybrid: FP8, NVFP4 and NVFP4's ablations against bf16, and the time of emulation.

    nice -n 15 env OMP_NUM_THREADS=1 python benchmarks/precision.py --out runs/precision     # 27 runs of 300 steps

Runs of a seed begin with the same weights and read the same rows in the same order; what differs is how the products of
the linear maps round. All of it is emulated in fp32 on one thread. A run's held-out loss is taken twice: computed as it
trained, and with its master weights in plain fp32. Each finished run is added to results/precision.json, and none is
run again; `--summary` prints what is there and draws the picture.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from trimaran.model import hub
from trimaran.report import environment
from trimaran.train.loop import Run, fit, train_step
from trimaran.train.prepare import Prepared, begin, prepare
from trimaran.train.recipe import PretrainRecipe
from trimaran.train.validate import evaluate

RESULTS = Path(__file__).parent / "results" / "precision.json"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "precision.png"
MODEL = {
    "pattern": "MEM*E",
    "hidden_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "mamba_num_heads": 4,
    "mamba_head_dim": 48,
    "ssm_state_size": 16,
    "n_groups": 1,
    "chunk_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 192,
    "routed_scaling_factor": 2.5,
}
TRAIN = {"steps": 300, "batch_size": 4, "lr": 3e-3, "eval_tokens": 20_000, "checkpoint_every": 0, "keep": 1}
LENGTH, VOCABULARY, SEEDS = 128, 512, (0, 1, 2)
FP4 = {"precision": "nvfp4"}
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "fp8 per tensor": {"precision": "fp8"},
    "fp8 in blocks": {"precision": "fp8", "formats": {"scaling": "blocks"}},
    "nvfp4": FP4,
    "nvfp4, layers as Super": {**FP4, "formats": {"like": "super-3"}},
    "nvfp4, no rotation": {**FP4, "formats": {"hadamard": False}},
    "nvfp4, gradients to nearest": {**FP4, "formats": {"by_chance": "none"}},
    "nvfp4, all by chance": {**FP4, "formats": {"by_chance": "all"}},
    "nvfp4, all layers": {**FP4, "formats": {"last": 0}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--summary", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if not asked.summary:
        prepared = prepare(recipe(asked.out, 0, {}))
        for seed in map(int, asked.seeds.split(",")):
            for name, changes in VARIANTS.items():
                if f"{name}/{seed}" not in stored()["runs"]:
                    add(f"{name}/{seed}", trained(asked.out, seed, changes, prepared))
        for name, changes in VARIANTS.items():
            if name not in stored()["step_ms"]:
                note("step_ms", name, timed(asked.out, changes, prepared))
    print(table(stored()["runs"]))
    picture(stored()["runs"])


def recipe(out: Path, seed: int, changes: dict[str, Any]) -> PretrainRecipe:
    return PretrainRecipe(
        run=str(out.absolute()),
        seed=seed,
        tokenizer={"vocab_size": VOCABULARY},
        model=MODEL,
        data={"source": "stdlib", "sequence_length": LENGTH},
        train={**TRAIN, **changes},
    )


def begun(out: Path, seed: int, changes: dict[str, Any], prepared: Prepared) -> Run:
    run = begin(recipe(out, seed, changes), prepared)
    folder = out / f"{abs(hash(json.dumps(changes, sort_keys=True))) % 10**8}-{seed}-{time.time_ns()}"
    folder.mkdir(parents=True)
    run.folder = folder
    return run


def trained(out: Path, seed: int, changes: dict[str, Any], prepared: Prepared) -> dict[str, Any]:
    """One run: held-out loss in nats per token as it computes and in fp32, the loss of the last 50 steps, CPU time."""
    run = begun(out, seed, changes, prepared)
    cpu = time.process_time()
    assert fit(run) == 0
    cpu = time.process_time() - cpu
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    hub.save(run.model, run.folder / "model")
    whole = hub.load(run.folder / "model", dtype=torch.float32)
    return {
        "held_out": evaluate(run.model, run.held_out).loss,
        "held_out_fp32": evaluate(whole, run.held_out).loss,
        "training": statistics.mean(losses[-50:]),
        "losses": [round(statistics.mean(losses[at : at + 10]), 4) for at in range(0, len(losses), 10)],
        "cpu_s": round(cpu, 1),
    }


def timed(out: Path, changes: dict[str, Any], prepared: Prepared, steps: int = 12) -> float:
    """CPU milliseconds of a training step, the median."""
    run, times = begun(out, 0, changes, prepared), []
    run.model.train()
    for _ in range(steps):
        batch = next(run.loader)
        start = time.process_time()
        train_step(run, batch, 1e-4)
        times.append(1000 * (time.process_time() - start))
        run.step += 1
    return round(statistics.median(times[2:]), 1)


def stored() -> dict[str, Any]:
    if RESULTS.is_file():
        return json.loads(RESULTS.read_text(encoding="utf-8"))
    conditions = {"model": MODEL, "train": TRAIN, "sequence_length": LENGTH, "vocab_size": VOCABULARY}
    return {"made_on": environment(), "conditions": conditions, "runs": {}, "step_ms": {}}


def add(name: str, found: dict[str, Any]) -> None:
    note("runs", name, found)
    print(name, round(found["held_out"], 4), f"{found['cpu_s']} s", flush=True)


def note(kind: str, name: str, found: Any) -> None:
    document = stored()
    document[kind][name] = found
    document["made_on"] = environment()
    RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def gaps(runs: dict[str, Any], name: str, measure: str) -> list[float]:
    """How far above bf16 of the same seed, in percent."""
    pairs = [(runs.get(f"{name}/{seed}"), runs.get(f"bf16/{seed}")) for seed in SEEDS]
    return [100 * (one[measure] / base[measure] - 1) for one, base in pairs if one and base]


def table(runs: dict[str, Any]) -> str:
    lines = [
        "| recipe | held-out loss | above bf16 | with the master weights in fp32 | seeds |",
        "|---|---|---|---|---|",
    ]
    for name in VARIANTS:
        found = [runs[f"{name}/{seed}"]["held_out"] for seed in SEEDS if f"{name}/{seed}" in runs]
        if found:
            columns = [spread(gaps(runs, name, measure)) for measure in ("held_out", "held_out_fp32")]
            lines.append(f"| {name} | {statistics.mean(found):.3f} | {' | '.join(columns)} | {len(found)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):+.2f} % ({min(values):+.2f} to {max(values):+.2f})"


def picture(runs: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    names = [name for name in VARIANTS if name != "bf16" and gaps(runs, name, "held_out")]
    for row, name in enumerate(reversed(names)):
        values = gaps(runs, name, "held_out")
        axes.plot([min(values), max(values)], [row, row], color="tab:blue", linewidth=2, alpha=0.4)
        axes.plot(values, [row] * len(values), "o", color="tab:blue", markersize=4)
        axes.plot([statistics.mean(values)], [row], "|", color="black", markersize=14)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.axvline(0, color="gray", linewidth=1)
    axes.set_xlabel("held-out loss above bf16 of the same seed, percent (dots: seeds; bar: mean)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    main()
