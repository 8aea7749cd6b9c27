"""Cases of benchmarks/cpu.py that need a process each: memory, and the time to the first token of a command.

    memory train     peak resident memory of a training step 4x512, ours and transformers
    memory prefill   peak resident memory of a prompt of 2k, 8k and 32k tokens; flat within 15 % (ours)
    start            seconds from the command `trimaran generate FOLDER` to its first token on stdout

    python benchmarks/cpu_processes.py SIDE KIND FOLDER DTYPE THREADS LENGTH BACKEND    # one measurement, as JSON

The peak is that of the work, model included: the kernel's high-water mark is set back once the model is loaded, where
it can be (Linux), since loading reads files that count as memory too.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cpu_sides import DTYPES, OURS, TRANSFORMERS, Side, load_transformers, side

from trimaran.model import hub
from trimaran.model.config import ATTENTION, ModelConfig
from trimaran.ops import backend
from trimaran.text.tokenizer import Tokenizer

LENGTHS = (2048, 8192, 32768)
FLAT = 1.15  # largest peak over the smallest, of all lengths
MIB = 2**20


def rows(model: str, folder: Path, cases: list[str], asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one model, whose fp32 weights lie in `folder`; all in bf16."""
    kinds = {"memory train": memory_of_training, "memory prefill": memory_of_prefill, "start": start}
    for case in [case for case in kinds if case in cases]:
        found = {"case": case, "model": model, "dtype": "fp32" if case == "start" else "bf16"}
        try:
            yield found | kinds[case](folder, asked)
        except Failed as problem:
            yield found | {"red": str(problem)}


class Failed(Exception):
    """A process that did not end well; the benchmark goes on with the next case."""


def memory_of_training(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    names = ["ours", *(["transformers"] if "transformers" in asked.peers else [])]
    peaks = {name: peak(name, "train", folder, asked, 512) for name in names}
    text = ", ".join(f"{name} {mib} MiB" for name, mib in peaks.items())
    found: dict[str, Any] = {"peak_mib": peaks}
    if "transformers" in peaks:
        found["ratio"] = round(peaks["ours"] / peaks["transformers"], 3)
        text += f": {found['ratio']:.2f} of it"
    return found | {"text": text}


def memory_of_prefill(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    peaks = {str(length): peak("ours", "prefill", folder, asked, length) for length in LENGTHS}
    kept = {str(length): round(length * keys_and_values(hub.read_config(folder)) / MIB) for length in LENGTHS}
    growth, further = spread(peaks), spread({length: peaks[length] - kept[length] for length in peaks})
    found = {"peak_mib": peaks, "keys_and_values_mib": kept, "growth": growth, "growth_without_them": further}
    text = ", ".join(f"{length} tokens {mib} MiB (keys and values {kept[length]})" for length, mib in peaks.items())
    return found | {"flat": growth <= FLAT, "text": f"{text}: {growth:.2f} times, {further:.2f} without them"}


def keys_and_values(config: ModelConfig) -> int:
    """Bytes of one token's keys and values in bf16, over all attention layers."""
    layers = sum(letter in ATTENTION for letter in config.pattern)
    return layers * 2 * config.num_key_value_heads * config.head_dim * 2


def spread(peaks: dict[str, int]) -> float:
    return round(max(peaks.values()) / min(peaks.values()), 3)


def peak(name: str, kind: str, folder: Path, asked: argparse.Namespace, length: int) -> int:
    """MiB at the peak of one process's work."""
    words = [name, kind, str(folder), "bf16", str(asked.threads), str(length), asked.backend]
    found = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if found.returncode:
        raise Failed(f"cpu_processes.py {' '.join(words)} ended with {found.returncode}: {found.stderr[-1000:]}")
    return json.loads(found.stdout.splitlines()[-1])["peak_mib"]


def start(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Median over `repeat` commands; the first is not counted."""
    if not (folder / "tokenizer.json").exists():
        Tokenizer.train([Path(__file__).read_text(encoding="utf-8")], 300).save(folder)
    turns = [first_token(folder, asked.threads) for _ in range(asked.repeat + 1)][1:]
    wall, burnt = (statistics.median(turn[n] for turn in turns) for n in (0, 1))
    found = {"repeats": asked.repeat, "seconds": round(wall, 2), "cpu_s": round(burnt, 2)}
    return found | {"text": f"{wall:.2f} s to the first token, whole command {burnt:.2f} s CPU"}


def first_token(folder: Path, threads: int) -> tuple[float, float]:
    """Seconds until the command writes to stdout, and CPU seconds of the whole command (four tokens)."""
    words = ["generate", str(folder), "echo=false", "max_tokens=4", "ignore_eos=true", "--", "The boat"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "trimaran", *words]
    settings = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=settings) as process:
        assert process.stdout is not None and process.stderr is not None
        wrote = process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
        said = process.stderr.read().decode(errors="replace")
    if process.returncode or not wrote:
        raise Failed(f"trimaran {' '.join(words)} ended with {process.returncode}: {said[-1000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def turn_of(name: str, kind: str, folder: str, dtype: str, length: int) -> Side:
    """The side that a process of its own takes; training starts from fp32 weights."""
    stored = torch.float32 if kind == "train" else DTYPES[dtype]
    model = hub.load(folder, dtype=stored) if name == "ours" else load_transformers(folder, stored)
    case = f"train 4x{length}" if kind == "train" else f"prefill {length}"
    return side(OURS if name == "ours" else TRANSFORMERS, case, dtype, model, model.config.vocab_size)


def high_water(reset: bool = False) -> int:
    """Peak resident bytes of this process; since the last reset where the kernel allows one."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if reset and clear.exists():
        clear.write_text("5")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return whole if sys.platform == "darwin" else whole * 1024


def main() -> None:
    name, kind, folder, dtype, threads, length, allowed = sys.argv[1:]
    backend.choose(allowed)
    torch.set_num_threads(int(threads))
    one = turn_of(name, kind, folder, dtype, int(length))
    loaded = high_water(reset=True)
    for _ in range(2 if kind == "train" else 1):  # the second step has the optimizer's state
        one.turn()
    print(json.dumps({"peak_mib": round(high_water() / MIB), "loaded_mib": round(loaded / MIB)}))


if __name__ == "__main__":
    main()
