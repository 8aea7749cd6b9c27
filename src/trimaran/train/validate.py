"""How well held-out text is predicted."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from trimaran.data.batch import Batch
from trimaran.model.hybrid import HybridModel
from trimaran.ops.loss import cross_entropy
from trimaran.parallel.world import World

if TYPE_CHECKING:
    from trimaran.parallel.pipeline import Pipeline


class HeldOut(Protocol):
    """Batches whose weights add up to `tokens`, which stand for `bytes` of text; see `data.evaluation.Windows`."""

    @property
    def tokens(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Score:
    """Held-out text: `nats` of cross-entropy over `tokens`, which stand for `bytes` of UTF-8."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, unlike the loss."""
        return self.nats / math.log(2) / self.bytes

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)


@torch.no_grad()
def evaluate(
    model: HybridModel,
    windows: HeldOut | Sequence[HeldOut],
    world: World | None = None,
    pipeline: "Pipeline | None" = None,
) -> Score:
    """Scores every held-out token once, in the model's own precision (no autocast), the draft block left out.

    world: the processes that the model is spread over; each takes its share of every batch. pipeline: of which `model`
    is a stage.
    """
    world = world or World()
    if isinstance(windows, Sequence):
        scores = [evaluate(model, one, world, pipeline) for one in windows]
        return sum(scores[1:], scores[0])
    was_training = model.training
    model.eval()
    shares = (world.share(batch.padded(world.settings.rows)).to(model.device) for batch in windows)
    nats = sum(batch_nats(model, share, pipeline) for share in shares)
    model.train(was_training)
    if not world.alone:
        total = world.sum(torch.tensor(nats, dtype=torch.float64, device=model.device))
        nats = float(world.sum(total, "pp"))
    return Score(nats, windows.tokens, windows.bytes)


def batch_nats(model: HybridModel, batch: Batch, pipeline: "Pipeline | None" = None) -> float:
    """Weighted sum of the cross-entropy over one batch; 0 at the stages that do not see its end."""
    hidden_BTD = pipeline.hidden(batch) if pipeline else model.hidden(batch.tokens_BT, batch.doc_ids_BT)
    if hidden_BTD is None:
        return 0.0
    return float(
        cross_entropy(hidden_BTD.flatten(0, 1), model.head, batch.targets_BT.flatten(), batch.weights_BT.flatten())
    )
