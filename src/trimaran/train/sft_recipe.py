"""Settings of supervised fine-tuning: which conversations, and what of them is learnt."""

from typing import Any, Literal

from pydantic import Field, model_validator

from trimaran.config import Settings
from trimaran.data.packs import Weighting
from trimaran.errors import Refusal
from trimaran.model.lora import LoraSettings
from trimaran.ops.backend import OpsSettings
from trimaran.train.adapters import with_still_routers
from trimaran.train.recipe import TrainSettings


class TaskEpisodes(Settings):
    """`count` perfect episodes of a task, drawn from its training split; a share of `guesses` among them, which are
    wrong (see `tasks.gold`)."""

    task: str
    count: int = Field(gt=0)
    guesses: float = Field(0.0, ge=0, le=1)
    settings: dict[str, Any] = Field(default_factory=dict)


class MessagesSettings(Settings):
    """Conversations to learn from: those at `path` (a JSONL file, or a folder of them), perfect episodes of `tasks`, or
    both. `held_out` of them (or those at `held_out_path`) are kept for validation."""

    path: str | None = None
    tasks: dict[str, TaskEpisodes] = Field(default_factory=dict)
    held_out: float = Field(0.02, ge=0, lt=1)
    held_out_path: str | None = None
    sequence_length: int = Field(512, gt=1)
    too_long: Literal["refuse", "drop"] = "refuse"  # a conversation that fits no row; drop: their number is said
    duplicates: Literal["drop", "keep"] = "drop"  # of a conversation within one row
    weighting: Weighting = "tokens"  # tokens: all alike; conversations: each alike, whatever its length
    unfold: bool = True  # an example per question where earlier answers have thoughts, which the template drops
    keep_thoughts: bool = False  # show earlier thoughts instead
    reasoning_off: float = Field(0.0, ge=0, le=1)  # of the conversations with thoughts: learnt without
    truncated_thoughts: float = Field(0.0, ge=0, le=1)  # of the same: the thought cut at a random place

    @model_validator(mode="after")
    def _something(self) -> "MessagesSettings":
        if not self.path and not self.tasks:
            step = "add data.path=FILE.jsonl, or a table [data.tasks.NAME]"
            raise Refusal("no conversations to learn from", "data.path, data.tasks, or both", step)
        if self.reasoning_off + self.truncated_thoughts > 1:
            found = f"reasoning_off {self.reasoning_off} + truncated_thoughts {self.truncated_thoughts}"
            raise Refusal(found, "at most 1, as shares of the conversations with thoughts", "lower one of them")
        return self


class SftRecipe(Settings):
    """One run of fine-tuning: from the model in the folder `start` to one in the folder `run`. All weights learn, or
    with a table `lora` adapters alone."""

    stage: Literal["sft"] = "sft"
    start: str
    run: str
    seed: int = Field(0, ge=0)
    data: MessagesSettings
    train: TrainSettings
    lora: LoraSettings | None = None
    ops: OpsSettings = OpsSettings()

    @model_validator(mode="before")
    @classmethod
    def _still_routers(cls, given: Any) -> Any:
        return with_still_routers(given)
