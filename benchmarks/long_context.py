"""Long-context extension, small and real: key recall at four times the trained length, short text as it was.

    nice -n 15 env OMP_NUM_THREADS=1 python benchmarks/long_context.py --out runs/long_context    # three seeds

Every arm is a run of the real command, one thread. Texts: the interpreter's own library and texts of key recall.

    base       pretrained in rows of 128 tokens, decaying to a tenth of its peak
    extended   from base, stage "extend": rows of 128 and of 512 take turns, the learning rate stays at that tenth
    control    from base, the same stage, tokens, rate and texts of key recall for as many tokens, in rows of 128 alone

Measured in each: key recall on 1,000 new problems at 128, 256 and 512 tokens, bits per byte of held-out packages in
rows of 128 and of 512, tokens of every step. Arms that are finished are not run again, nor measured. Writes
results/long_context.json and .png.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from life import run
from matplotlib.figure import Figure
from merge import MODEL

import trimaran
from trimaran import config
from trimaran.data import corpora
from trimaran.data.evaluation import Windows
from trimaran.data.shards import TokenShards
from trimaran.report import environment, read_metrics
from trimaran.tasks.gold import SPACING
from trimaran.tasks.recall import Recall
from trimaran.text.tokenizer import Tokenizer
from trimaran.train.extend_recipe import ExtendRecipe
from trimaran.train.prepare import within
from trimaran.train.recall import recalled
from trimaran.train.recipe import PretrainRecipe
from trimaran.train.validate import evaluate

RESULTS = Path(__file__).parent / "results" / "long_context.json"
SHORT, LONG, LENGTHS, PROBLEMS = 128, 512, (128, 256, 512), 1000
STEPS, ROWS, PEAK = {"base": 1400, "extended": 100, "control": 100}, 32, 9e-3
TEXT_BYTES, NAMES, VOCABULARY = 3_000_000, 24, 512
ARCHITECTURE = {**MODEL, "mtp_pattern": "", "initializer_range": 0.05}
NEAR = {"words": 80, "facts": 8, "repeats": 14, "varied": True, "names": NAMES}  # a row of 128 and a little more
FAR = {"words": 270, "facts": 16, "repeats": 50, "varied": True, "names": NAMES}  # about a row of 512
TRAIN = {
    "batch_size": ROWS,
    "optimizer": "muon",
    "muon_momentum": 0.9,
    "muon_times": 1.33,
    "mtp_scale": 0.0,
    "eval_tokens": 40_000,
}
WEIGHTS = {"text": 0.4, "near": 0.6}
TURNS = [
    {"sequence_length": SHORT, "weights": WEIGHTS},
    {"sequence_length": LONG, "weights": {"text": 0.4, "far": 0.6}},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/long_context"))
    parser.add_argument("--seeds", default="0,1,2")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    each = {seed: lived(int(seed), asked.out / f"seed-{seed}") for seed in asked.seeds.split(",")}
    document = {"made_on": environment(), "conditions": conditions(), "each": each, "holds": holds(list(each.values()))}
    print(table(list(each.values())), json.dumps(document["holds"], indent=1), sep="\n")
    if len(each) > 2:
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        picture(list(each.values()), RESULTS.with_suffix(".png"))


def conditions() -> dict[str, Any]:
    return {
        "model": ARCHITECTURE,
        "train": TRAIN,
        "steps": STEPS,
        "peak": PEAK,
        "near": NEAR,
        "far": FAR,
        "weights": WEIGHTS,
        "problems": PROBLEMS,
        "text_bytes": TEXT_BYTES,
        "vocab_size": VOCABULARY,
    }


def lived(seed: int, home: Path) -> dict[str, Any]:
    """All arms of one seed, trained and measured."""
    kept = home / "found.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    home.mkdir(parents=True, exist_ok=True)
    texts(home, seed)
    train(base_recipe(home, seed), home)
    train(extension(home, seed, "extended"), home)
    train(extension(home, seed, "control"), home)
    found = {name: measured(home, name) for name in STEPS}
    kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(seed, json.dumps(found), flush=True)
    return found


def texts(home: Path, seed: int) -> None:
    """The library's text, to learn from and held out, and texts of key recall, as JSONL files."""
    library, held_out = corpora.stdlib_source()
    library_texts = [one.text for one in library.documents()]
    write(home / "text.jsonl", upto(library_texts[seed::3], TEXT_BYTES))
    write(home / "held_out.jsonl", held_out.texts())
    task = Recall(**NEAR)
    write(home / "near.jsonl", (task.document(SPACING // 2 + seed * SPACING + number) for number in range(16_000)))


def upto(found: Sequence[str], size: int) -> list[str]:
    """The first texts, of `size` characters together."""
    kept: list[str] = []
    for text in found:
        if sum(map(len, kept)) >= size:
            break
        kept.append(text)
    return kept


def write(path: Path, found: Any) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found), encoding="utf-8")


def base_recipe(home: Path, seed: int) -> PretrainRecipe:
    sources = {name: str(home.absolute() / f"{name}.jsonl") for name in ("text", "near")}
    return PretrainRecipe(
        run=str(home.absolute() / "base"),
        seed=seed,
        tokenizer={"vocab_size": VOCABULARY},
        model=ARCHITECTURE,
        data={
            "sources": sources,
            "held_out_path": str(home.absolute() / "held_out.jsonl"),
            "sequence_length": SHORT,
            "mixture": {"weights": WEIGHTS},
        },
        train={**TRAIN, "steps": STEPS["base"], "lr": PEAK, "min_lr": PEAK / 10, "decay": 0.5, "decay_shape": "linear"},
    )


def extension(home: Path, seed: int, name: str) -> ExtendRecipe:
    far = {"far": {**FAR, "count": 700}} if name == "extended" else {}
    return ExtendRecipe(
        start=str(home.absolute() / "base"),
        run=str(home.absolute() / name),
        seed=seed + 1000,
        data={
            "sources": {"text": str(home.absolute() / "text.jsonl")},
            "held_out_path": str(home.absolute() / "held_out.jsonl"),
            "sequence_length": SHORT,
            "mixture": {"weights": WEIGHTS, "phases": [{"lengths": TURNS if name == "extended" else []}]},
            "recall": {"near": {**NEAR, "count": 4000}, **far},
            "held_out_recall": 0,
        },
        train={**TRAIN, "steps": STEPS[name], "lr": PEAK / 10},
    )


def train(recipe: config.Settings, home: Path) -> None:
    path = home / f"{Path(recipe.run).name}.toml"
    config.write(recipe, path)
    run(["train", str(path)])


def measured(home: Path, name: str) -> dict[str, Any]:
    """Key recall by length, bits per byte by length of the rows, and tokens of every step."""
    folder = home / name
    model, tokenizer = trimaran.load(folder), trimaran.load_tokenizer(folder)
    shards = TokenShards(home / "base" / "data" / "held_out" / "held out")
    documents = within(shards, TRAIN["eval_tokens"])
    windows = {
        length: Windows(shards, sequence_length=length, batch_size=SHORT * ROWS // length, documents=documents)
        for length in (SHORT, LONG)
    }
    lines = read_metrics(folder / "metrics.jsonl")
    counts = [line["tokens"] for line in lines]
    return {
        "recall": {str(length): recalled(model, tokenizer, fitted(tokenizer, length), PROBLEMS) for length in LENGTHS},
        "text": {str(length): evaluate(model, one).bits_per_byte for length, one in windows.items()},
        "tokens_per_step": sorted({after - before for before, after in pairwise([0, *counts])}),
        "last_rate": lines[-1]["lr"],
        "rates": len({line["lr"] for line in lines}),
        "cpu_s": lines[-1]["cpu_s"],
    }


def fitted(tokenizer: Tokenizer, length: int) -> Recall:
    """Problems that nearly fill `length` tokens: eight facts, all but the asked one said again and again."""

    def made(words: int) -> Recall:
        return Recall(words=words, facts=8, repeats=max(8, words // 6), names=NAMES)

    def tokens(words: int) -> int:
        return 1 + max(len(tokenizer.encode(made(words).document(number, "held_out"))) for number in range(12))

    return made(max(words for words in range(length // 2, length, 4) if tokens(words) <= length))


def holds(each: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """What the stage promises, over all seeds."""
    short, long = str(SHORT), str(LONG)
    return {
        "every step has the same tokens": all(
            one[name]["tokens_per_step"] == [SHORT * ROWS] for one in each for name in STEPS
        ),
        "the rate is constant": all(
            one[name]["rates"] == 1 and one[name]["last_rate"] == PEAK / 10
            for one in each
            for name in ("extended", "control")
        ),
        "short text gets at most 1 % worse": all(
            one["extended"]["text"][short] <= 1.01 * one["base"]["text"][short] for one in each
        ),
        "key recall at 512 rises": all(one["extended"]["recall"][long] > one["base"]["recall"][long] for one in each),
        "and above the control": all(one["extended"]["recall"][long] > one["control"]["recall"][long] for one in each),
    }


def table(each: Sequence[Mapping[str, Any]]) -> str:
    """Mean over the seeds (lowest to highest)."""
    head = [*(f"recall at {length}" for length in LENGTHS), f"bits per byte at {SHORT}", f"at {LONG}"]
    lines = [f"| model | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    for name in STEPS:
        shares = [[one[name]["recall"][str(length)] for one in each] for length in LENGTHS]
        cells = [f"{statistics.mean(one):.0%} ({min(one):.0%}-{max(one):.0%})" for one in shares]
        for length in (SHORT, LONG):
            cells.append(f"{statistics.mean(one[name]['text'][str(length)] for one in each):.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(each: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Key recall by length, a line for each arm, seeds as its width."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in STEPS:
        shares = [[one[name]["recall"][str(length)] for one in each] for length in LENGTHS]
        [line] = axes.plot(LENGTHS, [statistics.mean(one) for one in shares], marker="o", label=name)
        axes.fill_between(LENGTHS, list(map(min, shares)), list(map(max, shares)), color=line.get_color(), alpha=0.2)
    axes.axvline(SHORT, color="grey", linestyle=":")
    axes.set(xscale="log", xlabel="tokens of the text", ylabel="key recall", ylim=(0, 1.02), title=f"{len(each)} seeds")
    axes.set_xticks(LENGTHS, list(map(str, LENGTHS)))
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
