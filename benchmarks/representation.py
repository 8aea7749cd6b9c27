"""What pure Mamba, pure attention and a hybrid of one size still know of the order of a prefix, three seeds each.

    nice -n 15 env OMP_NUM_THREADS=1 python benchmarks/representation.py --out runs/seen    # ten minutes

Each model is trained by the real command on the interpreter's own library, one thread: same data, same order, same
steps, parameters within two per cent. Then `trimaran score`'s representation analysis reads held-out packages, a
repeated pattern and noise, before and after training. Runs and measurements that are finished are not made again.
Writes results/representation.json and .png.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from life import run

from trimaran import config
from trimaran.engine.folder import Folder, FolderSettings, open_folder
from trimaran.evals.representation import measure
from trimaran.evals.representation_run import RepresentationSettings, analysed, texts
from trimaran.evals.representation_texts import windows
from trimaran.report import environment
from trimaran.train.recipe import PretrainRecipe

RESULTS = Path(__file__).parent / "results" / "representation.json"
SIZES = {
    "hidden_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 24,
    "mamba_num_heads": 6,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "n_groups": 1,
    "chunk_size": 64,
}
MODELS: dict[str, dict[str, Any]] = {  # the feed-forward width makes up for what an attention layer is smaller
    "mamba": {"pattern": "M-M-M-M-", "intermediate_size": 192},
    "attention": {"pattern": "R-R-R-R-", "intermediate_size": 330},
    "hybrid": {"pattern": "M-R-M-R-", "intermediate_size": 261},
}
LENGTH = 256
TRAIN = {
    "steps": 400,
    "batch_size": 8,
    "optimizer": "muon",
    "muon_momentum": 0.9,
    "muon_times": 1.33,
    "lr": 9e-3,
    "decay": 0.5,
    "decay_shape": "linear",
    "eval_tokens": 40_000,
}
ANALYSIS = RepresentationSettings(lengths=(16, 32, 64, 128, 256, 512), suffix=16, samples=32, shuffles=2)
SUFFIX, NEAR = 32, 4  # of the look at places: prefix and suffix together are as long as a row in training
INK = {"mamba": "#2a6f97", "hybrid": "#7d5ba6", "attention": "#d1603d"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/representation"))
    parser.add_argument("--seeds", default="0,1,2")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    each = {
        name: {seed: measured(name, int(seed), asked.out / f"{name}-{seed}") for seed in asked.seeds.split(",")}
        for name in MODELS
    }
    document = {"made_on": environment(), "conditions": conditions(), "each": each, "summary": summary(each)}
    print(table(document))
    if all(len(seeds) > 2 for seeds in each.values()):
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        picture(RESULTS.with_suffix(".png"), document)


def conditions() -> dict[str, Any]:
    train = {"sequence_length": LENGTH, "vocab_size": 1024, **TRAIN}
    return {"sizes": SIZES, "models": MODELS, "train": train, "analysis": config.plain(ANALYSIS)}


def measured(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Trains one model and analyses it; held-out loss in nats per token beside it."""
    recipe = PretrainRecipe(
        run=str(folder.absolute()),
        seed=seed,
        tokenizer={"vocab_size": 1024},
        model=SIZES | MODELS[name],
        data={"source": "stdlib", "sequence_length": LENGTH},
        train=TRAIN,
    )
    config.write(recipe, folder.with_suffix(".toml"))
    run(["train", str(folder.with_suffix(".toml"))])
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    held = open_folder(str(folder), FolderSettings())
    found = analysed(held, ANALYSIS, folder / "representation")
    print(name, seed, f"held-out loss {result['held_out_loss']:.3f}", flush=True)
    parameters = sum(tensor.numel() for tensor in held.model.parameters())
    about = {"held_out_loss": result["held_out_loss"], "cpu_s": result["cpu_s"], "parameters": parameters}
    about |= {"places": [round(value, 4) for value in places(held, folder / "representation" / "places.json")]}
    return {**about, "measured": {state: short(parts) for state, parts in found["measured"].items()}}


def short(parts: dict[str, Any]) -> dict[str, Any]:
    """By source, by prefix length, then by layer, in four digits; the rest follows from these."""
    kept = ("accs", "scaled")
    lists = {source: {key: rounded(part[key]) for key in kept} for source, part in parts.items()}
    return {source: {**lists[source], "compressed": rounded([part["compressed"]])[0]} for source, part in parts.items()}


def rounded(rows: list[list[float]]) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in rows]


