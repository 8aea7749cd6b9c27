"""Trimaran against its peers on a CPU: training step, prefill, decoding, with the same weights in the same run.

    python benchmarks/cpu.py --peers transformers,llama.cpp --cases train,prefill,decode --json
    python benchmarks/cpu.py --cases tiny,memory,start

Ours and the peers take turns, so that noise meets all; medians of `--repeat` turns. The outputs of the first and of the
last turn are compared: a case in which a side differs is reported as red, without a speed. Process CPU time stands
beside wall time.

    transformers  at its defaults, in this process (cpu_sides.py)
    llama.cpp     BF16 (or F32) GGUF, in a process of its own; fetched and built once (llamacpp.py). It does not train
    trial         the case `tiny` in plain torch (trial.py): the same weights, tokens and loss

bf16 means bf16 weights in inference, and autocast over fp32 weights in training. `memory` and `start` are whole
processes, see cpu_processes.py.
"""

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cpu_processes
import llamacpp
import torch
import trial
from cpu_sides import (
    DTYPES,
    MODELS,
    OURS,
    TINY,
    TRANSFORMERS,
    Side,
    case_tokens,
    load_transformers,
    side,
    tiny_training,
)

from trimaran.errors import Refusal
from trimaran.model import hub
from trimaran.model.hybrid import build
from trimaran.ops import backend
from trimaran.ops.memory import keep_freed_memory
from trimaran.report import environment

RESULTS = Path(__file__).parent / "results"
CASES = {
    "tiny": ("train 8x256",),
    "train": ("train 4x512",),
    "prefill": ("prefill 512", "prefill 2048", "prefill 8192"),
    "decode": ("decode b1", "decode b8", "decode b32"),
    "memory": ("memory train", "memory prefill"),
    "start": ("start",),
}
PEERS = ("transformers", "llama.cpp", "trial")
AGREE = {"fp32": 1e-3, "bf16": 5e-2}  # largest relative L2 distance of logits (and of the loss) to a peer's
AGREE_EXPERTS = {"fp32": 1e-3, "bf16": 1e-1}  # where bf16 decides a near tie of the router, other experts are chosen


def take_turns(sides: dict[str, Side], repeat: int) -> tuple[dict[str, float], dict[str, list[tuple[float, float]]]]:
    """Largest relative distance of each side's outputs from the first side's, and (wall, CPU) seconds of its turns.

    The first turn of each side warms up and is not timed; the outputs of it and of the last turn are compared.
    """
    outputs = {name: [side.turn().double()] for name, side in sides.items()}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(repeat):
        for name, one in sides.items():
            started, burnt = time.perf_counter(), time.process_time()
            output = one.turn()
            seconds = time.perf_counter() - started, time.process_time() - burnt
            spent[name].append(one.spent() if one.spent else seconds)
            outputs[name][1:] = [output.double()]
    ours = next(iter(outputs.values()))
    apart = {
        name: max(float((mine - other).norm() / other.norm()) for mine, other in zip(ours, theirs))
        for name, theirs in list(outputs.items())[1:]
    }
    return apart, spent


def row(case: str, model: str, dtype: str, sides: dict[str, Side], repeat: int) -> dict[str, Any]:
    """Tokens per second of `sides`, ours first; `ratio` is ours over a peer's, `cpu_ratio` the same by CPU time."""
    apart, spent = take_turns(sides, repeat)
    result: dict[str, Any] = {"case": case, "model": model, "dtype": dtype, "repeats": repeat}
    allowed = (AGREE_EXPERTS if model in MODELS and "E" in MODELS[model].pattern else AGREE)[dtype]
    red = [f"{name}: outputs {far:.1e} apart" for name, far in apart.items() if not far <= allowed]
    if red:
        return {**result, "red": f"{'; '.join(red)}, allowed {allowed:.0e}: no speed reported"}
    wall = {name: statistics.median(seconds for seconds, _ in turns) for name, turns in spent.items()}
    burnt = {name: statistics.median(seconds for _, seconds in turns) for name, turns in spent.items()}
    ours, *peers = sides
    result |= {"ours": round(sides[ours].tokens / wall[ours], 1), "cpu_s": round(burnt[ours], 3), "peers": {}}
    for name in peers:
        result["peers"][name] = {
            "speed": round(sides[name].tokens / wall[name], 1),
            "ratio": round(wall[name] / wall[ours], 3),
            "cpu_s": round(burnt[name], 3),
            "cpu_ratio": round(burnt[name] / burnt[ours], 3),
            "apart": float(f"{apart[name]:.1e}"),
        }
    return result


