"""The engine, measured: throughput beside transformers, shared prompts, shared attention, drafts, long contexts.

    python benchmarks/engine.py --save engine                     # all cases; writes results/engine.json and engine.png
    python benchmarks/engine.py --cases prefix,sharing --repeat 5
    python benchmarks/engine.py --save engine --resume            # only the cases that engine.json lacks
    python benchmarks/engine.py --small --run runs/demo           # a try of seconds, whose numbers mean nothing

    throughput    tokens/s at 1, 8 and 32 requests at once against transformers' `generate` (static batch, padded on
                  the left) on the same weights, and against its continuous batching where that takes the architecture
    prefix        time to the first token behind a prefix of 4096 tokens, read anew and taken from the cache
    sharing       bytes of keys and values read for b samples of one prompt, against the formula of bifurcated
                  attention (arXiv 2403.08845, appendix E.2), and the time of a pass beside the dense path
    speculation   drafts of a trained model (--run, as `trimaran demo` leaves it): tokens per pass, and time against
                  none
    context       the time of a token behind 1k to 16k tokens, for a hybrid and for attention alone, of one size

Tokens are compared before any speed is told. Two sides may part where that is a matter of rounding: where the top two
logits are at most 1e-4 apart, or a draw's number lies within 1e-4 of the border between the two tokens. A text that
parts elsewhere makes its row red: no speed, exit code 1. Sides take turns, so that noise meets all; medians of
`--repeat` turns (two where a turn takes over 20 s). Process CPU time stands beside wall time.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine_cases import CASES, FULL, MODELS, SMALL, Asked

from trimaran.model.hybrid import build
from trimaran.report import environment

RESULTS = Path(__file__).parent / "results"


def conditions(asked: Asked, seconds: float, burnt: float) -> dict[str, Any]:
    """Under which a case was measured."""
    millions = {
        name: round(sum(p.numel() for p in build(config, device="meta").parameters()) / 1e6, 2)
        for name, config in MODELS.items()
    }
    return environment() | {
        "dtype": "float32",
        "seeds": "0 (prefix: 0 up to repeat - 1); weights: 0",
        "scale": "full" if asked.scale == FULL else "small",
        "run": asked.run.name,
        "million_parameters": millions,
        "load": round(os.getloadavg()[0], 2),
        "case_wall_s": round(seconds, 1),
        "case_cpu_s": round(burnt, 1),
    }


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    return "  ".join(f"{name} {value}" for name, value in row.items())


def measured(name: str, asked: Asked) -> dict[str, Any]:
    """One case, told while it grows."""
    began, burnt, rows = time.perf_counter(), time.process_time(), []
    for row in CASES[name](asked):
        rows.append(row)
        print(f"{time.perf_counter() - began:5.0f} s  {name:11s} {line(row)}", file=sys.stderr, flush=True)
    made_on = conditions(asked, time.perf_counter() - began, time.process_time() - burnt)
    return {"conditions": made_on, "rows": rows}


def red(result: dict[str, Any]) -> bool:
    return any("red" in row for case in result.values() for row in case["rows"])


def picture(result: dict[str, Any], path: Path) -> None:
    """A panel per case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    across = min(3, len(result))
    down = -(-len(result) // across)
    figure, axes = plt.subplots(down, across, figsize=(4.6 * across, 3.8 * down), squeeze=False)
    for axis in axes.flat[len(result) :]:
        axis.set_axis_off()
    for axis, (name, case) in zip(axes.flat, result.items(), strict=False):
        axis.set_title(name)
        PANELS[name](axis, [row for row in case["rows"] if "red" not in row])
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def bars(axis: Any, names: list[str], values: list[float], ylabel: str) -> None:
    axis.bar_label(axis.bar(range(len(names)), values, 0.7), fmt="%.2f", fontsize=7)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7)
    axis.set_ylabel(ylabel)


