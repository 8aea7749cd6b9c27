"""Trimaran on one GPU (an H200 is what the floors are of): kernels, whole models, a peer, training.

    python benchmarks/gpu.py --cases kernels,nano,qwen,transformers,train
    TRITON_INTERPRET=1 python benchmarks/gpu.py --cases kernels,nano --small --device cpu --output /tmp/gpu.json

    kernels       each twin at Nemotron 3 Nano's shapes: its floor, torch's form, fla-core and mamba-ssm where installed
    nano          nano-3 in bf16 with random weights (63 GB): prefill at 8k, decoding at 1, 8, 64, 256 rows of 8k
    qwen          qwen3-30b-a3b's shape in the same engine; the ratio at 8k in / 16k out stands beside the published 3.3
    transformers  13 layers of nano-3 in transformers on the same weights
    train         a hybrid of 2 billion with latent experts: tokens/s and model FLOPs utilisation

Each case is meant for less than 8 minutes and can be run on its own: its rows replace those of the same case in the
results file, with the versions, the hardware's name and the date of their own run. `--small` is a toy of every case
that runs anywhere, and is never written to the committed file. A case whose outputs differ is red and has no speed.
"""

import argparse
import importlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Scene

from trimaran.errors import Refusal
from trimaran.ops import backend
from trimaran.report import environment

RESULTS = Path(__file__).parent / "results" / "gpu.json"
CASES = {
    "kernels": "gpu_kernels:kernels",
    "nano": "gpu_models:nano",
    "qwen": "gpu_models:qwen",
    "transformers": "gpu_models:peer",
    "train": "gpu_models:train",
}
PUBLISHED_RATIO = 3.3  # Nano 3 over Qwen3-30B-A3B, one H200, 8k in / 16k out, fp8, best of vLLM and TensorRT-LLM


def run(case: str, scene: Scene) -> dict[str, Any]:
    """One case's rows and where they come from."""
    module, _, name = CASES[case].partition(":")
    started = time.perf_counter()
    rows = getattr(importlib.import_module(module), name)(scene)
    with backend.using(scene.backend):
        choice = backend.record()
    return {
        "environment": environment(),
        "seconds": round(time.perf_counter() - started, 1),
        "dtype": str(scene.dtype).removeprefix("torch."),
        "small": scene.small,
        "ops": choice,
        "rows": [tidy(row) for row in rows],
    }


def tidy(row: dict[str, Any]) -> dict[str, Any]:
    """Numbers with the digits that mean something."""
    return {name: shortened(value) for name, value in row.items()}


def shortened(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return tidy(value)
    return [shortened(one) for one in value] if isinstance(value, list) else value


def ratio(cases: dict[str, Any]) -> dict[str, float] | None:
    """Nano over Qwen at 8k in / 16k out, once both were measured at full size."""
    speeds = []
    for name in ("nano", "qwen"):
        case = cases.get(name)
        if case is None or case["small"]:
            return None
        speeds += [row["tokens_per_s"] for row in case["rows"] if row["work"] == "8k in, 16k out"]
    return {"ours": round(speeds[0] / speeds[1], 2), "published": PUBLISHED_RATIO} if len(speeds) == 2 else None


def merged(path: Path, case: str, found: dict[str, Any]) -> dict[str, Any]:
    """The results file with one case renewed."""
    held = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    held["cases"][case] = found
    held["nano_over_qwen"] = ratio(held["cases"])
    path.write_text(json.dumps(held, indent=1) + "\n")
    return held


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="toy sizes, on any device")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--backend", default="triton", help="ops.backend of ours")
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS.name} beside the other results")
    return parser.parse_args()


def main() -> None:
    given = asked()
    cases = given.cases.split(",")
    for case in cases:
        if case not in CASES:
            raise SystemExit(str(Refusal(f"case {case!r}", ", ".join(CASES), "correct --cases")))
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(str(Refusal("no GPU", "--device cpu --small", "run it where torch finds a GPU")))
    if given.small and given.output is None:
        raise SystemExit(str(Refusal("--small without --output", "a file of its own", "name one: toys are no results")))
    dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
    scene = Scene(given.device, dtype, given.small, given.repeat, given.backend)
    for case in cases:
        if given.device == "cuda":
            torch.zeros(1, device="cuda")  # in use: its name stands in the results
        found = run(case, scene)
        merged(given.output or RESULTS, case, found)
        print(json.dumps({case: found["rows"], "seconds": found["seconds"]}), flush=True)


if __name__ == "__main__":
    main()
