"""From a recipe to what training needs: tokenizer, token shards, model. Made once, found again on resume."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimaran.data import corpora, shards
from trimaran.data.corpora import Documents
from trimaran.data.evaluation import Windows
from trimaran.data.loader import Loader
from trimaran.data.shards import TokenShards
from trimaran.data.split import split
from trimaran.errors import Refusal, writing
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import HybridModel, build
from trimaran.model.presets import of_width
from trimaran.model.size import count
from trimaran.parallel.parallelize import parallelize
from trimaran.parallel.places import Cut
from trimaran.parallel.world import World
from trimaran.report import say
from trimaran.text.tokenizer import Tokenizer
from trimaran.train.loop import Run
from trimaran.train.objective import Pretraining
from trimaran.train.optim import adamw, muon
from trimaran.train.precision import begin_precision
from trimaran.train.recipe import DataSettings, PretrainRecipe, TrainSettings

STAGING = ".tokenizer-"


@dataclass(frozen=True)
class Texts:
    """Documents by the name of their source: to learn from, and to validate on."""

    training: Mapping[str, Documents]
    held_out: Mapping[str, Documents]


@dataclass(frozen=True)
class Prepared:
    """Encoded text and the model that fits it. Several runs may share one."""

    tokenizer: Tokenizer
    training: Mapping[str, TokenShards]
    held_out: Mapping[str, TokenShards]
    config: ModelConfig


def read(data: DataSettings) -> Texts:
    """The documents that a recipe names."""
    if data.source == "stdlib":
        training, held_out = corpora.stdlib_source()
        say(f"{training}\n{held_out}")
        return Texts({"stdlib": training}, {"stdlib": held_out})
    paths = data.sources or {"text": str(data.path)}
    read_in = {name: corpora.read(path, field=data.field) for name, path in paths.items()}
    say("\n".join(map(str, read_in.values())))
    if data.held_out_path:
        return Texts(read_in, {"held out": corpora.read(data.held_out_path, field=data.field)})
    pairs = {name: split(corpus, data.held_out) for name, corpus in read_in.items()}
    return Texts({name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()})


def prepare(recipe: PretrainRecipe, texts: Texts | None = None) -> Prepared:
    """Tokenizer and shards of a recipe in its run folder, made where they are missing.

    `texts` stands in for those that the recipe names. Raises Refusal for text that cannot be used.
    """
    texts = read(recipe.data) if texts is None else texts
    folder = Path(recipe.run)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tidy(folder)
        tokenizer = find_tokenizer(recipe, texts, folder)
        training, held_out = (
            {name: shards.write(corpus, tokenizer, folder / "data" / part / name) for name, corpus in named.items()}
            for part, named in (("training", texts.training), ("held_out", texts.held_out))
        )
    counts = [sum(one.total_tokens for one in named.values()) for named in (training, held_out)]
    say(f"tokens: {counts[0]:,} to learn from, {counts[1]:,} held out, vocabulary {tokenizer.vocab_size:,}")
    config = recipe.model.model(
        vocab_size=tokenizer.vocab_size,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    return Prepared(tokenizer, training, held_out, config)


def tidy(folder: Path) -> None:
    """Removes what a run that was killed while preparing left half-written."""
    for left_over in (*folder.glob(f"{STAGING}*"), *folder.glob("data/*/.*")):
        shutil.rmtree(left_over, ignore_errors=True)
    for left_over in folder.glob("recipe.toml.*.tmp"):
        left_over.unlink()


def find_tokenizer(recipe: PretrainRecipe, texts: Texts, folder: Path) -> Tokenizer:
    """The tokenizer of the run folder; trained on the training text, or copied, where there is none yet."""
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder)
    if recipe.tokenizer.path is not None:
        tokenizer = Tokenizer.load(recipe.tokenizer.path)
    else:
        words = (one.text for corpus in texts.training.values() for one in corpus.documents())
        tokenizer = Tokenizer.train(words, recipe.tokenizer.vocab_size)
    stage = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
    try:
        tokenizer.save(stage)
        # tokenizer.json last: where it is, the others are too
        for path in sorted(stage.iterdir(), key=lambda path: path.name == "tokenizer.json"):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return tokenizer


def begin(
    recipe: PretrainRecipe,
    prepared: Prepared,
    label: str = "train",
    model: HybridModel | None = None,
    world: World | None = None,
) -> Run:
    """A run at its first step: `model`, or one drawn from the seed; the loader at the start. Raises Refusal for too
    little text.

    world: the processes that it is spread over; each keeps its part of the model.
    """
    world = world or World(device=place(recipe.train.device))
    settings, data, config = recipe.train, recipe.data, prepared.config
    shape = {"sequence_length": data.sequence_length, "batch_size": settings.batch_size}
    loader = Loader(
        prepared.training,
        **shape,
        pad_id=prepared.tokenizer.pad_id,
        seed=recipe.seed,
        mixture=data.mixture,
        steps=settings.steps,
    )
    held_out = [
        Windows(one, **shape, pad_id=prepared.tokenizer.pad_id, documents=within(one, settings.eval_tokens))
        for one in prepared.held_out.values()
    ]
    derived, arithmetic = of_width(config.hidden_size, config.vocab_size)
    if derived == config:  # the recipe turned the `size` dial
        say("\n".join(arithmetic))
    sizes = count(config)
    say(f"model: {config.pattern} with {sizes.total:,} parameters, {sizes.active:,} active per token")
    torch.manual_seed(recipe.seed)
    model = model or build(config, world.device, seed=recipe.seed)
    draws = begin_precision(model, settings, recipe.seed, world)
    cuts: Mapping[str, Cut] = {} if world.alone else parallelize(model, world, data.sequence_length // 2)
    return Run(
        Path(recipe.run),
        settings,
        model,
        objective_of(settings, model, world),
        optimizer_of(settings, model),
        loader,
        held_out,
        prepared.tokenizer,
        label,
        world=world,
        cuts=cuts,
        draws=draws,
    )


def objective_of(settings: TrainSettings, model: HybridModel, world: World | None = None) -> Pretraining:
    """The next token and those after it, weighed as a recipe says."""
    chosen = settings.model_dump(include={"mtp_scale", "mtp_every", "aux_loss", "router_bias_rate"})
    return Pretraining(model, world=world, **chosen)


def optimizer_of(settings: TrainSettings, model: HybridModel) -> torch.optim.Optimizer:
    """The optimizer that a recipe names."""
    shared: dict[str, Any] = settings.model_dump(include={"lr", "betas", "eps", "weight_decay"})
    if settings.optimizer == "adamw":
        return adamw(model, **shared)
    dtype = model.dtype if settings.precision == "fp32" else torch.bfloat16
    return muon(model, times=settings.muon_times, momentum=settings.muon_momentum, dtype=dtype, **shared)


def within(encoded: TokenShards, tokens: int | None) -> int | None:
    """How many of the first documents have `tokens` tokens together, at least one; None: all."""
    return None if tokens is None else max(1, int((encoded.starts[1:] <= tokens).sum()))


def place(name: str) -> torch.device:
    """A device by name; refused where this machine has none of that kind."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        found = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise Refusal(f"train.device = {name!r} ({reason})", found, "set train.device=cpu") from None
    return device