def curves(axis: Any, x: list[float], lines: dict[str, list[float]], xlabel: str) -> None:
    for name, values in lines.items():
        axis.plot(x, values, marker="o", markersize=3, label=name)
    top = 1.1 * max((value for values in lines.values() for value in values), default=1)
    axis.set(xlabel=xlabel, ylabel="ms per pass", ylim=(0, top))
    axis.legend(frameon=False)


def throughput_panel(axis: Any, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if "ratio" in row]
    names = [f"{row['concurrent']} {row['lengths']}, {row['peer']}" for row in rows]
    bars(axis, names, [row["ratio"] for row in rows], "speed, transformers = 1")


def prefix_panel(axis: Any, rows: list[dict[str, Any]]) -> None:
    names = [f"{row['prefix']} {'turn' if row['marked_turn'] else 'anywhere'}" for row in rows]
    bars(axis, names, [row["ratio"] for row in rows], "first token, without cache = 1")


def sharing_panel(axis: Any, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if "rows" in row]
    lines = {name: [row[f"{name}_ms"] for row in rows] for name in ("shared", "dense")}
    curves(axis, [row["rows"] for row in rows], lines, "samples of one prompt")


def speculation_panel(axis: Any, rows: list[dict[str, Any]]) -> None:
    names = [name for name in dict.fromkeys(row["drafter"] for row in rows) if name != "none"]
    for batch, temperature in dict.fromkeys((row["batch"], row["temperature"]) for row in rows):
        here = [row for row in rows if (row["batch"], row["temperature"]) == (batch, temperature)]
        ratio = {row["drafter"]: row["ratio"] for row in here}
        known = [name for name in names if name in ratio]
        label = f"batch {batch}, temperature {temperature:g}"
        axis.plot(
            [names.index(name) for name in known], [ratio[name] for name in known], "o", markersize=5, label=label
        )
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7)
    axis.set_ylabel("speed, no drafts = 1")
    axis.set_ylim(0, None)
    axis.legend(frameon=False, fontsize=7)


def context_panel(axis: Any, rows: list[dict[str, Any]]) -> None:
    lines = {name: [row[f"{name}_ms"] for row in rows] for name in ("hybrid", "attention")}
    curves(axis, [row["context"] for row in rows], lines, "tokens before")


PANELS: dict[str, Callable[[Any, list[dict[str, Any]]], None]] = {
    "throughput": throughput_panel,
    "prefix": prefix_panel,
    "sharing": sharing_panel,
    "speculation": speculation_panel,
    "context": context_panel,
}


def chosen(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in CASES:
            raise SystemExit(f"{name!r} is not one of {', '.join(CASES)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--repeat", type=int, default=3, help="turns of each side")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a run folder with a draft block")
    parser.add_argument("--small", action="store_true", help="a try of seconds, whose numbers mean nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json and NAME.png, other cases there kept")
    parser.add_argument("--resume", action="store_true", help="with --save: skip cases that NAME.json has")
    given = parser.parse_args()
    names = chosen(given.cases)
    if "speculation" in names and not (given.run / "config.json").is_file():
        raise SystemExit(f"no run folder {str(given.run)!r}: `trimaran demo` makes one, or give --run")
    torch.set_num_threads(given.threads)
    asked = Asked(SMALL if given.small else FULL, given.repeat, given.run)
    path = RESULTS / f"{given.save}.json" if given.save else None
    found = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
    result: dict[str, Any] = {}
    for name in names:
        if given.resume and name in found:
            print(f"        {name:11s} is there already", file=sys.stderr)
        else:
            result[name] = found[name] = measured(name, asked)
        if path is not None:
            found = {case: found[case] for case in CASES if case in found}
            RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            picture(found, path.with_suffix(".png"))
    if given.json:
        print(json.dumps(result, indent=1))
    return 1 if red(result) else 0


if __name__ == "__main__":
    sys.exit(main())
