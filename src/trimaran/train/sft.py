"""`trimaran train` with a recipe of stage "sft": a model and conversations in, a model that answers out."""

from collections.abc import Sequence
from pathlib import Path

import torch

from trimaran.data.examples import Controls, Examples, check_template, dedicated, encode, split
from trimaran.data.messages import Chat, chat_of, read
from trimaran.data.packs import Answers, Packs
from trimaran.errors import Refusal, writing
from trimaran.model import hub
from trimaran.model.hybrid import HybridModel
from trimaran.ops.backend import own_process
from trimaran.report import say
from trimaran.tasks import names
from trimaran.tasks.gold import conversations
from trimaran.text.template import NEMOTRON_3
from trimaran.text.tokenizer import Tokenizer
from trimaran.train.adapters import begin_adapters
from trimaran.train.folder import absolute, carry_out
from trimaran.train.loop import Run
from trimaran.train.precision import begin_precision
from trimaran.train.prepare import objective_of, optimizer_of, place
from trimaran.train.sft_recipe import MessagesSettings, SftRecipe


def main(recipe: SftRecipe) -> int:
    """Carries out a recipe, or what is left of it; returns the exit code (see `loop.fit`).

    The run folder ends as a hub folder, as `pretrain.main` leaves one.
    """
    own_process(recipe.ops)
    recipe = located(recipe)
    return carry_out(recipe, lambda: begin(recipe))


def located(recipe: SftRecipe) -> SftRecipe:
    """The recipe with absolute paths, so that its copy in the run folder means the same from anywhere."""
    paths = {"path": absolute(recipe.data.path), "held_out_path": absolute(recipe.data.held_out_path)}
    tasks = {
        name: one.replace(settings=names.located(one.task, one.settings)) for name, one in recipe.data.tasks.items()
    }
    data = recipe.data.replace(**paths, tasks=tasks)
    return recipe.replace(start=absolute(recipe.start), run=absolute(recipe.run), data=data)


def begin(recipe: SftRecipe, label: str = "sft") -> Run:
    """A run at its first step. All conversations are checked and encoded before the model is opened."""
    settings, data = recipe.train, recipe.data
    tokenizer = opened_tokenizer(recipe.start)
    check_template(tokenizer, switch=data.reasoning_off > 0)
    training, held_out = examples_of(data, tokenizer, recipe.seed)
    shape = {"sequence_length": data.sequence_length, "batch_size": settings.batch_size, "pad_id": tokenizer.pad_id}
    packs = Packs(training, **shape, seed=recipe.seed, weighting=data.weighting, duplicates=data.duplicates)
    say(str(packs))
    say(f"{settings.steps:,} steps read them {settings.steps * settings.batch_size / len(packs.packed.rows):.1f} times")
    model = opened_model(recipe.start, settings.device, tokenizer)
    with writing(recipe.run):
        tokenizer.save(recipe.run)
    torch.manual_seed(recipe.seed)
    begin_adapters(model, recipe.lora, settings, recipe.seed)
    draws = begin_precision(model, settings, recipe.seed)
    objective, optimizer = objective_of(settings, model), optimizer_of(settings, model)
    scored = [Answers(held_out, tokenizer.byte_lengths, **shape)] if len(held_out) else []
    return Run(Path(recipe.run), settings, model, objective, optimizer, packs, scored, tokenizer, label, draws=draws)


def opened_tokenizer(start: str) -> Tokenizer:
    """The tokenizer of the folder to begin from, with a chat template: Nemotron-3's where it brings none."""
    if not Path(start).is_dir():
        raise Refusal(f"start = {start!r} is no folder", "a run or hub folder", "train one first, or correct start")
    tokenizer = Tokenizer.load(start)
    if tokenizer.template is not None:
        return tokenizer
    template = NEMOTRON_3.read_text(encoding="utf-8")
    return Tokenizer(tokenizer.document, tokenizer.config, template, tokenizer.generation)


def opened_model(start: str, device: str, tokenizer: Tokenizer) -> HybridModel:
    """The model of the folder to begin from, in fp32."""
    model = hub.load(start, dtype=torch.float32, device=place(device))
    if tokenizer.vocab_size > model.config.vocab_size:
        found = f"a tokenizer of {tokenizer.vocab_size} tokens beside a model of {model.config.vocab_size}"
        raise Refusal(found, "a model that has a vector for each token", f"correct the folder {start}")
    say(f"model: {model.config.pattern} from {start}")
    return model


def examples_of(data: MessagesSettings, tokenizer: Tokenizer, seed: int) -> tuple[Examples, Examples]:
    """(to learn from, held out), encoded. Held-out conversations are taken as they are, without `Controls`."""
    chats = [*(read(data.path) if data.path else []), *episodes(data, seed)]
    training, held_out = apart(chats, read(data.held_out_path)) if data.held_out_path else split(chats, data.held_out)
    training = Controls(data.reasoning_off, data.truncated_thoughts).applied(training, seed)
    return encoded(training, tokenizer, data), encoded(held_out, tokenizer, data)


def apart(chats: Sequence[Chat], held_out: list[Chat]) -> tuple[list[Chat], list[Chat]]:
    """(to learn from, held out): what stands in both is not learnt, and counted."""
    away = {chat.digest for chat in held_out}
    training = [chat for chat in chats if chat.digest not in away]
    if len(training) < len(chats):
        say(f"{len(chats) - len(training)} of {len(chats)} conversations are held out, too, and not learnt")
    return training, held_out


def encoded(chats: Sequence[Chat], tokenizer: Tokenizer, data: MessagesSettings) -> Examples:
    """The conversations as examples that fit a row."""
    chats = list(dedicated(chats, data.unfold and not data.keep_thoughts))
    return fitting(encode(chats, tokenizer, keep_thoughts=data.keep_thoughts), chats, data)


def episodes(data: MessagesSettings, seed: int) -> list[Chat]:
    """Perfect episodes of the tasks that a recipe names. Raises Refusal for a task that fails its check."""
    if not data.tasks:
        return []
    named = {name: (names.task(one.task, one.settings), one.count) for name, one in data.tasks.items()}
    rows = conversations(named, seed, {name: one.guesses for name, one in data.tasks.items()})
    return [chat_of(row, f"task {row['task']}, episode {number}") for number, row in enumerate(rows)]


def fitting(examples: Examples, chats: Sequence[Chat], data: MessagesSettings) -> Examples:
    """The examples that fit a row; longer ones are refused, or dropped and counted, as the recipe says."""
    fits = examples.places <= data.sequence_length
    if fits.all():
        return examples
    longest = int(examples.places.argmax())
    count = int((~fits).sum())
    found = f"{count} of {len(examples)} conversations are longer than {data.sequence_length} tokens"
    example = f"the longest has {examples.places[longest] + 1} ({chats[longest].place})"
    if data.too_long == "refuse" or not fits.any():
        step = 'raise data.sequence_length, or set data.too_long = "drop"'
        raise Refusal(f"{found}; {example}", f"at most {data.sequence_length} + 1 tokens each", step)
    say(f"{found} and left out; {example}")
    return examples.keep(fits)
