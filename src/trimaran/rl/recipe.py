"""Settings of a reinforcement learning run over verifiable tasks (stage "rl")."""

from typing import Any, Literal

from pydantic import Field, model_validator

from trimaran.config import Settings
from trimaran.engine.request import EngineSettings
from trimaran.errors import Refusal
from trimaran.evals.play import PlaySettings
from trimaran.model.lora import LoraSettings
from trimaran.ops.backend import OpsSettings
from trimaran.tasks import names
from trimaran.tasks.task import Task
from trimaran.train.adapters import with_still_routers
from trimaran.train.recipe import TrainSettings

Importance = Literal["none", "tis", "icepop", "seq-mask-tis"]

# Bounds of the importance weight where the recipe names none: Super's clamp, IcePop's and the sequence mask's defaults.
RANGES: dict[str, tuple[float, float]] = {
    "none": (0.0, float("inf")),
    "tis": (0.0, 5.0),
    "icepop": (0.5, 5.0),
    "seq-mask-tis": (0.999, 1.002),
}


class Environment(Settings):
    """A task with its settings, and its share of every batch's prompts."""

    task: str
    settings: dict[str, Any] = Field(default_factory=dict)
    share: float = Field(1.0, gt=0, allow_inf_nan=False)
    effort: Literal["low", "medium"] | None = None  # asked for in the prompt, and paid by `shaping.effort`

    def open(self) -> Task:
        """The task; refused when it does not exist, or has no such settings."""
        return names.task(self.task, self.settings)

    def located(self) -> "Environment":
        """The same with absolute paths."""
        return self.replace(settings=names.located(self.task, self.settings))


class RolloutSettings(Settings):
    """What a batch is: `prompts` problems, each answered `samples` times, and how the model answers.

    stale: batches between the weights that a batch is sampled with and those that it changes first; 1 generates the
    next batch before the update. row: tokens of a training row, raised to the longest rollout where that is longer.
    """

    prompts: int = Field(16, ge=1)
    samples: int = Field(16, ge=2)
    max_tokens: int = Field(256, ge=1)  # of each answer, its thought included
    turns: int = Field(8, ge=1)  # answers in an episode, at most
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    thinking: bool = True
    budget: int | None = Field(None, ge=0)  # tokens of each thought, after which it is closed
    grace: int = Field(0, ge=0)
    stale: Literal[0, 1] = 0
    row: int = Field(512, ge=1)

    @model_validator(mode="after")
    def _playable(self) -> "RolloutSettings":
        self.play()  # refuses what cannot be played before a recipe is begun
        return self

    def play(self, effort: Literal["low", "medium"] | None = None) -> PlaySettings:
        """The same for the player of episodes."""
        own = self.model_dump(include={"max_tokens", "turns", "temperature", "thinking", "budget", "grace"})
        return PlaySettings(**own, effort=effort, logprobs=True)


class PolicySettings(Settings):
    """The loss. Published values: clips .2 and .28 (Nano), gate 2, TIS clamp at 5 (Super) or in [.2, 5] (Ultra).

    importance: what becomes of a token whose probability in the trainer differs from the sampler's (see
    `objective.py`); importance_range: its bounds, None for the rule's own. gate: rollouts whose mean exp|Δ| is above it
    are dropped. overlong: a rollout that was cut at its longest is left out ("filter") or learnt from as it was scored.
    idle: rollouts without an advantage are only counted ("skip"), or go through the model like all others ("train").
    gap_limit: mean exp|Δ| of a step past which the run stops; None: never.
    """

    clip_low: float = Field(0.2, ge=0, le=1)
    clip_high: float = Field(0.28, ge=0)
    importance: Importance = "icepop"
    importance_range: tuple[float, float] | None = None
    gate: float | None = Field(2.0, ge=1)
    advantage_clip: float | None = Field(None, gt=0)
    normalise: bool = True  # advantages divided by the standard deviation of the others
    overlong: Literal["filter", "score"] = "filter"
    malformed: float = Field(0.0, ge=0)  # taken from the advantage of a malformed call or thought (Super: 5)
    kl: float = Field(0.0, ge=0)  # weight of the divergence from the model that the run began with
    idle: Literal["skip", "train"] = "skip"
    train_router: bool = False
    gap_limit: float | None = Field(1.1, gt=1)
    shuffle_rewards: bool = False  # a control: rewards change places within their group

    @property
    def bounds(self) -> tuple[float, float]:
        return self.importance_range or RANGES[self.importance]

    @model_validator(mode="after")
    def _bounds_rise(self) -> "PolicySettings":
        low, high = self.bounds
        if not 0 <= low < high:
            raise Refusal(f"importance_range = {[low, high]}", "two rising numbers from 0 on", "swap or correct them")
        if self.importance == "none" and self.importance_range is not None:
            found = f'importance_range = {[low, high]} with importance = "none"'
            raise Refusal(found, "a rule that has a range: tis, icepop, seq-mask-tis", "name one, or leave it out")
        return self


class ShapingSettings(Settings):
    """What is added to a reward for the length of an answer; see `shaping.py`. All off unless set."""

    effort: float = Field(0.0, ge=0)  # Ultra: 0.1
    effort_tokens: int = Field(15000, ge=1)
    effort_penalty: float = Field(1.0, ge=0)
    thought_length: float = Field(0.0, ge=0)  # RLHF of Nano: 0.5 each
    answer_length: float = Field(0.0, ge=0)
    shortest: float = Field(0.0, ge=0)  # for the shortest of the rollouts above the quantile; Nano: 0.5
    shortest_quantile: float = Field(0.8, ge=0, le=1)