def places(held: Folder, kept: Path) -> list[float]:
    """Scaled ACCS of the last layer at each place of a long suffix, text alone."""
    if not kept.exists():
        text_NT = windows(texts(ANALYSIS), held.tokenizer, ANALYSIS.samples, LENGTH - len(held.lead), ANALYSIS.seed)
        prefix = LENGTH - SUFFIX - len(held.lead)
        found = measure(held.model, torch.from_numpy(text_NT), [prefix], SUFFIX, lead=held.lead, shuffles=2)
        aniso = found.aniso_PL[0, -1]
        scaled_S = (found.self_PNLS[0, :, -1].mean(0) - aniso) / (1 - aniso)
        kept.write_text(json.dumps(scaled_S.tolist()), encoding="utf-8")
    of_places: list[float] = json.loads(kept.read_text(encoding="utf-8"))
    return of_places


def summary(each: dict[str, Any]) -> dict[str, Any]:
    """By model, state (trained or not) and source: mean, lowest and highest seed of ACCS, of the last layer after every
    prefix (`by_length`, and `scaled`) and of every layer after a prefix as long as training rows (`by_layer`); scaled
    ACCS of the first places of a long suffix (`near`) and of its latter half (`far`)."""
    place = ANALYSIS.lengths.index(LENGTH)
    found: dict[str, Any] = {}
    for name, seeds in each.items():
        losses = spread([one["held_out_loss"] for one in seeds.values()])
        found[name] = {"held_out_loss": losses, "parameters": next(iter(seeds.values()))["parameters"]}
        found[name]["near"] = spread([statistics.mean(one["places"][:NEAR]) for one in seeds.values()])
        found[name]["far"] = spread([statistics.mean(one["places"][SUFFIX // 2 :]) for one in seeds.values()])
        for state in ("trained", "untrained"):
            for source in ANALYSIS.sources:
                parts = [one["measured"][state][source] for one in seeds.values()]
                found[name][f"{state} {source}"] = {
                    "by_length": across([[layers[-1] for layers in part["accs"]] for part in parts]),
                    "scaled": across([[layers[-1] for layers in part["scaled"]] for part in parts]),
                    "by_layer": across([part["accs"][place] for part in parts]),
                }
    return found


def across(rows: list[list[float]]) -> list[list[float]]:
    return [spread(list(values)) for values in zip(*rows)]


def spread(values: list[float]) -> list[float]:
    return [round(statistics.mean(values), 4), round(min(values), 4), round(max(values), 4)]


def table(document: dict[str, Any]) -> str:
    """Last layer, text: scaled ACCS after every prefix, near to it and far from it, mean and range over seeds."""
    lines = ["| model | held-out loss | " + " | ".join(map(str, ANALYSIS.lengths)) + " | near | far |"]
    lines.append("|---" * (4 + len(ANALYSIS.lengths)) + "|")
    for name, one in document["summary"].items():
        for state in ("trained", "untrained"):
            loss = "{:.3f}".format(*one["held_out_loss"]) if state == "trained" else ""
            shown = [*one[f"{state} text"]["scaled"], *([one["near"], one["far"]] if state == "trained" else [])]
            cells = ["{:.3f} ({:.3f}-{:.3f})".format(*values) for values in shown]
            lines.append(f"| {name}, {state} | {loss} | " + " | ".join(cells) + " |" * (1 if state == "trained" else 3))
    return "\n".join(lines)


def picture(path: Path, document: dict[str, Any]) -> None:
    """By length and by layer, the mean over seeds in a band of their range; dotted: untrained."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    depth = len(next(iter(MODELS.values()))["pattern"]) + 1
    for axes, key, xs in ((left, "scaled", list(ANALYSIS.lengths)), (right, "by_layer", list(range(depth)))):
        for name, ink in INK.items():
            for state, style in (("trained", "-"), ("untrained", ":")):
                mean, low, high = zip(*document["summary"][name][f"{state} text"][key])
                axes.plot(xs, mean, style, color=ink, label=f"{name}, {state}", marker="o", markersize=3)
                axes.fill_between(xs, low, high, color=ink, alpha=0.15, linewidth=0)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_xscale("log", base=2)
    left.set_xticks(ANALYSIS.lengths, [str(length) for length in ANALYSIS.lengths])
    left.axvline(LENGTH, color="#999999", linewidth=1, linestyle="--")
    left.set_xlabel(f"tokens of the prefix (dashed: rows in training, {LENGTH})")
    left.set_ylabel("scaled ACCS, last layer (1: order forgotten)")
    right.set_xlabel("layer (0: embedding)")
    right.set_ylabel(f"ACCS after a prefix of {LENGTH}")
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
