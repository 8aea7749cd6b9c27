"""How long each verb takes from the command to its end, medians over runs of the real program.

    python benchmarks/verbs.py runs/demo            # a run folder that `trimaran demo` left
    python benchmarks/verbs.py runs/demo --demo     # and once `trimaran demo` itself, about three minutes
    python benchmarks/verbs.py runs/life --full     # a folder that `trimaran demo --full` left, in one go
    python benchmarks/verbs.py runs/life --full --save verbs-amx

Writes benchmarks/results/verbs.json, or NAME.json; what is not asked for keeps the time the file has.
"""

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from trimaran.evals.run import RESULTS as SCORES
from trimaran.report import environment
from trimaran.train.folder import RESULT

RESULTS = Path(__file__).parent / "results"
REPEAT = 5


def seconds(command: list[str], said: str = "") -> float:
    """Median wall time of a command that must succeed; `said` is its standard input."""
    taken = []
    for _ in range(REPEAT):
        began = time.perf_counter()
        subprocess.run(command, check=True, input=said, text=True, capture_output=True)
        taken.append(time.perf_counter() - began)
    return round(statistics.median(taken), 2)


def until_served(command: list[str]) -> float:
    """Median wall time from `trimaran serve` to its first healthy answer."""
    taken = []
    for _ in range(REPEAT):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        began = time.perf_counter()
        with subprocess.Popen([*command, f"serve.port={port}"], stdout=subprocess.DEVNULL) as server:
            while not healthy(port) and server.poll() is None:
                time.sleep(0.01)
            taken.append(time.perf_counter() - began)
            server.terminate()
        if server.returncode:
            raise SystemExit(f"trimaran serve ended with {server.returncode}")
    return round(statistics.median(taken), 2)


def healthy(port: int) -> bool:
    with contextlib.suppress(urllib.error.URLError, ConnectionError):
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200)
    return False


def demo(trimaran: list[str]) -> dict[str, float]:
    """One `trimaran demo` from nothing: seconds of the whole command, and of the training in it."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run([*trimaran, "demo", f"run={folder}/demo"], check=True, capture_output=True)
        whole = time.perf_counter() - began
        result = json.loads((Path(folder) / "demo" / RESULT).read_text(encoding="utf-8"))
    return {"whole": round(whole, 1), "training": round(result["wall_s"], 1), "cpu": round(result["cpu_s"], 1)}


def full(run: Path) -> dict[str, Any]:
    """How long the `trimaran demo --full` took that left `run`: from its first file to its last, and by stages."""
    recipe = run / "recipe.toml"
    stages = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in run.glob(f"stages/*/{RESULT}")}
    base = json.loads((run / RESULT).read_text(encoding="utf-8"))
    trained = {"pretrain": base} | dict(sorted(stages.items(), key=lambda stage: stage[1]["made_on"]["date"]))
    return {
        "whole": round((run / SCORES).stat().st_mtime - recipe.stat().st_mtime, 1),
        "training": {name: round(result["wall_s"], 1) for name, result in trained.items()},
        "made_on": base["made_on"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--save", metavar="NAME", default="verbs")
    asked = parser.parse_args()
    path = RESULTS / f"{asked.save}.json"
    run, trimaran = str(asked.run), [str(Path(sys.executable).with_name("trimaran"))]
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    document = {
        "seconds": {
            "trimaran --help": seconds([*trimaran, "--help"]),
            "trimaran show nano-3": seconds([*trimaran, "show", "nano-3"]),
            "trimaran show super-3": seconds([*trimaran, "show", "super-3"]),
            "trimaran generate, 1 token": seconds([*trimaran, "generate", run, "def ", "max_tokens=1"]),
            "trimaran generate, 128 tokens": seconds([*trimaran, "generate", run, "def ", "max_tokens=128", "seed=0"]),
            "trimaran chat, one line, 64 tokens": seconds([*trimaran, "chat", run, "max_tokens=64"], "class Queue:\n"),
            "trimaran serve, until it answers": until_served([*trimaran, "serve", run]),
        },
        "repeat": REPEAT,
        "demo_s": demo(trimaran) if asked.demo else kept.get("demo_s"),
        "full_s": full(asked.run) if asked.full else kept.get("full_s"),
        "made_on": environment(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
