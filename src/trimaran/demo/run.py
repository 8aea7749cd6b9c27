"""`trimaran demo`: train, then show what was learned, each figure beside its yardstick."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimaran import config
from trimaran.data.shards import TokenShards
from trimaran.demo import bigram
from trimaran.demo.life import live
from trimaran.engine.plain import generate
from trimaran.engine.sampler import Sampling
from trimaran.model import hub
from trimaran.model.hybrid import HybridModel
from trimaran.report import curve_terminal, say, series
from trimaran.text.tokenizer import Tokenizer
from trimaran.train import pretrain
from trimaran.train.folder import RESULT
from trimaran.train.recipe import PretrainRecipe

HERE = Path(__file__).parent
HYBRID, ATTENTION_ONLY, CONTROL = HERE / "hybrid.toml", HERE / "attention.toml", HERE / "control.json"
PROMPTS = ("def read_config(path):\n    ", "class Stack:\n    def ", "import os\nimport sys\n\n\ndef ")
DRAFT, PROMPT_TOKENS, NEW_TOKENS, ROWS = 2, 64, 64, 8


def main(target: None, overrides: list[str], full: bool = False) -> int:
    """Trains the demo's recipe in its run folder (or finds it trained) and reports on it; returns the exit code.

    full: the model then goes through the rest of its life (see `life.py`).
    """
    recipe = config.load(PretrainRecipe, HYBRID, overrides)
    say("Trimaran's first run: a small Nemotron-3 (Mamba-2, attention, latent experts, a draft block)")
    say("learns Python from the standard library of this interpreter. Nothing is downloaded.\n")
    code = pretrain.main(recipe)
    if code:
        return code
    report(Path(recipe.run))
    return live(Path(recipe.run), recipe.seed) if full else 0


def report(folder: Path) -> None:
    """The loss curve, the comparison, drafting and samples of a finished run."""
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    say("\n" + curve_terminal(series(folder / "metrics.jsonl", train="loss"), title="loss, nats per token"))
    say("\nHeld-out packages (email, http, logging), bits per byte; lower is better")
    for line in comparison(folder, result):
        say("  " + line)
    model, tokenizer = hub.load(folder), Tokenizer.load(folder)
    drafting = measure_drafting(model, tokenizer, TokenShards(folder / "data" / "held_out" / "stdlib"))
    say(f"\nDraft block (MTP), greedy, {DRAFT} tokens drafted per pass: {drafting}")
    say("\nSamples at temperature 0.7 (a model this small knows the shape of Python, not its sense):")
    for text in samples(model, tokenizer):
        say("\n" + "\n".join("    " + line for line in text.splitlines()))
    say(f"\nYours in {folder}: model, tokenizer, chat template, metrics.jsonl, curve.png. Next:")
    say(f'  trimaran generate {folder} "class Queue:"')
    say(f"  trimaran chat {folder}")


def comparison(folder: Path, result: dict[str, Any]) -> list[str]:
    """This run beside the bigram model (fitted here and now) and the committed attention-only control."""
    training, held_out = (TokenShards(folder / "data" / part / "stdlib") for part in ("training", "held_out"))
    yardstick = bigram.bits_per_byte(training, held_out, training.vocab_size)
    reached = result["bits_per_byte"]
    lines = [
        f"{'bigram model, same tokens':34}{yardstick:.3f}",
        f"{'this run':34}{reached:.3f}   {reached / yardstick:.2f} x the bigram",
    ]
    if CONTROL.is_file():
        control = json.loads(CONTROL.read_text(encoding="utf-8"))
        label = "attention only (committed result)"
        lines.append(f"{label:34}{control['mean']:.3f}   same size and time, {control['seeds']} seeds")
    return lines


@dataclass(frozen=True)
class Drafting:
    """How many drafted tokens stood, and how many tokens a pass of the whole model gave."""

    drafted: int
    accepted: int
    tokens: int
    passes: int

    def __str__(self) -> str:
        share, per_pass = self.accepted / self.drafted, self.tokens / self.passes
        return f"{self.accepted} of {self.drafted} accepted ({share:.0%}), {per_pass:.2f} tokens per pass"


def measure_drafting(model: HybridModel, tokenizer: Tokenizer, held_out: TokenShards) -> Drafting:
    """Greedy continuations of held-out documents with the draft block proposing."""
    long_enough = [i for i in range(len(held_out)) if held_out.starts[i + 1] - held_out.starts[i] > PROMPT_TOKENS]
    prompts = [held_out.document(place)[:PROMPT_TOKENS].tolist() for place in long_enough[:ROWS]]
    settings = Sampling(temperature=0.0, max_tokens=NEW_TOKENS)
    outputs = generate(model, prompts, settings, tokenizer=tokenizer, draft=DRAFT)
    return Drafting(
        sum(one.drafted for one in outputs),
        sum(one.accepted for one in outputs),
        sum(len(one.tokens) for one in outputs),
        sum(one.passes for one in outputs),
    )


def samples(model: HybridModel, tokenizer: Tokenizer) -> list[str]:
    """Continuations of a few openings, the openings included."""
    settings = Sampling(temperature=0.7, top_p=0.95, max_tokens=72, seed=0)
    begun = [] if tokenizer.bos_id is None else [tokenizer.bos_id]  # as every document of the training text begins
    prompts = [begun + tokenizer.encode(prompt) for prompt in PROMPTS]
    outputs = generate(model, prompts, settings, tokenizer=tokenizer, draft=1)
    return [prompt + output.text for prompt, output in zip(PROMPTS, outputs, strict=True)]
