"""What each stage of a life adds, beside its control: fine-tuning, reinforcement learning, distillation, healing.

    python benchmarks/life.py runs/demo --out runs/life            # three seeds, two processes; about forty minutes
    python benchmarks/life.py runs/demo --out runs/life --seeds 0 --arms sft,rlvr

Every arm is a run of the real command with a recipe of src/trimaran/demo/stages/, scored on held-out problems by
`trimaran score`. Arms that are finished are not run again, so that the same command goes on. Writes results/life.json.

    sft               from the first run's model, few examples read several times
    rlvr              GRPO from sft on three environments at once
    more              control: sft goes on, on its own examples, for as many tokens as rlvr sampled and trained on
    shuffled          control: rlvr whose rewards change places within each group
    sums, strings     specialists: GRPO from sft on one environment alone
    mopd              from sft, each environment taught by its specialist
    mopd_shuffled     control: each environment taught by the other's specialist
    heal              the draft block of rlvr trained on its own texts
    budget            rlvr's sums with thoughts of at most 0, 4, 8, 12 tokens, without an end, and with thinking off
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimaran.report import environment, read_metrics

RESULTS = Path(__file__).parent / "results" / "life.json"
RECIPES = Path(__file__).parents[1] / "src" / "trimaran" / "demo" / "stages"
TASKS = RECIPES / "tasks.toml"
BUDGETS = (0, 4, 8, 12, None)
SFT_TOKENS = 4 * 512  # of a step


@dataclass(frozen=True)
class Arm:
    """A run: the recipe, the arm it starts from, and what it changes in the recipe ({out} is the seed's folder)."""

    recipe: str
    start: str
    changes: tuple[str, ...] = ()


TEACHERS = ("teachers.sums.path={out}/sums", "teachers.strings.path={out}/strings")
ARMS = {
    "sft": Arm("sft", "base"),
    "rlvr": Arm("rlvr", "sft"),
    "more": Arm("sft", "sft"),
    "shuffled": Arm("rlvr", "sft", ("policy.shuffle_rewards=true",)),
    "sums": Arm("sums", "sft"),
    "strings": Arm("strings", "sft"),
    "mopd": Arm("mopd", "sft", TEACHERS),
    "mopd_shuffled": Arm("mopd", "sft", (*TEACHERS, "shuffle_teachers=true")),
    "heal": Arm("heal", "rlvr"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("base", help="run folder of `trimaran demo`")
    parser.add_argument("--out", type=Path, default=Path("runs/life"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join([*ARMS, "budget"]))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="ARM:KEY=VALUE", help="a try, not for results")
    asked = parser.parse_args()
    seeds, arms = [int(seed) for seed in asked.seeds.split(",")], asked.arms.split(",")
    with ThreadPoolExecutor(asked.processes) as pool:
        jobs = [pool.submit(live, seed, arms, Path(asked.base), asked.out, asked.set) for seed in seeds]
        found = {seed: job.result() for seed, job in zip(seeds, jobs)}
    document = {"made_on": environment(), "seeds": seeds, "each": found, "summary": summary(list(found.values()))}
    print(markdown(document["summary"]))
    if not asked.set and len(seeds) > 2:
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def live(seed: int, arms: Sequence[str], base: Path, out: Path, tries: Sequence[str]) -> dict[str, Any]:
    """All arms of one seed; {arm: {task: {"sampled": …, "greedy": …, "low": …, "high": …, "n": …}}}."""
    home = (out / f"seed-{seed}").absolute()
    home.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name in arms:
        if name == "budget":
            found[name] = budgets(home / "rlvr")
            continue
        arm = ARMS[name]
        start = base.absolute() if arm.start == "base" else home / arm.start
        own = [text.partition(":")[2] for text in tries if text.partition(":")[0] in (name, arm.recipe)]
        changes = [change.format(out=home) for change in arm.changes] + own
        if name == "more":
            changes.append(f"train.steps={max(1, round(tokens_of(home / 'rlvr') / SFT_TOKENS))}")
        recipe = str(RECIPES / f"{arm.recipe}.toml")
        run(["train", recipe, f"start={start}", f"run={home / name}", f"seed={seed}", *changes])
        found[name] = {**score(home / name), **extras(home / name)}
    return found


def run(words: Sequence[str]) -> str:
    """The command in a process of one thread; what it printed on stdout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "trimaran", *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"trimaran {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def score(folder: Path, *changes: str) -> dict[str, Any]:
    document = json.loads(run(["score", str(folder), str(TASKS), "--json", *changes]))
    return {name: short(task) for name, task in document["tasks"].items()}


def short(task: Mapping[str, Any]) -> dict[str, Any]:
    sampled, greedy = task["sampled"], task["greedy"]
    return {
        "sampled": sampled["reward"],
        "low": sampled["low"],
        "high": sampled["high"],
        "greedy": greedy["reward"],
        "n": sampled["n"],
        "samples": sampled["samples"],
        "thought_tokens": sampled["thought_tokens"],
    }


def budgets(folder: Path) -> dict[str, Any]:
    """Accuracy of sums by the budget of the thought, and without thinking."""
    found = {}
    for budget in BUDGETS:
        word = "none" if budget is None else str(budget)
        found[word] = only_sums(folder, f"budget={word}")
    found["off"] = only_sums(folder, "thinking=false")
    return found


def only_sums(folder: Path, *changes: str) -> dict[str, Any]:
    words = ["score", str(folder), "arithmetic", "--json", "n=200", "samples=4", "max_tokens=96", *changes]
    return short(json.loads(run(words))["tasks"]["arithmetic"])


def tokens_of(folder: Path) -> int:
    """Tokens that a run of reinforcement learning sampled and trained on."""
    metrics = read_metrics(folder / "metrics.jsonl")
    with (folder / "rollouts.jsonl").open(encoding="utf-8") as file:
        said = sum(len(json.loads(line)["said"]) for line in file)
    return int(metrics[-1]["tokens"]) + said


def extras(folder: Path) -> dict[str, Any]:
    """Of the run itself: its tokens, and the acceptance length where a draft block was healed."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    kept = {name: result[name] for name in ("tokens", "steps", "wall_s", "cpu_s", "acceptance") if name in result}
    return {"run": kept}


def summary(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and range over seeds of every arm and task, sampled and greedy."""
    found: dict[str, Any] = {}
    for arm, tasks in each[0].items():
        for task in tasks.keys() - {"run"}:
            for kind in ("sampled", "greedy"):
                values = [one[arm][task][kind] for one in each]
                spread = [round(statistics.mean(values), 3), round(min(values), 3), round(max(values), 3)]
                found.setdefault(arm, {}).setdefault(task, {})[kind] = spread
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """The summary as a table: percent, sampled (lowest to highest seed), greedy behind a stroke."""
    tasks = ("sums", "strings", "sorting", "calls")
    lines = [f"| arm | {' | '.join(tasks)} |", "|---" * (1 + len(tasks)) + "|"]
    for arm, scores in found.items():
        if arm != "budget":
            lines.append(f"| `{arm}` | {' | '.join(cell(scores[task]) for task in tasks)} |")
    lines += [f"\nsums of `rlvr` by budget: {word} {cell(one)}" for word, one in found.get("budget", {}).items()]
    return "\n".join(lines)


def cell(one: Mapping[str, Sequence[float]]) -> str:
    (mean, low, high), greedy = one["sampled"], one["greedy"][0]
    return f"{mean:.0%} ({low:.0%}-{high:.0%}) / {greedy:.0%}"


if __name__ == "__main__":
    main()
