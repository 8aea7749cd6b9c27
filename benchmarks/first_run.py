"""The first run, measured: the demo's hybrid and its attention-only control, three seeds each, one after the other.

    python benchmarks/first_run.py                       # both, seeds 0 1 2; about twenty minutes on two idle cores
    python benchmarks/first_run.py --only hybrid --seeds 0

Every run is a process of its own (`trimaran train RECIPE run=… seed=…`), so that its wall and CPU time are whole. The
bigram model is fitted on the same tokens. Writes benchmarks/results/first_run.json, and for the control the mean that
the demo shows (src/trimaran/demo/control.json).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trimaran.data.shards import TokenShards
from trimaran.demo import bigram
from trimaran.demo.run import ATTENTION_ONLY, CONTROL, HYBRID
from trimaran.report import environment
from trimaran.train.folder import RESULT

RESULTS = Path(__file__).parent / "results" / "first_run.json"
RECIPES = {"hybrid": HYBRID, "attention": ATTENTION_ONLY}


def run(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run from nothing: bits per byte on the held-out packages beside the bigram's, and what it took."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "trimaran", "train", str(RECIPES[name]), f"run={folder}", f"seed={seed}"]
    subprocess.run(command, check=True)
    wall = time.perf_counter() - began
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    training, held_out = (TokenShards(folder / "data" / part / "stdlib") for part in ("training", "held_out"))
    yardstick = bigram.bits_per_byte(training, held_out, training.vocab_size)
    return {
        "model": name,
        "seed": seed,
        "bits_per_byte": result["bits_per_byte"],
        "bigram": yardstick,
        "ratio": result["bits_per_byte"] / yardstick,
        "wall_s": round(wall, 1),
        "training_wall_s": result["wall_s"],
        "training_cpu_s": result["cpu_s"],
        "steps": result["steps"],
        "tokens": result["tokens"],
        "parameters": result["parameters"],
        "active": result["active"],
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and range over the seeds of one model."""
    reached = [row["bits_per_byte"] for row in rows]
    ratios = [row["ratio"] for row in rows]
    return {
        "seeds": len(rows),
        "mean": statistics.mean(reached),
        "range": [min(reached), max(reached)],
        "ratio_mean": statistics.mean(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "wall_s_mean": statistics.mean(row["wall_s"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=RECIPES, help="one of the two")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else list(RECIPES)
    known = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {"runs": []}
    rows = [row for row in known["runs"] if row["model"] not in names]
    for seed in arguments.seeds:
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(run(name, seed, Path(folder) / "run"))
            print(json.dumps(rows[-1]), flush=True)
    found = {name: summary(mine) for name in RECIPES if (mine := [row for row in rows if row["model"] == name])}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"summary": found, "runs": rows, "made_on": environment()}, indent=1) + "\n")
    if "attention" in names and arguments.out == RESULTS:
        CONTROL.write_text(json.dumps(found["attention"] | {"made_on": environment()}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
