"""Settings of a pretraining run, and what may change when it is resumed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from trimaran import config
from trimaran.config import Settings
from trimaran.data.mixture import Mixture
from trimaran.errors import Refusal
from trimaran.model.config import LETTERS, ModelConfig
from trimaran.model.presets import preset, sized
from trimaran.model.size import ShapeOnly
from trimaran.ops.backend import OpsSettings
from trimaran.parallel.settings import ParallelSettings
from trimaran.quant.settings import FormatSettings
from trimaran.train.schedule import Schedule


class TokenizerSettings(Settings):
    """A tokenizer is trained on the run's own text, or taken from the folder `path`."""

    vocab_size: int = Field(2048, gt=0)
    path: str | None = None


class Architecture(ModelConfig):
    """The fields of a model, or one of two short ways to them: `size` ("2m") or `preset` ("nano-3").

    Fields given beside `size` or `preset` replace theirs. Once read, all fields are set and both short ways are gone.
    `vocab_size` is the tokenizer's; it need not be given.
    """

    size: str | None = None
    preset: str | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _spelt_out(cls, given: Any, handler: ModelWrapValidatorHandler["Architecture"]) -> "Architecture":
        if not isinstance(given, Mapping):
            return handler(given)
        fields = {name: value for name, value in given.items() if name not in ("size", "preset")}
        short = {name: given[name] for name in ("size", "preset") if given.get(name) not in (None, "none")}
        if not short:
            return handler(fields)
        name, value = next(iter(short.items()))
        if len(short) > 1 or "hidden_size" in fields:
            beside = "preset" if len(short) > 1 else "hidden_size"
            raise Refusal(f"{name} = {value!r} beside {beside}", "one of size, preset, hidden_size", f"remove {beside}")
        if not isinstance(value, str):
            return handler(dict(given))  # refused there by its kind
        base = sized(value, fields.get("vocab_size", 2048))[0] if name == "size" else from_preset(value)
        return handler({**base.model_dump(), **fields})

    def model(self, **changes: Any) -> ModelConfig:
        """The plain configuration, some fields replaced."""
        fields = {name: getattr(self, name) for name in ModelConfig.model_fields}
        return ModelConfig(**{**fields, **changes})


def from_preset(name: str) -> ModelConfig:
    found = preset(name)
    if isinstance(found, ShapeOnly):
        raise Refusal(f"{name} is a shape-only preset ({found.why})", "a preset with layers we compute", "take another")
    return found


class DataSettings(Settings):
    """Text to learn from. `held_out` of the documents (or the text at `held_out_path`) is kept for validation.

    `source = "stdlib"` reads the standard library of the running interpreter, fixed packages held out. Several texts
    go into `sources` (name = path) instead of `path`; `mixture` weighs them.
    """

    source: Literal["files", "stdlib"] = "files"
    path: str | None = None
    sources: dict[str, str] = Field(default_factory=dict)
    field: str = "text"
    held_out: float = Field(0.05, gt=0, lt=1)
    held_out_path: str | None = None
    sequence_length: int = Field(256, gt=1)
    mixture: Mixture = Mixture()

    @model_validator(mode="after")
    def _one_source(self) -> "DataSettings":
        given = [name for name, value in (("path", self.path), ("sources", self.sources)) if value]
        if self.source == "stdlib" and (given or self.held_out_path):
            wrong = [*given, "held_out_path"][0]
            raise Refusal(f'{wrong} beside source = "stdlib"', "no path", f'remove {wrong}, or set source = "files"')
        if self.source == "files" and len(given) != 1:
            found = "both path and sources" if given else "no text to learn from"
            step = "remove one of them" if given else "add data.path=FILE_OR_FOLDER"
            raise Refusal(found, "data.path (a file or a folder), or a table data.sources of names and paths", step)
        return self


class TrainSettings(Settings):
    """How the weights are found. `warmup` and `decay` are shares of `steps`; a step takes `batch_size` rows.

    Published values (Nemotron-3): betas, eps, weight decay, router bias rate 1e-3, sequence balance loss 1e-4, MTP
    scale 0.3 (Super), decay over the last fifth in the minus-sqrt shape (Super), minimum = peak / 100.
    """

    steps: int = Field(gt=0)
    batch_size: int = Field(8, gt=0)  # rows per optimizer step
    accumulate: int = Field(1, gt=0)  # parts in which a step is computed
    lr: float = Field(gt=0)
    min_lr: float = Field(0.0, ge=0)
    warmup: float = Field(0.03, ge=0, le=1)
    decay: float = Field(0.2, ge=0, le=1)
    decay_shape: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "minus_sqrt"
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the linear maps; AdamW for the rest
    muon_times: float = Field(1.0, gt=0)  # Muon's learning rate as a multiple of lr
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip: float | None = Field(1.0, gt=0)  # "none": gradients as they are
    # bf16: autocast over fp32 weights; fp8, nvfp4: most products in narrow numbers beneath it
    precision: Literal["fp32", "bf16", "fp8", "nvfp4"] = "fp32"
    formats: FormatSettings = FormatSettings()  # of fp8 and nvfp4
    device: str = "cpu"
    recompute: str = ""  # pattern letters whose blocks keep no activations and run again for the gradient
    router_bias_rate: float = Field(1e-3, ge=0)
    aux_loss: float = Field(1e-4, ge=0)
    mtp_scale: float = Field(0.3, ge=0)
    mtp_every: int = Field(1, gt=0)  # steps from one on which the draft block trains to the next
    eval_every: int = Field(0, ge=0)  # steps; 0: at the end only
    eval_tokens: int | None = Field(None, gt=0)  # of each held-out text, to whole documents; none: all
    checkpoint_every: int = Field(100, ge=0)  # steps; 0: at the end only
    keep: int = Field(2, gt=0)  # checkpoints

    @model_validator(mode="after")
    def _fits(self) -> "TrainSettings":
        for letter in self.recompute:
            if letter not in LETTERS:
                found = f"train.recompute = {self.recompute!r}"
                raise Refusal(found, f"letters of {''.join(LETTERS)!r}", f"remove {letter!r}")
        if self.warmup + self.decay > 1:
            found = f"warmup {self.warmup} + decay {self.decay}"
            raise Refusal(found, "at most 1, as shares of the steps", "lower one of them")
        if self.accumulate > self.batch_size:
            found = f"accumulate = {self.accumulate}"
            raise Refusal(found, f"1 to batch_size = {self.batch_size}", "lower it, or raise batch_size")
        if self.precision in ("fp32", "bf16") and self.formats != FormatSettings():
            found = f"train.formats beside precision = {self.precision!r}"
            raise Refusal(found, "precision = 'fp8' or 'nvfp4'", "remove the table train.formats, or set precision")
        if self.min_lr > self.lr:
            raise Refusal(f"min_lr = {self.min_lr}", f"0 to lr = {self.lr}", "lower min_lr")
        return self

    def schedule(self) -> Schedule:
        """The learning rate over the run."""
        warmup, decay = round(self.warmup * self.steps), round(self.decay * self.steps)
        return Schedule(self.steps, self.lr, self.min_lr, warmup, decay, self.decay_shape)