def tiny_row(peers: list[str], repeat: int) -> dict[str, Any]:
    """The demo's model in training, beside the trial."""
    model = build(TINY)
    theirs = {"trial": trial.tiny_side(model)} if "trial" in peers else {}  # copies the weights before they change
    sides = {"ours": tiny_training(model), **theirs}
    return row("train 8x256", "tiny", "bf16", sides, repeat)


class Bench:
    """One model in one dtype: its hub folder, and what the sides open from it."""

    def __init__(self, name: str, dtype: str, asked: argparse.Namespace, built: llamacpp.Built | None):
        self.name, self.dtype, self.asked, self.built = name, dtype, asked, built
        self.vocab = MODELS[name].vocab_size

    def rows(self, folder: Path, cases: list[str]) -> Iterator[dict[str, Any]]:
        """Inference first; training changes the weights and has its own copies."""
        inference = CASES["prefill"] + CASES["decode"]
        for stored, kind in ((DTYPES[self.dtype], inference), (torch.float32, CASES["train"])):
            chosen = [case for case in cases if case in kind]
            if not chosen:
                continue
            with ExitStack() as stack:
                turns = self.llama(folder, stack) if kind == inference else None
                ours = hub.load(folder, dtype=stored)
                theirs = load_transformers(str(folder), stored) if "transformers" in self.asked.peers else None
                for case in chosen:
                    yield self.one(case, ours, theirs, turns)

    def llama(self, folder: Path, stack: ExitStack) -> llamacpp.Turns | None:
        if self.built is None:
            return None
        gguf = llamacpp.convert(self.built, folder, self.dtype)
        return stack.enter_context(llamacpp.Turns(self.built, gguf, self.asked.threads))

    def one(self, case: str, ours: Any, theirs: Any, turns: llamacpp.Turns | None) -> dict[str, Any]:
        repeat, tokens = self.asked.repeat, case_tokens(case, self.vocab)
        sides = {"ours": side(OURS, case, self.dtype, ours, self.vocab)}
        if theirs is not None:
            sides["transformers"] = side(TRANSFORMERS, case, self.dtype, theirs, self.vocab)
        if turns is not None:
            sides["llama.cpp"] = turns.side(case, tokens, repeat + 1)
        found = row(case, self.name, self.dtype, sides, repeat)
        if turns is not None and "red" not in found:
            told = turns.own_tool(case, tokens)
            found["peers"]["llama.cpp"]["own_tool"] = None if told is None else round(told, 1)
        return found


def measure(cases: list[str], models: list[str], dtypes: list[str], asked: argparse.Namespace) -> Iterator[Any]:
    """One row after the other."""
    if "transformers" in asked.peers:
        install_transformers()
    if "train 8x256" in cases:
        yield tiny_row(asked.peers, 4 * asked.repeat)
    built = llamacpp.install(asked.cache, announce) if "llama.cpp" in asked.peers else None
    for name in models:
        with tempfile.TemporaryDirectory() as place:
            hub.save(build(MODELS[name]), place)
            for dtype in dtypes:
                yield from Bench(name, dtype, asked, built).rows(Path(place), cases)
            yield from cpu_processes.rows(name, Path(place), cases, asked)


def install_transformers() -> None:
    """Into this environment, and only where there is none."""
    if importlib.util.find_spec("transformers") is None:
        announce("transformers: installing the newest with pip")
        subprocess.run([sys.executable, "-m", "pip", "install", "transformers>=5"], check=True, stdout=sys.stderr)
        importlib.invalidate_caches()


