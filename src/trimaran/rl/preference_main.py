"""`trimaran train` with a recipe of stage "dpo": a model and pairs of answers in, one that prefers as they do out."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimaran.data.examples import check_template
from trimaran.errors import Refusal, writing
from trimaran.model.adapter import fingerprint, opened
from trimaran.model.hybrid import HybridModel
from trimaran.ops.backend import own_process
from trimaran.report import say
from trimaran.rl.preference import Preference, measured, reference_logprobs
from trimaran.rl.preference_pairs import Pairs, PairSource, read_pairs
from trimaran.rl.preference_recipe import PreferenceRecipe
from trimaran.train.adapters import begin_adapters
from trimaran.train.folder import absolute, carry_out, saved
from trimaran.train.loop import Run, autocast
from trimaran.train.prepare import optimizer_of
from trimaran.train.sft import opened_model, opened_tokenizer

REFERENCE = "reference.safetensors"


def main(recipe: PreferenceRecipe) -> int:
    """Carries out a recipe, or what is left of it; returns the exit code (see `loop.fit`).

    The run folder ends as a hub folder, with the reference's log-probabilities in it and the held-out pairs measured
    in result.json.
    """
    own_process(recipe.ops)
    recipe = located(recipe)
    return carry_out(recipe, lambda: begin(recipe), finish)


def located(recipe: PreferenceRecipe) -> PreferenceRecipe:
    """The recipe with absolute paths, so that its copy in the run folder means the same from anywhere."""
    data = recipe.data.replace(path=absolute(recipe.data.path))
    return recipe.replace(start=absolute(recipe.start), run=absolute(recipe.run), data=data)


def begin(recipe: PreferenceRecipe) -> Run:
    """A run at its first step: pairs checked and encoded, the reference's log-probabilities known."""
    settings, folder = recipe.train, Path(recipe.run)
    tokenizer = opened_tokenizer(recipe.start)
    check_template(tokenizer)
    training, held_out = read_pairs(recipe.data, tokenizer)
    shape = {"batch_size": settings.batch_size, "pad_id": tokenizer.pad_id}
    model = opened_model(recipe.start, settings.device, tokenizer)
    with writing(folder):
        tokenizer.save(folder)
    # in the run's own numbers: rounded another way, the policy would begin with margins
    with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        references = [kept_reference(folder, name, model, pairs, **shape) for name, pairs in named(training, held_out)]
    kept = (held_out, references[1]) if len(held_out) else None
    source = PairSource(training, references[0], **shape, seed=recipe.seed, held_out=kept)
    say(f"{len(training):,} pairs to learn from, {len(held_out):,} held out")
    torch.manual_seed(recipe.seed)
    begin_adapters(model, recipe.lora, settings, recipe.seed)
    objective = Preference(model, recipe.preference, router_bias_rate=settings.router_bias_rate)
    optimizer = optimizer_of(settings, model)
    return Run(folder, settings, model, objective, optimizer, source, (), tokenizer, "dpo")


def named(training: Pairs, held_out: Pairs) -> list[tuple[str, Pairs]]:
    return [("", training), *([("held-out-", held_out)] if len(held_out) else [])]


def kept_reference(folder: Path, name: str, model: HybridModel, pairs: Pairs, batch_size: int, pad_id: int) -> Tensor:
    """log-probabilities [N, 2] of the pairs' answers under the model that the run begins with, from its folder where
    they have been computed before. Refuses those of other pairs or another model."""
    path = folder / f"{name}{REFERENCE}"
    origin = {"pairs": pairs.digest, "model": fingerprint(model)}
    if path.is_file():
        with opened(path) as file:
            if file.metadata() != origin:
                found = f"{path} is of other pairs or of another model"
                raise Refusal(found, "what the run began with", "put start and data.path back, or name another run=…")
            return file.get_tensor("logprobs")
    logp_N2 = reference_logprobs(model, pairs, batch_size, pad_id)
    with writing(path):
        temporary = path.with_name(f".{path.name}")
        save_file({"logprobs": logp_N2}, temporary, metadata=origin)
        temporary.replace(path)
    return logp_N2


def finish(run: Run) -> dict[str, Any]:
    """The folder as `folder.saved` leaves it, the held-out pairs measured before adapters are merged."""
    source, objective = run.loader, run.objective
    assert isinstance(source, PairSource) and isinstance(objective, Preference)
    beside: dict[str, Any] = {}
    if source.held_out is not None:
        pairs, reference_N2 = source.held_out
        with autocast(run):
            scores = measured(run.model, pairs, reference_N2, objective.settings, source.batch_size, source.pad_id)
        beside["held_out_pairs"] = {"count": len(pairs), **scores}
        say(f"held-out pairs: the chosen answer gained on the rejected one in {scores['accuracy']:.0%}")
    return saved(run, beside)
