"""`trimaran train` in several processes as torchrun would start them, but forked in milliseconds; and what is watched.

The launcher itself is in test_launch.py. Processes are judged by what they wrote and by their exit codes.
"""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.parallel.compare import apart
from tests.train import runs
from trimaran import cli

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
PATIENCE = 90  # seconds until a process counts as hung


def die_at(number: int) -> None:
    """This process is killed as it asks for the numbered file operation under checkpoints/ from now on."""
    seen = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in EVENTS and "/checkpoints" in str(arguments[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def rank_of(rank: int, size: int, port: int, path: str, overrides: list[str], log: str, death: int) -> None:
    """One process: `trimaran train PATH OVERRIDES`, its words in the file `log`. death: see `die_at`; 0: none."""
    torch.set_num_threads(1)
    if death:
        die_at(death)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        cli.main(["train", path, *overrides])


def server() -> ForkServerContext:
    """As that of `runs`, with what several processes import late."""
    context = runs.server()
    imported = ["tests.train.runs", "trimaran.train.pretrain", "trimaran.train.sharded", "torch.distributed.fsdp"]
    context.set_forkserver_preload(imported)
    return context


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start(path: Path, size: int, *overrides: str, deaths: Mapping[int, int] | None = None) -> list[ForkServerProcess]:
    """`trimaran train` over `size` processes, by fsdp unless overrides say otherwise; rank-N.log beside the recipe.

    deaths: rank -> the file operation at which it dies.
    """
    port = free_port()
    words = [f"parallel.fsdp={size}", *overrides]
    if size == 1:
        return [runs.start(path, *overrides)]
    found = []
    for rank in range(size):
        log = str(path.with_name(f"rank-{rank}.log"))
        death = (deaths or {}).get(rank, 0)
        found.append(server().Process(target=rank_of, args=(rank, size, port, str(path), words, log, death)))
    for process in found:
        process.start()
    return found


def ended(processes: list[ForkServerProcess]) -> list[int | None]:
    """Exit codes; what still runs after PATIENCE is killed and has none."""
    until = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    hung = [process for process in processes if process.exitcode is None]
    for process in hung:
        process.kill()
        process.join()
    return [None if process in hung else process.exitcode for process in processes]


def finish(path: Path, size: int, *overrides: str) -> Path:
    """Runs to the last step; the run folder."""
    codes = ended(start(path, size, *overrides))
    words = "\n".join(log.read_text() for log in sorted(path.parent.glob("*.log")))
    assert codes == [0] * size, (codes, words)
    return path.parent / "run"


def until(met: Callable[[], bool], processes: list[ForkServerProcess]) -> bool:
    """Waits until something is so; False where the processes were gone before."""
    while not met():
        if not all(process.is_alive() for process in processes):
            return False
        time.sleep(0.002)
    return True


def check_near(run: Path, truth: Path, tolerance: float) -> None:
    """The weights of two hub folders; 0: the same bits."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run, truth))
    assert ours.keys() == theirs.keys()
    wrong = {name: apart(ours[name], theirs[name]) for name in theirs}
    assert max(wrong.values()) <= tolerance, max(wrong.items(), key=lambda one: one[1])
