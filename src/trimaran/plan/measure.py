"""The machine at hand as `Hardware`: real training steps and real collectives, timed in processes started for it.

    peak, bandwidth   the quickest of several square matrix products, and large sums: what 1.0 of a share means
    reach             fitted to training steps of small models of every layer kind, whole and spread (probes.py)
    curves            every kind of collective at several sizes; the points themselves are kept, for two-point fits miss
                      the sizes in between

All processes compute at the same time, for they share caches and memory. Times are medians of the first process. Each
has one thread, as `trimaran train` gives it on a CPU. There messages are not hidden: gloo and FSDP2 wait for them. On a
GPU the same code measures with NCCL; that path has not been run.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trimaran.errors import Refusal
from trimaran.plan.hardware import COLLECTIVES, Hardware, Precision, Reach
from trimaran.plan.probes import PROBES, SPREAD, fitted, fitted_spread, spreads, stepper
from trimaran.report import environment

REPEATS, WARM = 7, 2
SIDES = (256, 384, 512, 768, 1024)  # of square products
SIZES = tuple(4**power for power in range(4, 13))  # bytes of messages: 256 B to 16 MiB
SCAN_OPERATIONS = 85  # operations per chunk of the reference scan, counted (forward)
PATIENCE = 900  # seconds for all of it, on a busy machine


def measure(processes: int, precision: Precision = "fp32") -> Hardware:
    """Figures of this machine for so many processes. About two minutes on two cores."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and torch.cuda.device_count() < processes:
        found = f"--measure with {processes} processes on {torch.cuda.device_count()} GPUs"
        raise Refusal(found, f"at most {torch.cuda.device_count()}", f"--gpus {torch.cuda.device_count()}")
    if device == "cuda":
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
    figures, made = gathered(processes, device, precision), environment()
    bare = Hardware(
        name=device,
        peak=figures["peak"],
        memory=memory,
        bandwidth=figures["bandwidth"],
        link=1e9,  # this and the next stand behind the curves
        network=1e9,
        domain=max(processes, 8),
        hides=device == "cuda",
        chunk_operations=SCAN_OPERATIONS,
        curves={kind: [tuple(point) for point in curve] for kind, curve in figures["curves"].items()},
        reach=Reach(matmul=1.0, attention=1.0, scan=1.0, memory=1.0, optimizer=1.0, tile=8, step=0.0),
        source=f"{made['gpu'] or made['cpu']}, {processes} processes, torch {made['torch']}, {made['date']}",
    )
    known = bare.replace(reach=fitted(bare, precision, figures["steps"]))
    return known.replace(reach=fitted_spread(known, precision, processes, figures["spread"]))


def gathered(processes: int, device: str, precision: Precision) -> dict[str, Any]:
    """What the processes measured."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        everybody = [
            context.Process(target=member, args=(rank, processes, folder, device, precision))
            for rank in range(processes)
        ]
        for process in everybody:
            process.start()
        began = time.monotonic()
        for process in everybody:
            process.join(max(0.0, PATIENCE - (time.monotonic() - began)))
            process.kill()
        result = Path(folder) / "figures.json"
        if not result.is_file():
            found = f"{processes} processes that did not finish together in {PATIENCE} s"
            raise Refusal(found, "processes joined by gloo or NCCL", "set GLOO_SOCKET_IFNAME=lo, or measure when idle")
        return dict(json.loads(result.read_text()))


def member(rank: int, processes: int, folder: str, kind: str, precision: Precision) -> None:
    """One of the processes. The first writes the times down, then all leave at once (torch on gloo now and then aborts
    while the interpreter closes)."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    warnings.simplefilter("ignore")  # newer torch has other names for the collectives, older does not know them
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    store = dist.FileStore(f"{folder}/store", processes)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes)
    figures = {
        "peak": {
            name: max(2 * side**3 / product_time(side, dtype, device) for side in SIDES)
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        },
        "bandwidth": bandwidth(device),
        "steps": [median(stepper(one, device, precision), device) for one in PROBES],
        "curves": {kind: [time_of(kind, size, rank, processes, device) for size in SIZES] for kind in COLLECTIVES},
        "spread": [
            median(stepper(one, device, precision, axes), device) for one in SPREAD for axes in spreads(processes)
        ],
    }
    if rank == 0:
        (Path(folder) / "part.json").write_text(json.dumps(figures))
        (Path(folder) / "part.json").rename(Path(folder) / "figures.json")
    dist.barrier()
    os._exit(0)


def median(work: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a few runs that all processes begin together, after two that are not timed."""
    times = []
    for _ in range(WARM + REPEATS):
        settle(device)
        dist.barrier()
        began = time.perf_counter()
        work()
        settle(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM:])


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_time(side: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return median(lambda: a @ b, device)


def bandwidth(device: torch.device) -> float:
    """Bytes/s of adding two large vectors into a third."""
    a, b, out = (torch.ones(1 << 24, device=device) for _ in range(3))
    return 3 * 4 * len(a) / median(lambda: torch.add(a, b, out=out), device)


def time_of(kind: str, size: int, rank: int, processes: int, device: torch.device) -> tuple[float, float]:
    """Bytes on the wire per process, and the median seconds of one collective over a buffer of `size` bytes."""
    length = max(1, size // 4 // processes)
    whole = torch.ones(length * processes, device=device)
    piece = torch.ones(length, device=device)
    share = (processes - 1) / processes
    if kind == "all_reduce":
        return 2 * share * 4 * len(whole), median(lambda: dist.all_reduce(whole), device)
    if kind == "all_gather":
        return share * 4 * len(whole), median(lambda: dist.all_gather_into_tensor(whole, piece), device)
    if kind == "reduce_scatter":
        return share * 4 * len(whole), median(lambda: dist.reduce_scatter_tensor(piece, whole), device)
    if kind == "all_to_all":
        other = torch.empty_like(whole)
        return share * 4 * len(whole), median(lambda: dist.all_to_all_single(other, whole), device)
    return float(4 * len(whole)), median(lambda: there_and_back(whole, rank), device) / 2


def there_and_back(tensor: torch.Tensor, rank: int) -> None:
    """Two sends between the first two processes; the others look on."""
    if rank == 0:
        dist.send(tensor, 1)
        dist.recv(tensor, 1)
    elif rank == 1:
        dist.recv(tensor, 0)
        dist.send(tensor, 0)