class PretrainRecipe(Settings):
    """One pretraining run: `trimaran train RECIPE`. `run` is the folder it writes."""

    stage: Literal["pretrain"] = "pretrain"
    run: str
    seed: int = Field(0, ge=0)
    tokenizer: TokenizerSettings = TokenizerSettings()
    model: Architecture
    data: DataSettings
    train: TrainSettings
    parallel: ParallelSettings = ParallelSettings()
    ops: OpsSettings = OpsSettings()

    @model_validator(mode="before")
    @classmethod
    def _one_vocabulary(cls, given: Any) -> Any:
        """Hands the tokenizer's vocabulary to the model, and refuses two of different size."""
        tables = dict(given)
        model, tokenizer = tables.get("model"), tables.get("tokenizer", {})
        if not isinstance(model, Mapping) or not isinstance(tokenizer, Mapping):
            return tables
        size = tokenizer.get("vocab_size", TokenizerSettings().vocab_size)
        if model.get("vocab_size", size) != size:
            found = f"model.vocab_size = {model['vocab_size']}"
            raise Refusal(found, f"tokenizer.vocab_size = {size}", "remove it: the tokenizer decides")
        tables["model"] = {**model, "vocab_size": size}
        return tables

    @model_validator(mode="after")
    def _dealt_out(self) -> "PretrainRecipe":
        check_spread(self.parallel, self.train, self.data.sequence_length, self.data.mixture)
        return self


def check_spread(spread: ParallelSettings, train: TrainSettings, sequence_length: int, mixture: Mixture) -> None:
    """Refuses a layout over which the steps of some phase, or the optimizer, cannot be spread."""
    if train.optimizer == "muon" and spread.tp > 1:
        found = f'train.optimizer = "muon" with parallel.tp = {spread.tp}'
        raise Refusal(found, "tp = 1: it needs whole matrices", 'set parallel.tp=1, or train.optimizer="adamw"')
    dealt = "replicate x fsdp" + (" x micro_batches" if spread.pp > 1 else "")
    phases = range(len(mixture.phases))
    lengths = {one.sequence_length for phase in phases for one in mixture.lengths_of(phase, sequence_length)}
    for length in sorted(lengths | {sequence_length}):
        rows = train.batch_size * sequence_length // length
        for found, size, parts, axes in (
            (f"{rows} rows of {length} in a step", rows, spread.rows * spread.parts, dealt),
            (f"rows of {length}", length, spread.cp * spread.tp, "cp x tp"),
        ):
            if size % parts:
                step = "change train.batch_size or the length, or the sizes under [parallel]"
                raise Refusal(found, f"a multiple of {axes} = {parts}", step)


# Changing these changes the order of the data not at all, and the weights in their last digits at most: what paths hold
# is checked by digests.
PLACES = ("run", "data.path", "data.sources", "data.held_out_path", "tokenizer.path", "train.device")
FREE = (
    *(*PLACES, "parallel", "train.recompute"),
    *("train.eval_every", "train.eval_tokens", "train.checkpoint_every", "train.keep"),
)


def check_same(recipe: Settings, path: Path) -> None:
    """Refuses a recipe that would go on with the run whose recipe is at `path` in another way."""
    stage, begun = getattr(recipe, "stage", None), config.read(path).get("stage")
    if stage != begun:
        raise Refusal(
            f"stage = {stage!r}, but {path.parent} is of stage {begun!r}", f"{begun!r}", "name another: run=…"
        )
    before, now = (flat(config.plain(one)) for one in (config.load(type(recipe), path), recipe))
    for key in {**before, **now}:
        free = any(key == one or key.startswith(one + ".") for one in FREE)
        if not free and before.get(key) != now.get(key):
            found = f"{key} = {now.get(key)!r}, but {path.parent} was begun with {before.get(key)!r}"
            step = f"take {key} back to resume, or name another folder with run=FOLDER"
            raise Refusal(found, f"{before.get(key)!r}", step)


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
