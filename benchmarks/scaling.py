"""What each way to spread a step costs: gloo on one CPU, 1, 2 and 4 processes, beside the same step in one process.

    python benchmarks/scaling.py --save scaling           # writes benchmarks/results/scaling.json
    python benchmarks/scaling.py --sizes 2 --repeat 3
    python benchmarks/scaling.py --small                  # a try of seconds, whose numbers mean nothing

All layouts of one size share a process group, one thread a process. A turn is one whole step of the loop (loss,
gradients, clipping, AdamW) on the same batch: first all processes together, then the first process alone on a whole
model while the others sleep at a barrier; medians of `--repeat` turns. Losses and the gradient norm of three steps are
compared first: a layout whose numbers differ by more than 1e-5 is red, without a time.

    wall, alone    seconds of a step: spread, in one process
    speedup        alone / wall. No more than the cores can give: 2 cores give 4 processes at most 2
    cpu, alone     CPU seconds of a step over all processes
    overhead       what the layout burns beyond the work itself, cpu / alone - 1: exchanges, work done twice, starting
                   smaller operations, waiting that does not sleep
    held           largest share of a process in weights, gradients and optimizer state, as a part of the whole

The size 1 holds what recomputing costs and spares: `kept`, bytes that a forward pass keeps for its backward.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trimaran.data.batch import Batch
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import HybridModel, build
from trimaran.parallel.parallelize import parallelize
from trimaran.parallel.places import local
from trimaran.parallel.settings import ParallelSettings
from trimaran.parallel.world import World, join
from trimaran.report import environment
from trimaran.train.loop import Run, train_step
from trimaran.train.prepare import objective_of, optimizer_of
from trimaran.train.recipe import TrainSettings

RESULTS = Path(__file__).parent / "results"
AGREE = 1e-5  # largest relative difference of a loss or norm
SEED = 0
MODEL = ModelConfig(
    pattern="ME*-ME*-",
    vocab_size=4096,
    hidden_size=192,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=24,
    mamba_num_heads=8,
    mamba_head_dim=48,
    ssm_state_size=32,
    n_groups=4,
    chunk_size=64,
    intermediate_size=768,
    n_routed_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=192,
    moe_shared_expert_intermediate_size=384,
)
ROWS, LENGTH = 8, 128
LETTERS = ("M", "*", "E", "-", "M*E-")  # recomputed
LAYOUTS: dict[int, tuple[dict[str, int], ...]] = {
    2: (
        {"replicate": 2},
        {"fsdp": 2},
        {"fsdp": 2, "ep": 2},
        {"tp": 2},
        {"cp": 2},
        {"pp": 2, "micro_batches": 4},
    ),
    4: (
        {"replicate": 4},
        {"fsdp": 4},
        {"fsdp": 4, "ep": 4},
        {"tp": 4},
        {"cp": 4},
        {"pp": 4, "micro_batches": 8},
        {"fsdp": 2, "tp": 2},
        {"fsdp": 2, "cp": 2},
        {"fsdp": 2, "pp": 2, "micro_batches": 4},
    ),
}


def batch_of(vocab: int, rows: int, length: int) -> Batch:
    """Random tokens with a long tail, so that experts are loaded unevenly; documents of about 64 tokens."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = (torch.rand(rows, length + 1, generator=generator) ** 3 * vocab).long()
    documents = (torch.rand(rows, length, generator=generator) < 1 / 64).cumsum(1).to(torch.int32)
    weights = torch.ones(rows, length)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents, weights)


