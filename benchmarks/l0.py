"""L0-Bench's programs as drawn here: steps of each published bin, the cost of a problem, and why draws are rejected.

    nice -n 10 env OMP_NUM_THREADS=1 python benchmarks/l0.py     # about two minutes of one core

Every trace is checked against CPython's own events first (the oracle of tests/tasks/test_l0.py); nothing is reported
where one differs. Rejections are counted at the published generator's shipped settings. Writes results/l0.json.
"""

import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.tasks.test_l0 import cpython  # noqa: E402
from trimaran.report import environment  # noqa: E402
from trimaran.tasks.l0 import BINS, L0  # noqa: E402
from trimaran.tasks.l0_grammar import Shape, inputs, program  # noqa: E402
from trimaran.tasks.l0_trace import Crashed, trace_of  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "l0.json"
PROBLEMS, DRAWS, STEPS = 100, 5000, 500
SHIPPED = Shape(lines=(20, 50), depth=1, lists=(5, 10), numbers=10, loop=100)


def main() -> None:
    bins = {str(steps): of_bin(steps) for steps in BINS}
    document = {"made_on": environment(), "problems": PROBLEMS, "bins": bins, "fates": fates(), "draws": DRAWS}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


def of_bin(steps: int) -> dict[str, Any]:
    """Problems of a bin with four demonstrations, held out."""
    task, started = L0(steps=steps), time.process_time()
    prompts = [task.prompt(number, "held_out") for number in range(PROBLEMS)]
    spent = time.process_time() - started
    traces = [prompt.secret["trace"] for prompt in prompts]
    for prompt in prompts:
        if cpython(prompt.secret["source"], prompt.secret["inputs"]) != prompt.secret["trace"]:
            raise SystemExit(f"a trace that is not CPython's: held-out problem {prompt.number} of {steps} steps")
    lengths = [len(trace) for trace in traces]
    return {
        "steps": {"mean": statistics.mean(lengths), "least": min(lengths), "most": max(lengths)},
        "lines": statistics.mean(prompt.secret["source"].count("\n") + 1 for prompt in prompts),
        "prompt_characters": statistics.mean(len(str(prompt.messages[0]["content"])) for prompt in prompts),
        "trace_characters": statistics.mean(len("\n".join(trace)) for trace in traces),
        "cpu_ms_per_problem": 1000 * spent / PROBLEMS,
    }


def fates() -> dict[str, float]:
    """What becomes of drawn programs, as shares."""
    random, counts = Random(0), Counter[str]()
    open_ended = Shape((SHIPPED.lines[0], 10_000), SHIPPED.depth, SHIPPED.lists, SHIPPED.numbers, SHIPPED.loop)
    for _ in range(DRAWS):
        counts[fate(random, open_ended)] += 1
    return {name: count / DRAWS for name, count in counts.most_common()}


def fate(random: Random, shape: Shape) -> str:
    made = program(random, shape)
    if made is None:
        return "too short"
    if made.source.count("\n") + 1 >= SHIPPED.lines[1]:
        return "too long"
    try:
        return (
            "trace too long" if trace_of(made.source, inputs(random, made.parameters, shape), STEPS) is None else "kept"
        )
    except Crashed:
        return "crashes"


if __name__ == "__main__":
    main()
