"""How many processes a run is spread over, and along which axes."""

from math import prod

from pydantic import Field, model_validator

from trimaran.config import Settings
from trimaran.errors import Refusal


class ParallelSettings(Settings):
    """The sizes of all axes. world = pp * replicate * fsdp * cp * tp; ep divides fsdp * cp * tp.

    replicate   copies of the model; each sees its own rows
    fsdp        processes that share one copy's weights, gradients and optimizer state, each with its own rows
    cp          pieces in which a row's tokens are cut
    tp          parts in which layers are cut, along heads and widths; the residual stream is cut along the tokens
    ep          processes over which a layer's experts are spread
    pp          stages in which the stack of layers is cut; micro_batches go through them one behind the other

    A process that waits for another one longer than `timeout` seconds gives up, and ends the run.
    """

    replicate: int = Field(1, gt=0)
    fsdp: int = Field(1, gt=0)
    cp: int = Field(1, gt=0)
    tp: int = Field(1, gt=0)
    ep: int = Field(1, gt=0)
    pp: int = Field(1, gt=0)
    micro_batches: int = Field(0, ge=0)  # of a pipeline, per step; 0: two for every stage
    timeout: float = Field(600, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> "ParallelSettings":
        if self.shards % self.ep:
            found = f"parallel.ep = {self.ep}"
            allowed = f"a divisor of fsdp x cp x tp = {self.fsdp} x {self.cp} x {self.tp} = {self.shards}"
            raise Refusal(found, allowed, "change ep, or one of those")
        if self.micro_batches and self.pp == 1:
            found = f"parallel.micro_batches = {self.micro_batches} without a pipeline"
            step = "remove it; train.accumulate cuts a step without a pipeline"
            raise Refusal(found, "parallel.pp of 2 or more", step)
        return self

    @property
    def shards(self) -> int:
        """Processes that hold one copy of a pipeline stage between them."""
        return self.fsdp * self.cp * self.tp

    @property
    def rows(self) -> int:
        """Parts in which a step's rows are dealt out."""
        return self.replicate * self.fsdp

    @property
    def parts(self) -> int:
        """Parts of a process's rows that follow each other through a pipeline; 1 without one."""
        return (self.micro_batches or 2 * self.pp) if self.pp > 1 else 1

    @property
    def world(self) -> int:
        """Processes of the whole run."""
        return prod((self.pp, self.replicate, self.shards))