def begun(config: ModelConfig, world: World, rows: int, recompute: str = "") -> Run:
    """A run at its first step."""
    settings = TrainSettings(steps=99, batch_size=rows, lr=1e-4, recompute=recompute)
    model = build(config, seed=SEED).train()
    cuts = {} if world.alone else parallelize(model, world, LENGTH // 2)
    objective, learner = objective_of(settings, model, world), optimizer_of(settings, model)
    return Run(Path("."), settings, model, objective, learner, loader=None, world=world, cuts=cuts)  # type: ignore[arg-type]


def held(run: Run) -> int:
    """Bytes of this process's weights, gradients and optimizer state after a step."""
    weights = list(run.model.parameters())
    tensors = weights + [p.grad for p in weights if p.grad is not None]
    tensors += [x for state in run.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    return sum(local(tensor).nbytes for tensor in tensors)


def kept(model: HybridModel, batch: Batch) -> int:
    """Bytes that a training forward keeps for its backward, weights aside."""
    own, seen = {p.data_ptr() for p in model.parameters()}, dict[int, int]()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.hidden(batch.tokens_BT, batch.doc_ids_BT)
    del hidden
    return sum(seen.values())


def timed(turn: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds in this process."""
    started, burnt = time.perf_counter(), time.process_time()
    turn()
    return time.perf_counter() - started, time.process_time() - burnt


def agreement(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """The largest relative difference of a step's numbers; not a number where one of them is not."""
    apart = [abs(ours[name] - value) / max(abs(value), 1e-6) for name, value in theirs.items() if name != "max_vio"]
    return float(torch.tensor(apart).max())


def summary(case: str, apart: float, spread: list[list[float]], alone: list[list[float]]) -> dict[str, Any]:
    """A row of the table. spread, alone: (wall, CPU of all processes) of each turn."""
    row: dict[str, Any] = {"case": case, "repeats": len(spread), "apart": float(f"{apart:.1e}")}
    if not apart <= AGREE:
        return row | {"red": f"numbers {apart:.1e} apart, allowed {AGREE:.0e}: no time reported"}
    wall, cpu = (statistics.median(column) for column in zip(*spread))
    wall_alone, cpu_alone = (statistics.median(column) for column in zip(*alone))
    return row | {
        "wall_s": round(wall, 4),
        "alone_wall_s": round(wall_alone, 4),
        "speedup": round(wall_alone / wall, 3),
        "cpu_s": round(cpu, 4),
        "alone_cpu_s": round(cpu_alone, 4),
        "overhead": round(cpu / cpu_alone - 1, 3),
    }


def measured(layout: dict[str, int], config: ModelConfig, batch: Batch, repeat: int) -> dict[str, Any]:
    """One layout, in turn with one process; every process calls it, and the row is the first one's."""
    world = join(ParallelSettings(**layout), torch.device("cpu"))
    rows = len(batch.tokens_BT)
    run = begun(config, world, rows)
    whole = begun(config, World(), rows) if world.first else None
    apart = 0.0
    for _ in range(3):
        ours = train_step(run, batch, 1e-4)
        if whole is not None:
            now = agreement(ours, train_step(whole, batch, 1e-4))
            apart = apart if now <= apart else now
    turns: list[list[float]] = []
    truths: list[list[float]] = []
    for _ in range(repeat):
        dist.barrier()
        wall, cpu = timed(lambda: train_step(run, batch, 1e-4))
        total = torch.tensor([cpu])
        dist.all_reduce(total)
        dist.barrier()
        turns.append([wall, float(total)])
        if whole is not None:
            truths.append([*timed(lambda: train_step(whole, batch, 1e-4))])
    dist.barrier()
    share = torch.tensor([float(held(run))])
    dist.all_reduce(share, dist.ReduceOp.MAX)
    if whole is None:
        return {}
    name = " ".join(f"{axis} {count}" for axis, count in layout.items() if axis != "micro_batches")
    found = summary(name, apart, turns, truths) | {"processes": world.settings.world, "layout": layout}
    return found | {"held": round(float(share) / held(whole), 3)}


def recomputing(config: ModelConfig, batch: Batch, repeat: int) -> list[dict[str, Any]]:
    """What recomputing costs in one process, by letters."""
    runs = {letters: begun(config, World(), len(batch.tokens_BT), letters) for letters in ("", *LETTERS)}
    first = {letters: train_step(run, batch, 1e-4) for letters, run in runs.items()}
    turns: dict[str, list[list[float]]] = {letters: [] for letters in runs}
    for _ in range(repeat):
        for letters, run in runs.items():
            turns[letters].append([*timed(lambda run=run: train_step(run, batch, 1e-4))])  # type: ignore[misc]
    bytes_kept = {letters: kept(run.model, batch) for letters, run in runs.items()}
    return [
        summary(f"recompute {letters}", agreement(first[letters], first[""]), turns[letters], turns[""])
        | {"processes": 1, "kept": round(bytes_kept[letters] / bytes_kept[""], 3), "kept_bytes": bytes_kept[letters]}
        for letters in LETTERS
    ]


def worker(rank: int, size: int, folder: Path, repeat: int, small: bool) -> None:
    """One process: all layouts of its size. The first writes the rows."""
    torch.set_num_threads(1)
    config, rows, length = (MODEL.replace(vocab_size=256), ROWS, 32) if small else (MODEL, ROWS, LENGTH)
    batch, found = batch_of(config.vocab_size, rows, length), list[dict[str, Any]]()
    if size == 1:
        found = recomputing(config, batch, repeat)
    else:
        store = dist.FileStore(str(folder / f"store-{size}"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
        for layout in LAYOUTS[size]:
            found.append(measured(layout, config, batch, repeat))
            if rank == 0:
                print(line(found[-1]), file=sys.stderr, flush=True)
    if rank == 0:
        (folder / f"rows-{size}.json").write_text(json.dumps(found))


def spread(size: int, folder: Path, repeat: int, small: bool) -> list[dict[str, Any]]:
    """The rows of one size, from processes of their own."""
    environ = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, "--repeat", str(repeat), *(["--small"] if small else [])]
    processes = [
        subprocess.Popen([*command, "--worker", str(rank), str(size), str(folder)], env=environ) for rank in range(size)
    ]
    for process in processes:
        process.wait()
    return json.loads((folder / f"rows-{size}.json").read_text())


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    head = f"{row['processes']}  {row['case']:18s}"
    if "red" in row:
        return f"{head} RED: {row['red']}"
    size = f"held {row['held']:.2f}" if "held" in row else f"kept {row['kept']:.2f}"
    return (
        f"{head} {row['wall_s'] * 1e3:7.0f} ms, alone {row['alone_wall_s'] * 1e3:5.0f} ms: {row['speedup']:4.2f}x; "
        f"CPU {row['cpu_s'] * 1e3:6.0f} ms, {row['overhead']:+.0%}; {size}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="1,2,4", help="numbers of processes")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="tiny rows: a try")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    parser.add_argument("--worker", nargs=3, metavar=("RANK", "SIZE", "FOLDER"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        rank, size, folder = asked.worker
        worker(int(rank), int(size), Path(folder), asked.repeat, asked.small)
        sys.stderr.flush()
        os._exit(0)  # torch on gloo now and then aborts while the interpreter closes
    result: dict[str, Any] = {
        "environment": environment() | {"threads": 1, "seed": SEED, "load_before": round(os.getloadavg()[0], 2)},
        "model": MODEL.pattern,
        "tokens": ROWS * LENGTH,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for size in map(int, asked.sizes.split(",")):
            result["rows"] += spread(size, Path(folder), asked.repeat, asked.small)
            if size == 1:
                print(*map(line, result["rows"]), sep="\n", file=sys.stderr)
    result["environment"]["load_after"] = round(os.getloadavg()[0], 2)
    if asked.save:
        (RESULTS / f"{asked.save}.json").write_text(json.dumps(result, indent=2) + "\n")
    if asked.json:
        print(json.dumps(result, indent=2))
    return 1 if any("red" in row for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
