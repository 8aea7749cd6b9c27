"""Process groups of 2 and 4 gloo ranks that run test cases.

A case is a function `case(world_size: int) -> None` in a module named `cases_*.py` of this folder, listed in that
module's `CASES = {"name": (ranks, function)}`. All cases of one world size run in one process group, one behind the
other; `tests/parallel/test_cases.py` has one test per case. A case that raises on any rank is noted with its traceback
and the group goes on, unless ranks are left behind in a collective: then the group is ended by its time limit, and
the cases after it say so.

Every rank writes its findings after each case, then leaves by os._exit: torch on gloo now and then aborts while the
interpreter closes (an old fault of destructors), after all work is done.
"""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

HERE = Path(__file__).parent
SIZES = (2, 4)
PATIENCE = 60  # seconds that a collective waits for the others
LIMIT = 600  # seconds for all cases of a size

Case = Callable[[int], None]


def cases() -> dict[str, tuple[int, Case]]:
    """Name -> (ranks, function) of all modules beside this one."""
    found: dict[str, tuple[int, Case]] = {}
    for module in pkgutil.iter_modules([str(HERE)]):
        if module.name.startswith("cases_"):
            for name, case in importlib.import_module(f"tests.parallel.{module.name}").CASES.items():
                assert name not in found, f"two cases are named {name}"
                found[name] = case
    return found


def run(size: int, names: list[str], folder: Path) -> dict[str, str]:
    """Runs the named cases in `size` processes. Name -> "" where all ranks were content, else what went wrong."""
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONFAULTHANDLER": "1"}
    environment["RANKS_STORE"] = tempfile.mktemp(dir=folder)
    processes = []
    for rank in range(size):
        with open(folder / f"rank-{rank}.log", "wb") as log:
            command = [sys.executable, "-m", "tests.parallel.ranks", str(rank), str(size), str(folder), *names]
            processes.append(
                subprocess.Popen(command, cwd=HERE.parents[1], env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        for process in processes:
            process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {name: "\n".join(filter(None, (verdict(folder, rank, name) for rank in range(size)))) for name in names}


def verdict(folder: Path, rank: int, name: str) -> str:
    """What rank `rank` found out about the case: "" where it passed."""
    path = folder / f"rank-{rank}.json"
    findings: Mapping[str, str] = json.loads(path.read_text()) if path.is_file() else {}
    if name in findings:
        return f"rank {rank}:\n{findings[name]}" if findings[name] else ""
    log = (folder / f"rank-{rank}.log").read_text(errors="replace")[-2000:]
    return f"rank {rank} did not get to the end of {name}; after {list(findings)}\n{log}"


def rank_main(rank: int, size: int, folder: Path, names: list[str]) -> None:
    """One process: all its cases, each with a barrier in front."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    wait = timedelta(seconds=PATIENCE)
    store = dist.FileStore(os.environ["RANKS_STORE"], size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
    known, findings = cases(), dict[str, str]()
    for name in names:
        torch.manual_seed(0)
        began, busy = time.monotonic(), time.process_time()
        try:
            known[name][1](size)
            findings[name] = ""
        except Exception:
            findings[name] = traceback.format_exc()
        print(f"{name}: {time.monotonic() - began:.1f} s, {time.process_time() - busy:.1f} s of CPU", flush=True)
        partial = folder / f"rank-{rank}.partial"
        partial.write_text(json.dumps(findings))
        partial.replace(folder / f"rank-{rank}.json")
        dist.barrier()


if __name__ == "__main__":
    code = 1
    try:
        rank_main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