def announce(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def line(result: dict[str, Any]) -> str:
    """A row as text."""
    head = f"{result['model']:7s} {result['dtype']:5s} {result['case']:14s}"
    if "red" in result:
        return f"{head} RED: {result['red']}"
    if "text" in result:
        return f"{head} {result['text']}"
    peers = [
        f"{name} {peer['speed']:.1f} ({peer['ratio']:.2f}x wall, {peer['cpu_ratio']:.2f}x CPU)"
        for name, peer in result["peers"].items()
    ]
    return f"{head} {result['ours']:9.1f} tok/s ({result['cpu_s']:.2f} s CPU)   {'   '.join(peers)}"


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of ours over a peer's speed, one panel per dtype and peer; 1 is the peer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [found for found in rows if found.get("peers") and found["model"] in MODELS]
    panels = list(dict.fromkeys((found["dtype"], peer) for found in rows for peer in found["peers"]))
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 3.6), squeeze=False)
    for axis, (dtype, peer) in zip(axes[0], panels):
        panel(axis, [found for found in rows if found["dtype"] == dtype and peer in found["peers"]], peer)
        axis.set_title(f"{dtype}, {peer} = 1")
    axes[0][0].set_ylabel("speed of ours / speed of the peer")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def panel(axis: Any, rows: list[dict[str, Any]], peer: str) -> None:
    models = list(dict.fromkeys(found["model"] for found in rows))
    cases = list(dict.fromkeys(found["case"] for found in rows))
    for n, model in enumerate(models):
        ratio = {found["case"]: found["peers"][peer]["ratio"] for found in rows if found["model"] == model}
        places = [place + 0.8 * n / len(models) for place in range(len(cases))]
        bars = axis.bar(places, [ratio.get(case, 0) for case in cases], 0.75 / len(models), label=model)
        axis.bar_label(bars, fmt="%.2f", fontsize=6)
    axis.axhline(1, color="black", linewidth=0.8)
    middle = 0.4 - 0.4 / len(models)
    axis.set_xticks([place + middle for place in range(len(cases))], cases, rotation=40, ha="right")
    axis.legend(frameon=False)


def choice(allowed: list[str], text: str) -> list[str]:
    asked = text.split(",")
    for word in asked:
        if word not in allowed:
            raise SystemExit(f"{word!r} is not one of {', '.join(allowed)}")
    return asked


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", default="transformers,trial", help=", ".join(PEERS))
    parser.add_argument("--cases", default="tiny,train,prefill,decode", help="kinds, or single cases as in the table")
    parser.add_argument("--models", default="dense,moe,moelat")
    parser.add_argument("--dtypes", default="bf16", help="fp32, bf16")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--backend", default="auto", help="which fast forms of ours may run, as ops.backend has it")
    parser.add_argument("--cache", type=Path, default=llamacpp.CACHE, help="folder in which llama.cpp is built, once")
    parser.add_argument("--keep-memory", action="store_true", help="freed memory stays with the process (both sides)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json and NAME.png")
    asked = parser.parse_args()
    asked.peers = choice([*PEERS], asked.peers)
    return asked


def conditions(asked: argparse.Namespace) -> dict[str, Any]:
    """Versions, machine, settings."""
    found = environment() | {"isa": torch.backends.cpu.get_cpu_capability(), "ops": backend.record()}
    found |= {"keep_memory": asked.keep_memory and keep_freed_memory(), "load_before": round(os.getloadavg()[0], 2)}
    return found | ({"llama_cpp_python": llamacpp.VERSION} if "llama.cpp" in asked.peers else {})


def main() -> int:
    asked = arguments()
    single = [case for kind in CASES.values() for case in kind]
    cases = [case for word in choice([*CASES, *single], asked.cases) for case in (CASES.get(word) or (word,))]
    models, dtypes = choice([*MODELS], asked.models), choice([*DTYPES], asked.dtypes)
    torch.set_num_threads(asked.threads)
    started = time.monotonic()
    try:
        backend.choose(asked.backend)
        result: dict[str, Any] = {"conditions": conditions(asked), "rows": []}
        for found in measure(cases, models, dtypes, asked):
            result["rows"].append(found)
            announce(f"{time.monotonic() - started:5.0f} s  {line(found)}")
            if asked.save:  # after every row: the run is long
                (RESULTS / f"{asked.save}.json").write_text(json.dumps(result, indent=2) + "\n")
    except Refusal as problem:
        raise SystemExit(f"cpu.py: {problem}") from None
    if asked.save:
        picture(result["rows"], RESULTS / f"{asked.save}.png")
    if asked.json:
        print(json.dumps(result, indent=2))
    return 1 if any("red" in found for found in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
