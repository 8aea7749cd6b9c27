"""`trimaran train` with a recipe of stage "pretrain": text in, a run folder out, the same command again resumes."""

from typing import Any, TypeVar

from trimaran.ops.backend import own_process
from trimaran.parallel.launch import in_turn, joined
from trimaran.report import say
from trimaran.train.folder import absolute, carry_out, saved
from trimaran.train.loop import Run
from trimaran.train.prepare import Texts, begin, place, prepare
from trimaran.train.recipe import DataSettings, PretrainRecipe

D = TypeVar("D", bound=DataSettings)


def main(recipe: PretrainRecipe, texts: Texts | None = None) -> int:
    """Carries out a recipe, or what is left of it; returns the exit code (see `loop.fit`).

    The run folder ends as a hub folder (config.json, safetensors, tokenizer, chat template) with recipe.toml,
    metrics.jsonl, curve.png and result.json, which is written last. `texts` stands in for those the recipe names.
    """
    own_process(recipe.ops)
    recipe = located(recipe)
    with joined(recipe.parallel, place(recipe.train.device)) as world:

        def first_step() -> Run:
            return begin(recipe, in_turn(world, lambda: prepare(recipe, texts)), world=world)

        return carry_out(recipe, first_step, finish, world)


def finish(run: Run) -> dict[str, Any]:
    """The folder as `folder.saved` leaves it, and a word on what was reached."""
    result = saved(run)
    say(f"held-out text: {result['bits_per_byte']:.3f} bits per byte")
    return result


def located(recipe: PretrainRecipe) -> PretrainRecipe:
    """The recipe with absolute paths, so that its copy in the run folder means the same from anywhere."""
    tokenizer = recipe.tokenizer.replace(path=absolute(recipe.tokenizer.path))
    changes = {"run": absolute(recipe.run), "data": located_data(recipe.data), "tokenizer": tokenizer}
    return recipe.model_copy(update=changes)


def located_data(data: D) -> D:
    """The same for the paths of texts."""
    return data.model_copy(
        update={
            "path": absolute(data.path),
            "sources": {name: absolute(path) for name, path in data.sources.items()},
            "held_out_path": absolute(data.held_out_path),
        }
    )
