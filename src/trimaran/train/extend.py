"""`trimaran train` with a recipe of stage "extend": a pretrained model learns to use longer rows.

The published recipe (Nemotron 3 Nano, Super, Ultra): the learning rate stays at the minimum of pretraining, rows of
several lengths take turns (never in one step, whose tokens are always as many), and positions need nothing, since there
are none. A run begins with the weights and the tokenizer of a folder and a fresh optimizer.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trimaran.data.evaluation import Windows
from trimaran.data.recalled import Recalled
from trimaran.data.shards import TokenShards
from trimaran.errors import Refusal, writing
from trimaran.model.hybrid import HybridModel
from trimaran.ops.backend import own_process
from trimaran.parallel.launch import in_turn, joined
from trimaran.parallel.world import World
from trimaran.report import say
from trimaran.text.tokenizer import Tokenizer
from trimaran.train import prepare, pretrain
from trimaran.train.extend_recipe import ExtendRecipe, LongData
from trimaran.train.folder import absolute, carry_out, saved
from trimaran.train.loop import Run
from trimaran.train.prepare import Prepared, Texts, place, within
from trimaran.train.recall import recalled
from trimaran.train.recipe import Architecture, PretrainRecipe, TokenizerSettings
from trimaran.train.sft import opened_model
from trimaran.train.validate import evaluate

BEFORE = "before.json"  # what was measured before the first step

Measures = dict[str, dict[str, float]]  # {"text": {length: bits per byte}, "recall": {table: share right}}


def main(recipe: ExtendRecipe) -> int:
    """Carries out a recipe, or what is left of it; returns the exit code (see `loop.fit`).

    result.json of the run folder has bits per byte at every length, and the share of key recall, before and after.
    """
    own_process(recipe.ops)
    data = pretrain.located_data(recipe.data)
    recipe = recipe.model_copy(update={"start": absolute(recipe.start), "run": absolute(recipe.run), "data": data})
    with joined(recipe.parallel, place(recipe.train.device)) as world:
        stage = Extension(recipe, world)
        return carry_out(recipe, stage.begin, stage.finish, world)


class Extension:
    """A run of this stage: `begin` at its first step, `finish` after the last. `held_out`: windows of each length.

    Before and after are measured where one process has the whole model; elsewhere that is said.
    """

    def __init__(self, recipe: ExtendRecipe, world: World | None = None):
        self.recipe, self.world = recipe, world or World(device=place(recipe.train.device))
        self.held_out: dict[int, list[Windows]] = {}

    def begin(self, texts: Texts | None = None) -> Run:
        """Measures the model as it is, unless that was done before. Raises Refusal for texts that cannot be used."""
        recipe, folder = self.recipe, Path(self.recipe.run)
        if not Path(recipe.start).is_dir():
            raise Refusal(f"start = {recipe.start!r} is no folder", "a run or hub folder", "correct start")
        tokenizer = Tokenizer.load(recipe.start)
        model = opened_model(recipe.start, recipe.train.device, tokenizer)
        longest = max(model.config.max_position_embeddings, *recipe.data.lengths())
        model.config = model.config.replace(max_position_embeddings=longest)
        prepared = in_turn(self.world, lambda: self.prepared(model, texts))
        check_lengths(recipe.data, prepared.training)
        self.held_out = {length: self.windows(prepared, length) for length in recipe.data.lengths()}
        if not self.world.alone:
            say("what was reached is measured on one process alone; held_out_loss in metrics.jsonl is of short rows")
        elif not (folder / BEFORE).is_file():
            before = self.measured(model, tokenizer)
            with writing(folder):
                temporary = folder / f".{BEFORE}"
                temporary.write_text(json.dumps(before, indent=1) + "\n", encoding="utf-8")
                os.replace(temporary, folder / BEFORE)
        return prepare.begin(self.as_pretraining(model), prepared, "extend", model, self.world)

    def as_pretraining(self, model: HybridModel) -> PretrainRecipe:
        """The same run as pretraining would have it: what remains of the stage is where the weights come from."""
        recipe, config = self.recipe, model.config
        tokenizer = TokenizerSettings(vocab_size=config.vocab_size, path=recipe.start)
        architecture = Architecture(**config.model_dump())
        return PretrainRecipe(
            run=recipe.run,
            seed=recipe.seed,
            tokenizer=tokenizer,
            model=architecture,
            data=recipe.data,
            train=recipe.train,
            parallel=recipe.parallel,
        )

    def prepared(self, model: HybridModel, texts: Texts | None) -> Prepared:
        """Encoded text, key recall among it; the configuration is the model's own."""
        recipe = self.recipe
        texts = prepare.read(recipe.data) if texts is None else texts
        drawn = {name: Recalled(one.task(), one.count, recipe.seed) for name, one in recipe.data.recall.items()}
        texts = Texts({**texts.training, **drawn}, texts.held_out)
        return replace(prepare.prepare(self.as_pretraining(model), texts), config=model.config)

    def windows(self, prepared: Prepared, length: int) -> list[Windows]:
        """Held-out text in rows of `length`."""
        rows = max(1, self.recipe.train.batch_size * self.recipe.data.sequence_length // length)
        rows = max(1, rows // self.recipe.train.accumulate)
        shape = {"sequence_length": length, "batch_size": rows, "pad_id": prepared.tokenizer.pad_id}
        limit = self.recipe.train.eval_tokens
        return [Windows(one, **shape, documents=within(one, limit)) for one in prepared.held_out.values()]

    def measured(self, model: HybridModel, tokenizer: Tokenizer) -> Measures:
        """Bits per byte at every length, and the share of key recall in every table."""
        text = {str(length): evaluate(model, windows).bits_per_byte for length, windows in self.held_out.items()}
        problems, tables = self.recipe.data.held_out_recall, self.recipe.data.recall
        asked = tables if problems else {}
        return {
            "text": text,
            "recall": {name: recalled(model, tokenizer, one.task(), problems) for name, one in asked.items()},
        }

    def finish(self, run: Run) -> dict[str, Any]:
        """The folder as `folder.saved` leaves it, before and after in result.json; prints both."""
        if not self.world.alone:
            return saved(run)
        before: Measures = json.loads((run.folder / BEFORE).read_text(encoding="utf-8"))
        assert run.tokenizer is not None
        after = self.measured(run.model, run.tokenizer)
        result = saved(run, {"before": before, "after": after})
        for length, bits in after["text"].items():
            say(f"rows of {int(length):,}: {before['text'][length]:.3f} -> {bits:.3f} bits per byte")
        for name, share in after["recall"].items():
            say(f"key recall, {name}: {before['recall'][name]:.0%} -> {share:.0%}")
        return result


def check_lengths(data: LongData, sources: Mapping[str, TokenShards]) -> None:
    """Says how much of each longer length's reading is as long as its rows; refuses one of short documents alone."""
    sizes = {name: one.total_tokens for name, one in sources.items()}
    for number in range(len(data.mixture.phases)):
        for length in data.mixture.lengths_of(number, data.sequence_length):
            if length.sequence_length <= data.sequence_length:
                continue
            weights = data.mixture.weights_of(number, length, sizes)
            tokens = {name: np.diff(sources[name].starts) for name in weights}
            longest = max(int(one.max()) for one in tokens.values())
            if longest <= data.sequence_length:
                found = f"rows of {length.sequence_length}, but the longest document has {longest} tokens"
                allowed = f"documents longer than data.sequence_length = {data.sequence_length}"
                raise Refusal(found, allowed, "add long texts to data.sources, or a table data.recall.NAME")
            share = sum(
                weight * tokens[name][tokens[name] >= length.sequence_length].sum() / tokens[name].sum()
                for name, weight in weights.items()
            )
            say(f"rows of {length.sequence_length:,}: {share:.0%} of their text is from documents as long as that")
