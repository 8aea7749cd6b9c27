"""How well the planner predicts this library's own parallel runs on this CPU: two processes, held-out layouts.

    python benchmarks/planner_cpu.py                 # measures, then runs; about five minutes on two idle cores
    python benchmarks/planner_cpu.py --rounds 1      # a try

First `plan/measure.py` fits the machine's coefficients to other, smaller models, whole and spread, and to bare
collectives: none of the runs here is among what it fits. Then every layout (replicate, fsdp, tp, pp and others, each
at two batches) takes real steps with the training loop's own `train_step`, all in one process group. Layouts take
turns, round by round; a layout's time is the median over its rounds of the median step, its noise half the range over
the rounds. Adds the part `cpu` to benchmarks/results/planner.json, and writes src/trimaran/plan/cpu.json with --keep.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import build
from trimaran.parallel.parallelize import parallelize
from trimaran.parallel.settings import ParallelSettings
from trimaran.parallel.world import join
from trimaran.plan import hardware as machines
from trimaran.plan.costs import Costs, Job
from trimaran.plan.hardware import Hardware
from trimaran.plan.layout import Layout
from trimaran.plan.measure import measure
from trimaran.plan.probes import batch_of
from trimaran.report import environment
from trimaran.train.loop import Run, train_step
from trimaran.train.prepare import objective_of, optimizer_of
from trimaran.train.recipe import TrainSettings

RESULTS = Path(__file__).parent / "results" / "planner.json"
CPU = Path(machines.__file__).with_name("cpu.json")
PROCESSES, SEQUENCE, STEPS, WARM = 2, 128, 6, 2
MODEL = ModelConfig(
    pattern="M-*EM-*E",
    vocab_size=2048,
    hidden_size=256,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    mamba_num_heads=8,
    mamba_head_dim=64,
    ssm_state_size=32,
    n_groups=2,
    chunk_size=64,
    intermediate_size=768,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_latent_size=128,
    moe_intermediate_size=256,
    moe_shared_expert_intermediate_size=384,
)
LAYOUTS = (
    {"replicate": 2},
    {"fsdp": 2},
    {"tp": 2},
    {"pp": 2},
    {"fsdp": 2, "ep": 2},
    {"cp": 2},
)
BATCHES = (8, 16)
PARTS = 2  # micro-batches of a pipeline; the others take their rows at once


def cases(asked: list[str]) -> list[tuple[dict[str, int], int]]:
    return [(axes, rows) for rows in BATCHES for axes in LAYOUTS if not asked or name_of(axes) in asked]


def name_of(axes: dict[str, int]) -> str:
    return " ".join(f"{axis} {size}" for axis, size in axes.items())


def layout_of(axes: dict[str, int], rows: int) -> Layout:
    mine = rows // (axes.get("replicate", 1) * axes.get("fsdp", 1))
    return Layout(micro_batch=mine // PARTS if "pp" in axes else mine, **axes)


def run_of(axes: dict[str, int], rows: int) -> Run:
    """The model spread over both processes, at its first step."""
    settings = ParallelSettings(**axes, micro_batches=PARTS if "pp" in axes else 0)
    world = join(settings, torch.device("cpu"))
    train = TrainSettings(steps=10_000, batch_size=rows, lr=1e-4)
    model = build(MODEL, torch.device("cpu"), seed=0).train()
    cuts = parallelize(model, world, SEQUENCE // 2)
    objective = objective_of(train, model, world)
    return Run(Path("."), train, model, objective, optimizer_of(train, model), None, world=world, cuts=cuts)


def member(rank: int, folder: str, rounds: int, asked: list[str]) -> None:
    """One of the two processes: every layout in turn, again and again."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    everything = cases(asked)
    runs = [run_of(*case) for case in everything]
    batches = [batch_of(MODEL, rows, SEQUENCE) for _, rows in everything]
    times: list[list[float]] = [[] for _ in everything]
    for _ in range(rounds):
        for run, batch, found in zip(runs, batches, times, strict=True):
            found.append(statistics.median(step_times(run, batch)))
    if rank == 0:
        (Path(folder) / "times.json").write_text(json.dumps(times))
    dist.barrier()
    os._exit(0)


def step_times(run: Run, batch: Any) -> list[float]:
    times = []
    for _ in range(WARM + STEPS):
        dist.barrier()
        began = time.perf_counter()
        train_step(run, batch, 1e-4)
        times.append(time.perf_counter() - began)
    return times[WARM:]


def timed(rounds: int, asked: list[str]) -> list[list[float]]:
    """Seconds of a step: for each case, of each round."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        started = [context.Process(target=member, args=(rank, folder, rounds, asked)) for rank in range(PROCESSES)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        return json.loads((Path(folder) / "times.json").read_text())


def compared(hardware: Hardware, times: list[list[float]], asked: list[str]) -> dict[str, Any]:
    """Predictions beside measurements."""
    rows = []
    for (axes, batch), found in zip(cases(asked), times, strict=True):
        job = Job(MODEL, SEQUENCE, batch, hardware, "fp32")
        parts = Costs(job).step(layout_of(axes, batch))
        measured = statistics.median(found)
        rows.append(
            {
                "layout": name_of(axes),
                "rows": batch,
                "measured_s": measured,
                "noise_s": (max(found) - min(found)) / 2,
                "predicted_s": parts.total,
                "accuracy": 1 - abs(parts.total / measured - 1),
                "parts": {key: round(value, 5) for key, value in vars(parts).items() if value},
            }
        )
    best = []
    for batch in BATCHES:
        mine = [row for row in rows if row["rows"] == batch]
        truth, chosen = min(mine, key=lambda row: row["measured_s"]), min(mine, key=lambda row: row["predicted_s"])
        within = chosen["measured_s"] - truth["measured_s"] <= truth["noise_s"] + chosen["noise_s"]
        best.append(
            {"rows": batch, "best": truth["layout"], "predicted_best": chosen["layout"], "within_noise": within}
        )
    return {
        "mean_accuracy": statistics.mean(row["accuracy"] for row in rows),
        "best": best,
        "rows": rows,
        "reach": hardware.reach.model_dump(),
        "peak": hardware.peak,
        "bandwidth": hardware.bandwidth,
        "load_before": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], help="some layouts, such as 'tp 2'")
    parser.add_argument("--hardware", help="a file of trimaran plan --measure, instead of measuring")
    parser.add_argument("--keep", action="store_true", help="the figures become --hardware cpu")
    asked = parser.parse_args()
    load = os.getloadavg()[0]
    hardware = machines.read(Path(asked.hardware)) if asked.hardware else measure(PROCESSES, "fp32")
    found = compared(hardware, timed(asked.rounds, asked.only), asked.only) | {"rounds": asked.rounds}
    found |= {"load_before": load, "made_on": environment()}
    for row in found["rows"]:
        print(
            f"{row['layout']:14} {row['rows']:3} rows  {row['measured_s'] * 1e3:8.1f} ms ± {row['noise_s'] * 1e3:6.1f}",
            end="",
        )
        print(f"  predicted {row['predicted_s'] * 1e3:8.1f}  {row['accuracy']:.1%}")
    print(json.dumps({"mean_accuracy": found["mean_accuracy"], "best": found["best"]}, indent=1))
    if asked.only:
        return
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    RESULTS.write_text(json.dumps(document | {"cpu": found}, indent=1) + "\n", encoding="utf-8")
    if asked.keep:
        CPU.write_text(hardware.model_dump_json(indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
