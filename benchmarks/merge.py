"""Merged checkpoints of a constant learning rate, beside the last of them and beside a run that decays.

    nice -n 15 env OMP_NUM_THREADS=1 python benchmarks/merge.py --out runs/merge      # three seeds, about three minutes

Every run is the real command over the interpreter's own library, one thread each: `constant` never lowers its rate and
keeps a checkpoint every 20 steps; `decayed` takes the same steps of the same data and decays over the last 140. Merges
are made by `trimaran convert --merge` and scored as the runs are, on held-out packages. Runs that are finished are not
run again. Writes results/merge.json.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from life import run

import trimaran
from trimaran import config
from trimaran.data.evaluation import Windows
from trimaran.data.shards import TokenShards
from trimaran.report import environment
from trimaran.train.recipe import PretrainRecipe
from trimaran.train.validate import evaluate

RESULTS = Path(__file__).parent / "results" / "merge.json"
MODEL = {
    "pattern": "M*E",
    "mtp_pattern": "*E",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 2,
    "mamba_head_dim": 64,
    "ssm_state_size": 32,
    "n_groups": 1,
    "chunk_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_latent_size": 32,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 128,
    "routed_scaling_factor": 2.5,
}
STEPS, EVERY, KEPT, LENGTH, HELD_OUT = 400, 20, 16, 128, 40_000
TRAIN = {
    "steps": STEPS,
    "batch_size": 8,
    "optimizer": "muon",
    "muon_momentum": 0.9,
    "muon_times": 1.33,
    "lr": 9e-3,
    "decay": 0.0,
    "mtp_scale": 0.2,
    "mtp_every": 4,
    "eval_tokens": HELD_OUT,
    "checkpoint_every": EVERY,
    "keep": KEPT,
}
DECAY_STEPS = 140
MERGES = [(profile, last) for profile in ("minus_sqrt", "uniform") for last in (4, 8, 16)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/merge"))
    parser.add_argument("--seeds", default="0,1,2")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    each = {seed: measured(int(seed), asked.out / f"seed-{seed}") for seed in asked.seeds.split(",")}
    document = {"made_on": environment(), "conditions": conditions(), "each": each, "summary": summary(each)}
    print(table(document["summary"]))
    if len(each) > 2:
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def conditions() -> dict[str, Any]:
    return {"model": MODEL, "train": TRAIN, "sequence_length": LENGTH, "vocab_size": 1024, "held_out_tokens": HELD_OUT}


def measured(seed: int, home: Path) -> dict[str, Any]:
    """Held-out loss, in nats per token, of the runs and of every merge; CPU seconds of the runs."""
    found: dict[str, Any] = {"loss": {}, "cpu_s": {}}
    for name, changes in {"constant": {}, "decayed": {"decay": DECAY_STEPS / STEPS, "keep": 1}}.items():
        folder = home / name
        trained(folder, seed, changes)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        found["loss"][name], found["cpu_s"][name] = result["held_out_loss"], result["cpu_s"]
    for profile, last in MERGES:
        out = home / f"{profile}-{last}"
        if not out.is_dir():
            run(["convert", "--merge", str(home / "constant"), str(out), f"profile={profile}", f"last={last}"])
        found["loss"][f"merged {profile}, last {last}"] = score(out, home / "constant")
    print(seed, json.dumps(found), flush=True)
    return found


def trained(folder: Path, seed: int, changes: dict[str, Any]) -> None:
    recipe = PretrainRecipe(
        run=str(folder.absolute()),
        seed=seed,
        tokenizer={"vocab_size": 1024},
        model=MODEL,
        data={"source": "stdlib", "sequence_length": LENGTH},
        train={**TRAIN, **changes},
    )
    config.write(recipe, folder.with_suffix(".toml"))
    run(["train", str(folder.with_suffix(".toml"))])


def score(folder: Path, base: Path) -> float:
    """Nats per token on what the run itself was validated on."""
    shards = TokenShards(base / "data" / "held_out" / "stdlib")
    documents = max(1, int((shards.starts[1:] <= HELD_OUT).sum()))
    windows = Windows(shards, sequence_length=LENGTH, batch_size=16, documents=documents)
    return evaluate(trimaran.load(folder), windows).loss


def summary(each: dict[str, Any]) -> dict[str, Any]:
    """Mean, lowest and highest seed of every model's loss, and of what it is below the last checkpoint's."""
    found = {}
    for name in each[next(iter(each))]["loss"]:
        losses = [one["loss"][name] for one in each.values()]
        gains = [one["loss"]["constant"] - one["loss"][name] for one in each.values()]
        found[name] = {"loss": spread(losses), "gain": spread(gains)}
    return found


def spread(values: list[float]) -> list[float]:
    return [round(statistics.mean(values), 4), round(min(values), 4), round(max(values), 4)]


def table(found: dict[str, Any]) -> str:
    lines = ["| model | held-out loss | below the last checkpoint |", "|---|---|---|"]
    for name, one in found.items():
        (mean, low, high), (gain, least, most) = one["loss"], one["gain"]
        lines.append(f"| {name} | {mean:.3f} ({low:.3f}-{high:.3f}) | {gain:.3f} ({least:.3f}-{most:.3f}) |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