class CurriculumSettings(Settings):
    """Prompts chosen by how often they are solved, from a pool of each environment; pool = 0: ever new prompts.

    The aimed-at pass-rate moves from `easy` to `hard` over the run; a prompt's chance falls with its distance from it
    as a Gaussian of width `sigma`. profile: rollouts.jsonl of an earlier run, whose pass-rates the pool begins with.
    """

    pool: int = Field(0, ge=0)
    easy: float = Field(0.8, ge=0, le=1)
    hard: float = Field(0.3, ge=0, le=1)
    sigma: float = Field(0.2, gt=0)
    drop_solved: bool = True
    profile: str | None = None

    @model_validator(mode="after")
    def _profile_of_a_pool(self) -> "CurriculumSettings":
        if self.profile is not None and not self.pool:
            found = "curriculum.profile with curriculum.pool = 0"
            raise Refusal(found, "a pool whose pass-rates it tells", "set curriculum.pool, or leave it out")
        return self


class LogSettings(Settings):
    """transcripts: rollouts of a step that are written out in full, every `every` steps."""

    transcripts: int = Field(2, ge=0)
    every: int = Field(1, ge=1)


class UpdateSettings(TrainSettings):
    """`train` of an RL recipe: `batch_size` counts rollouts per update, so prompts x samples / batch_size updates are
    made of a batch. The draft block is not trained (it is healed afterwards), nor is there a balance loss."""

    lr: float = Field(gt=0)
    warmup: float = Field(0.0, ge=0, le=1)
    decay: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    mtp_scale: Literal[0] = 0
    mtp_every: Literal[1] = 1
    aux_loss: Literal[0] = 0
    eval_every: Literal[0] = 0
    checkpoint_every: int = Field(10, ge=0)


class RLRecipe(Settings):
    """One run of reinforcement learning: `trimaran train RECIPE`. `start`: the folder whose model goes on learning, all
    of its weights or, with a table `lora`, adapters alone."""

    stage: Literal["rl", "mopd"] = "rl"  # "mopd": see mopd_recipe.py
    start: str
    run: str
    seed: int = Field(0, ge=0)
    environments: dict[str, Environment]
    rollouts: RolloutSettings = RolloutSettings()
    policy: PolicySettings = PolicySettings()
    shaping: ShapingSettings = ShapingSettings()
    curriculum: CurriculumSettings = CurriculumSettings()
    logs: LogSettings = LogSettings()
    engine: EngineSettings = EngineSettings()
    train: UpdateSettings
    lora: LoraSettings | None = None
    ops: OpsSettings = OpsSettings()

    @model_validator(mode="before")
    @classmethod
    def _still_routers(cls, given: Any) -> Any:
        return with_still_routers(given)

    @model_validator(mode="after")
    def _fits(self) -> "RLRecipe":
        if not self.environments:
            raise Refusal("no environments", "at least one table [environments.NAME]", 'add task = "NAME" in one')
        if self.rollouts.prompts < len(self.environments):
            found = f"rollouts.prompts = {self.rollouts.prompts} for {len(self.environments)} environments"
            raise Refusal(found, "at least one prompt each", "raise rollouts.prompts")
        rollouts = self.rollouts.prompts * self.rollouts.samples
        size = self.train.batch_size
        if rollouts % size or self.rollouts.prompts % (rollouts // size):
            found = f"train.batch_size = {size}"
            allowed = f"{rollouts} (prompts x samples, one update), or a part of it that splits the prompts evenly"
            raise Refusal(found, allowed, f"set train.batch_size={rollouts}")
        if self.rollouts.stale and self.updates > 1:
            found = f"stale = {self.rollouts.stale} with {self.updates} updates of a batch"
            raise Refusal(found, "stale = 0, or one update", f"set train.batch_size={rollouts}")
        if self.shaping.effort and all(one.effort is None for one in self.environments.values()):
            found = f"shaping.effort = {self.shaping.effort} where no environment asks for less effort"
            raise Refusal(found, "one that does", 'add effort = "low" to its table, or leave shaping.effort out')
        return self

    @model_validator(mode="after")
    def _adapters_alone(self) -> "RLRecipe":
        if self.lora is not None and self.policy.train_router:
            found = "policy.train_router = true with lora"
            raise Refusal(found, "false: all but the adapters is frozen", "leave one of the two out")
        return self

    @model_validator(mode="after")
    def _the_same_again(self) -> "RLRecipe":
        """Drafts made by the clock change the last bits of log-probabilities, and a resumed run would end elsewhere."""
        engine = self.engine
        if engine.drafter != "none" and not engine.draft and engine.acceptance == "coupled":
            found = f'engine.drafter = "{engine.drafter}" with engine.draft = 0, a length that follows the clock'
            raise Refusal(found, "a fixed length, or no drafts", "set engine.draft=3, or leave engine.drafter out")
        return self

    @property
    def updates(self) -> int:
        """Updates made of a batch of rollouts."""
        return self.rollouts.prompts * self.rollouts.samples // self.train.batch_size
