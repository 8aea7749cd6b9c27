"""Settings of healing a draft block (stage "heal")."""

from typing import Literal

from pydantic import Field, model_validator

from trimaran.config import Settings
from trimaran.engine.request import EngineSettings
from trimaran.errors import Refusal
from trimaran.evals.play import PlaySettings
from trimaran.ops.backend import OpsSettings
from trimaran.rl.recipe import Environment, UpdateSettings


class WritingSettings(Settings):
    """The texts that the block learns from, which the model writes itself: `pool` of them at once, each learnt from
    `uses` times. row: tokens of a training row, raised to the longest text where that is longer."""

    pool: int = Field(256, ge=1)
    uses: int = Field(1, ge=1)
    max_tokens: int = Field(256, ge=2)  # of each answer, its thought included
    turns: int = Field(8, ge=1)  # answers in an episode, at most
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    thinking: bool = True
    row: int = Field(512, ge=1)

    def play(self, effort: Literal["low", "medium"] | None = None, temperature: float | None = None) -> PlaySettings:
        """The same for the player of episodes, at another temperature where one is given."""
        return PlaySettings(
            max_tokens=self.max_tokens,
            turns=self.turns,
            temperature=self.temperature if temperature is None else temperature,
            thinking=self.thinking,
            effort=effort,
            logprobs=True,
        )


class DraftSettings(Settings):
    """What the block learns. Published values (Ultra): depth 7, temperature 2."""

    depth: int = Field(7, ge=1)  # drafts in a row that it is trained for
    temperature: float = Field(2.0, gt=0, allow_inf_nan=False)  # of both laws in the divergence


class MeasureSettings(Settings):
    """How the gain is measured: answers to `prompts` held-out prompts, with `draft` tokens proposed per pass."""

    prompts: int = Field(64, ge=1)
    draft: int = Field(7, ge=1)


class HealTraining(UpdateSettings):
    """`train` of a healing recipe: `batch_size` counts texts per update."""

    batch_size: int = Field(64, gt=0)
    router_bias_rate: float = Field(0.0, ge=0)


class HealRecipe(Settings):
    """One run of healing: `trimaran train RECIPE`. `start`: the folder whose draft block is out of step."""

    stage: Literal["heal"] = "heal"
    start: str
    run: str
    seed: int = Field(0, ge=0)
    environments: dict[str, Environment]
    rollouts: WritingSettings = WritingSettings()
    draft: DraftSettings = DraftSettings()
    measure: MeasureSettings = MeasureSettings()
    engine: EngineSettings = EngineSettings()
    train: HealTraining
    ops: OpsSettings = OpsSettings()

    @model_validator(mode="after")
    def _fits(self) -> "HealRecipe":
        if not self.environments:
            raise Refusal("no environments", "at least one table [environments.NAME]", 'add task = "NAME" in one')
        size, pool = self.train.batch_size, self.rollouts.pool
        if pool % size or pool < len(self.environments):
            found = f"rollouts.pool = {pool} with train.batch_size = {size}"
            allowed = "a multiple of it, and a text for each environment"
            raise Refusal(found, allowed, f"set rollouts.pool={-(-max(pool, len(self.environments)) // size) * size}")
        if self.engine.drafter != "none":
            found = f"engine.drafter = {self.engine.drafter!r} while the draft block changes"
            raise Refusal(found, '"none"', "leave it out: the gain is measured with measure.draft")
        return self
