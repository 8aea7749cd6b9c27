"""Settings of learning from preferences (stage "dpo")."""

from typing import Any, Literal

from pydantic import Field, model_validator

from trimaran.config import Settings
from trimaran.errors import Refusal
from trimaran.model.lora import LoraSettings
from trimaran.ops.backend import OpsSettings
from trimaran.train.adapters import with_still_routers
from trimaran.train.recipe import TrainSettings


class PairsSettings(Settings):
    """Pairs of answers at `path`: a JSONL file, or a folder of them. `held_out` of the prompts are for measuring."""

    path: str
    held_out: float = Field(0.05, ge=0, lt=1)
    sequence_length: int = Field(2048, gt=1)  # tokens of both texts of a pair, its prompt counted twice
    too_long: Literal["refuse", "drop"] = "refuse"  # drop: their number is said


class PreferenceSettings(Settings):
    """The loss: `weight` x DPO + `sft_weight` x cross-entropy of the chosen answers. Published values: Nano's, against
    calls of tools that are not there (beta .05, weights 1 and .2).

    sft_average: "tokens": a mean over all chosen tokens of a step, as trl's; "pairs": each answer's sum, then a mean
    over the pairs, as NeMo-RL's. The routers' weights stay as they are unless `train_router`.
    """

    beta: float = Field(0.05, gt=0, allow_inf_nan=False)
    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    sft_weight: float = Field(0.2, ge=0, allow_inf_nan=False)
    sft_average: Literal["tokens", "pairs"] = "tokens"
    train_router: bool = False

    @model_validator(mode="after")
    def _something(self) -> "PreferenceSettings":
        if not self.weight and not self.sft_weight:
            raise Refusal("weight = 0 and sft_weight = 0", "at least one above 0", "raise preference.weight")
        return self


class PreferenceTrainSettings(TrainSettings):
    """`train` of such a recipe: `batch_size` counts pairs. The draft block is not trained; it is healed afterwards."""

    batch_size: int = Field(32, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    mtp_scale: Literal[0] = 0
    mtp_every: Literal[1] = 1
    aux_loss: Literal[0] = 0
    eval_every: Literal[0] = 0  # held-out pairs are measured at the end


class PreferenceRecipe(Settings):
    """One run: from the model in the folder `start` to one in the folder `run`. All weights learn, or with a table
    `lora` adapters alone."""

    stage: Literal["dpo"] = "dpo"
    start: str
    run: str
    seed: int = Field(0, ge=0)
    data: PairsSettings
    preference: PreferenceSettings = PreferenceSettings()
    train: PreferenceTrainSettings
    lora: LoraSettings | None = None
    ops: OpsSettings = OpsSettings()

    @model_validator(mode="before")
    @classmethod
    def _still_routers(cls, given: Any) -> Any:
        return with_still_routers(given)

    @model_validator(mode="after")
    def _fits_adapters(self) -> "PreferenceRecipe":
        # With dropout the policy would differ from its reference before anything was learnt.
        if self.lora is not None and self.lora.dropout:
            found = f"lora.dropout = {self.lora.dropout}"
            raise Refusal(found, "0: a pair is judged against the same model without", "leave it out")
        if self.lora is not None and self.preference.train_router:
            found = "preference.train_router = true with lora"
            raise Refusal(found, "false: all but the adapters is frozen", "leave one of the two out")
        return self
