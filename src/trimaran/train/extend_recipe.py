"""Settings of a long-context extension: a pretrained model reads on at several lengths, at its lowest learning rate."""

from typing import Literal

from pydantic import Field, model_validator

from trimaran.config import Settings
from trimaran.errors import Refusal
from trimaran.ops.backend import OpsSettings
from trimaran.parallel.settings import ParallelSettings
from trimaran.tasks.recall import Recall
from trimaran.train.recipe import DataSettings, TrainSettings, check_spread


class RecallTexts(Recall):
    """`count` texts of key recall, as a source of the mixture under the name of their table."""

    count: int = Field(gt=0)

    def task(self) -> Recall:
        """What the texts are drawn from."""
        return Recall(**{name: getattr(self, name) for name in Recall.model_fields})


class LongData(DataSettings):
    """Text as for pretraining, and tables `recall.NAME` of synthetic key recall beside it.

    `sequence_length` is the short length. The long ones stand in `mixture.phases`, with their shares of the steps; a
    step has batch_size * sequence_length tokens at every length.
    """

    recall: dict[str, RecallTexts] = Field(default_factory=dict)
    held_out_recall: int = Field(100, ge=0)  # problems asked before and after, of each table

    @model_validator(mode="after")
    def _names(self) -> "LongData":
        text = {"stdlib"} if self.source == "stdlib" else set(self.sources) or {"text"}
        if taken := text & set(self.recall):
            name = sorted(taken)[0]
            raise Refusal(f"recall.{name} beside text of that name", "another name", f"rename the table recall.{name}")
        return self

    def lengths(self) -> list[int]:
        """All lengths of rows, rising, the short one among them."""
        phases = range(len(self.mixture.phases))
        drawn = {one.sequence_length for n in phases for one in self.mixture.lengths_of(n, self.sequence_length)}
        return sorted(drawn | {self.sequence_length})


class ConstantTrain(TrainSettings):
    """As for pretraining, the learning rate constant: no warm-up, no decay unless asked."""

    warmup: float = Field(0.0, ge=0, le=1)
    decay: float = Field(0.0, ge=0, le=1)


class ExtendRecipe(Settings):
    """One run of long-context extension: from the model in the folder `start` to one in the folder `run`."""

    stage: Literal["extend"] = "extend"
    start: str
    run: str
    seed: int = Field(0, ge=0)
    data: LongData
    train: ConstantTrain
    parallel: ParallelSettings = ParallelSettings()
    ops: OpsSettings = OpsSettings()

    @model_validator(mode="after")
    def _dealt_out(self) -> "ExtendRecipe":
        """Long rows are few, and each process needs as many as the others."""
        check_spread(self.parallel, self.train, self.data.sequence_length, self.data.mixture)
        return self
