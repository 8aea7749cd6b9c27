"""How long each verb takes from the command to its end, medians over runs of the real program.

    python benchmarks/verbs.py runs/demo

`runs/demo` is what `trimaran demo` left; its own time is read from there. Writes benchmarks/results/verbs.json.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from trimaran.report import environment
from trimaran.train.pretrain import RESULT

RESULTS = Path(__file__).parent / "results" / "verbs.json"
REPEAT = 5


def seconds(command: list[str], said: str = "") -> float:
    """Median wall time of a command that must succeed; `said` is its standard input."""
    taken = []
    for _ in range(REPEAT):
        began = time.perf_counter()
        subprocess.run(command, check=True, input=said, text=True, capture_output=True)
        taken.append(time.perf_counter() - began)
    return round(statistics.median(taken), 2)


def main() -> None:
    run = sys.argv[1]
    trimaran = [str(Path(sys.executable).with_name("trimaran"))]
    found = {
        "trimaran --help": seconds([*trimaran, "--help"]),
        "trimaran show nano-3": seconds([*trimaran, "show", "nano-3"]),
        "trimaran show super-3": seconds([*trimaran, "show", "super-3"]),
        "trimaran generate, 1 token": seconds([*trimaran, "generate", run, "def ", "max_tokens=1"]),
        "trimaran generate, 128 tokens": seconds([*trimaran, "generate", run, "def ", "max_tokens=128", "seed=0"]),
        "trimaran chat, one line, 64 tokens": seconds([*trimaran, "chat", run, "max_tokens=64"], "class Queue:\n"),
    }
    demo = json.loads((Path(run) / RESULT).read_text(encoding="utf-8"))
    document = {"seconds": found, "repeat": REPEAT, "demo_training_s": demo["wall_s"], "made_on": environment()}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
