"""One needle in a haystack: a tiny hybrid, its pure-Mamba and pure-attention twins, as trained and far beyond.

    nice -n 15 env OMP_NUM_THREADS=1 python benchmarks/niah.py --out runs/niah    # nine models

Each model is trained by the real command on one thread, on texts of RULER's first form (a noise haystack, one key of
two words, a value of two words, the question and its answer) of at most `LENGTH` tokens: same texts, same order, same
steps, parameters within half a per cent. Asked are held-out needles, each said once, at 1, 2, 4 and 8 times that
length; an answer counts where the model finds every token of it most likely, one after the other. Models that are
finished are not trained again, nor measured. Writes results/niah.json and .png.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal

import torch
from life import run

import trimaran
from trimaran import config
from trimaran.report import environment, read_metrics
from trimaran.tasks.ruler_fit import largest
from trimaran.tasks.ruler_lexicon import ADJECTIVES, NOUNS
from trimaran.tasks.ruler_niah import Niah
from trimaran.tasks.task import Split
from trimaran.text.tokenizer import Tokenizer
from trimaran.train.recipe import PretrainRecipe

RESULTS = Path(__file__).parent / "results" / "niah.json"
RECIPE = Path(__file__).parents[1] / "recipes" / "laptop" / "niah.toml"
LENGTH, TIMES, PROBLEMS, VOCABULARY = 128, (1, 2, 4, 8), 100, 448
COUNTS: dict[Split, int] = {"train": 24_000, "held_out": 300}  # of which a third is too long
MODELS: dict[str, dict[str, str | int]] = {  # the feed-forward width makes up for what an attention layer is smaller
    "hybrid": {"pattern": "M-*-"},
    "mamba": {"pattern": "M-M-", "intermediate_size": 139},
    "attention": {"pattern": "R-R-", "intermediate_size": 245},
}
INK = {"mamba": "#2a6f97", "hybrid": "#7d5ba6", "attention": "#d1603d"}


class Few(Niah):
    """RULER's first form with words for values, made of few words, so that a tiny model soon knows them all."""

    name: ClassVar[str] = "few"
    value_kind: Literal["words", "numbers", "uuids"] = "words"

    def draw(self, random: Random) -> dict[str, Any]:
        key, value = (f"{random.choice(ADJECTIVES[::8])}-{random.choice(NOUNS[::10])}" for _ in range(2))
        return {"pairs": [(key, [value])], "asked": [key], "seed": random.getrandbits(48)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/niah"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    texts(asked.out)
    each: dict[str, dict[str, Any]] = {name: {} for name in asked.models.split(",")}
    for seed in asked.seeds.split(","):
        for name, found in each.items():
            found[seed] = lived(name, int(seed), asked.out, asked.overrides)
    document = {"made_on": environment(), "conditions": conditions(), "each": each}
    print(table(each))
    if len(each) == len(MODELS) and not asked.overrides:
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        picture(each, RESULTS.with_suffix(".png"))


def conditions() -> dict[str, Any]:
    recipe = {"recipe": str(RECIPE.relative_to(RECIPE.parents[2])), **config.read(RECIPE)}
    return {**recipe, "models": MODELS, "length": LENGTH, "problems": PROBLEMS, "texts": COUNTS}


def texts(home: Path) -> None:
    """A tokenizer, and texts of at most LENGTH tokens (begin and end included) to learn from and held out, as JSONL."""
    if (home / "held_out.jsonl").exists():
        return
    home.mkdir(parents=True, exist_ok=True)
    task, random = Few(), Random(0)
    rows = {split: [document(task, number, split, random) for number in range(COUNTS[split])] for split in COUNTS}
    tokenizer = Tokenizer.train(rows["train"], VOCABULARY)
    tokenizer.save(home / "tokenizer")
    for split, found in rows.items():
        kept = [row for row, ids in zip(found, tokenizer.encode_batch(found)) if len(ids) + 2 <= LENGTH]
        (home / f"{split}.jsonl").write_text(
            "".join(json.dumps({"text": row}) + "\n" for row in kept), encoding="utf-8"
        )


def document(task: Few, number: int, split: Split, random: Random) -> str:
    """A text with its answer. In two of three the needle is said two or three times, which is quicker to learn from."""
    secret, times = task.drawn(number, split), random.randint(1, 3)
    said = {**secret, "pairs": secret["pairs"] * times}
    return f"{task.text(said, random.randint(times, 12 - 3 * times))} {task.answers(secret)[0]}"


def lived(name: str, seed: int, home: Path, overrides: list[str]) -> dict[str, Any]:
    """One model, trained and measured."""
    folder = home / f"{name}-{seed}"
    kept = folder / "niah.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    words = [f"run={folder.absolute()}", f"seed={seed}"]
    words += [f"data.path={home.absolute()}/train.jsonl", f"data.held_out_path={home.absolute()}/held_out.jsonl"]
    words += [f"tokenizer.path={home.absolute()}/tokenizer"]
    words += [f"model.{key}={value}" for key, value in MODELS[name].items()]
    recipe = config.load(PretrainRecipe, RECIPE, [*words, *overrides])
    path = home / f"{name}-{seed}.toml"
    config.write(recipe, path)
    run(["train", str(path)])
    found = measured(folder)
    kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(name, seed, json.dumps(found), flush=True)
    return found


@torch.no_grad()
def measured(folder: Path) -> dict[str, Any]:
    """The share of held-out needles found, by length in tokens."""
    model, tokenizer = trimaran.load(folder).eval(), trimaran.load_tokenizer(folder)
    shares = {}
    for times in TIMES:
        problems = [asked(tokenizer, LENGTH * times, number) for number in range(PROBLEMS)]
        right = 0
        for ids, answer in problems:
            before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
            tokens_BT = torch.tensor([before + ids + answer])
            hidden_BTD = model.hidden(tokens_BT[:, :-1])[:, -len(answer) :]
            right += bool((model.head(hidden_BTD).argmax(-1) == tokens_BT[:, -len(answer) :]).all())
        shares[str(LENGTH * times)] = right / PROBLEMS
    last = read_metrics(folder / "metrics.jsonl")[-1]
    parameters = sum(tensor.numel() for tensor in model.parameters())
    return {"found": shares, "parameters": parameters, "tokens": last["tokens"], "cpu_s": last["cpu_s"]}


def asked(tokenizer: Tokenizer, length: int, number: int) -> tuple[list[int], list[int]]:
    """Prompt and answer, which together have at most `length` tokens."""
    task = Few()
    secret = task.drawn(number, "held_out")
    answer = tokenizer.encode(f" {task.answers(secret)[0]}")
    units = largest(lambda units: len(tokenizer.encode(task.text(secret, units))), length - len(answer), 1)
    return tokenizer.encode(task.text(secret, units)), answer


def table(each: Mapping[str, Mapping[str, Any]]) -> str:
    """Mean over the seeds (lowest to highest)."""
    lengths = [LENGTH * times for times in TIMES]
    lines = [f"| model | {' | '.join(f'{length} tokens' for length in lengths)} |", "|---" * (1 + len(lengths)) + "|"]
    for name, seeds in each.items():
        shares = [[one["found"][str(length)] for one in seeds.values()] for length in lengths]
        cells = [f"{statistics.mean(one):.0%} ({min(one):.0%}-{max(one):.0%})" for one in shares]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(each: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Needles found by length, a line for each model in a band of its seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lengths = [LENGTH * times for times in TIMES]
    for name, seeds in each.items():
        shares = [[one["found"][str(length)] for one in seeds.values()] for length in lengths]
        axes.plot(lengths, [statistics.mean(one) for one in shares], marker="o", color=INK[name], label=name)
        axes.fill_between(lengths, list(map(min, shares)), list(map(max, shares)), color=INK[name], alpha=0.2)
    axes.axvline(LENGTH, color="grey", linestyle=":")
    axes.set(xscale="log", xlabel="tokens of prompt and answer (dotted: as trained)", ylabel="needles found")
    axes.set(ylim=(0, 1.02))
    axes.set_xticks(lengths, list(map(str, lengths)))
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
