"""What pretraining minimises: the next token, the tokens after it (MTP), and the routers' imbalance.

    CE + scale / depths * sum_d CE_d + coefficient * sum over MoE blocks of the sequence balance loss

Each cross-entropy is divided by the sum of its own weights over the *whole* optimizer step, so cutting the step into
parts changes nothing. The weights are divided before the first part is computed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimaran.data.batch import Batch
from trimaran.errors import Refusal
from trimaran.model.hybrid import HybridModel
from trimaran.model.sphere import project
from trimaran.ops.loss import cross_entropy
from trimaran.parallel.world import World
from trimaran.train.balance import Balance


@dataclass(frozen=True)
class Depth:
    """One prediction per place [B, T]: the token fed to the draft block (None: the trunk), the target, its weight."""

    next_BT: Tensor | None
    targets_BT: Tensor
    weights_BT: Tensor


@dataclass(frozen=True)
class Streams:
    """A step's rows, or some of them: `share` is the part of the step's rows that they are."""

    tokens_BT: Tensor
    doc_ids_BT: Tensor
    depths: tuple[Depth, ...]
    share: float = 1.0

    def rows(self, start: int, stop: int) -> "Streams":
        """Rows from `start` to `stop`."""
        share = self.share * (stop - start) / len(self.tokens_BT)
        return self._each(lambda stream: stream[start:stop], share)

    def columns(self, start: int, stop: int) -> "Streams":
        """The tokens from `start` to `stop` of every row."""
        return self._each(lambda stream: stream[:, start:stop], self.share)

    def to(self, device: torch.device) -> "Streams":
        """The same on `device`."""
        return self._each(lambda stream: stream.to(device, non_blocking=True), self.share)

    def _each(self, change: Callable[[Tensor], Tensor], share: float) -> "Streams":
        depths = tuple(
            Depth(None if one.next_BT is None else change(one.next_BT), change(one.targets_BT), change(one.weights_BT))
            for one in self.depths
        )
        return Streams(change(self.tokens_BT), change(self.doc_ids_BT), depths, share)


def streams(batch: Batch, depths: int) -> Streams:
    """Targets of the trunk and of `depths` further tokens, the weights of each summing to 1.

    At depth d the place t reads token t + d and predicts token t + d + 1. It counts where all of t ... t + d + 1 are
    in the row and in one document (the trunk's own target may lie one past the row).
    """
    ids_BT = batch.doc_ids_BT
    goes_on_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    goes_on_BT[:, :-1] = (ids_BT[:, 1:] == ids_BT[:, :-1]) & (ids_BT[:, :-1] >= 0)
    if not bool((batch.weights_BT != 0).any()):
        raise Refusal("a batch without a target to learn", "at least one weight above 0", "give longer documents")
    found = [Depth(None, batch.targets_BT, batch.weights_BT)]
    for _ in range(depths):
        last = found[-1]
        weights_BT = shifted(last.weights_BT) * goes_on_BT
        found.append(Depth(last.targets_BT, shifted(last.targets_BT), weights_BT))
    return Streams(batch.tokens_BT, ids_BT, tuple(normalised(depth) for depth in found))


def shifted(x_BT: Tensor) -> Tensor:
    """x[t + 1] at t, and 0 at the end of the row."""
    moved_BT = torch.zeros_like(x_BT)
    moved_BT[:, :-1] = x_BT[:, 1:]
    return moved_BT


def normalised(depth: Depth) -> Depth:
    """Weights that sum to 1, or are all 0 (documents too short for this depth)."""
    total = float(depth.weights_BT.sum(dtype=torch.float64))
    return Depth(depth.next_BT, depth.targets_BT, depth.weights_BT / (total or 1.0))


class Watched:
    """What every objective does about the model's experts: `balance` counts their loads during a step, and moves the
    routers' biases by them once it is done."""

    model: HybridModel
    balance: Balance

    def observed(self) -> Mapping[str, Tensor]:
        """What else is worth a line in the metrics, before `after_step` forgets it; asked once a step."""
        self.balance.gather()
        violation = self.balance.violation()
        return {} if violation is None else {"max_vio": violation}

    def after_step(self) -> None:
        """Once the optimizer has stepped."""
        self.balance.step()
        if self.model.config.residual == "ngpt":
            project(self.model)

    def abandon(self) -> None:
        """The step will not be finished."""
        self.balance.forget()


class Pretraining(Watched):
    """The objective of a pretraining step. `mtp_scale` 0 leaves the draft block untrained; it trains on every
    `mtp_every`-th step, for where its cost counts for more than its quality.

    An objective turns a batch into streams, streams into named terms that are added up and differentiated, and acts
    once the weights have changed; the loop knows no more of it.
    """

    def __init__(
        self,
        model: HybridModel,
        *,
        mtp_scale: float,
        aux_loss: float,
        router_bias_rate: float,
        mtp_every: int = 1,
        world: World | None = None,
    ):
        self.model, self.mtp_scale, self.mtp_every, self.aux_loss = model, mtp_scale, mtp_every, aux_loss
        # by the config: the stage of a pipeline that is not the last has no draft block, and the same streams
        self.depths = model.config.mtp_depth if model.config.mtp_pattern and mtp_scale else 0
        self.balance = Balance(model, router_bias_rate, world)

    def streams(self, batch: Batch, step: int = 0) -> Streams:
        """A whole step, its weights normalised; on the device of `batch`. `step` counts the updates before it."""
        return streams(batch, 0 if step % self.mtp_every else self.depths)

    def terms(self, part: Streams) -> tuple[Tensor, dict[str, Tensor]]:
        """(what to differentiate, its terms by name as they are reported: detached, before scaling)."""
        return self.score(self.model.hidden(part.tokens_BT, part.doc_ids_BT), part)

    def names(self, part: Streams) -> list[str]:
        """Of all terms that the stages of a pipeline report between them."""
        routers = bool(self.routers(part))
        return ["loss", *(f"mtp_{depth}" for depth in range(1, len(part.depths))), *(["aux"] if routers else [])]

    def score(self, hidden_BTD: Tensor, part: Streams) -> tuple[Tensor, dict[str, Tensor]]:
        """`terms`, from the hidden vectors that the trunk gave."""
        model, head = self.model, self.model.head
        trunk, *further = part.depths
        loss = weighted(hidden_BTD, head, trunk)
        reported = {"loss": loss.detach()}
        for number, depth in enumerate(further, 1):
            assert model.mtp is not None  # self.depths is 0 without one
            hidden_BTD = model.mtp(hidden_BTD, depth.next_BT, part.doc_ids_BT)
            term = weighted(hidden_BTD, head, depth)
            reported[f"mtp_{number}"] = term.detach()
            loss = loss + self.mtp_scale / len(further) * term
        unequal, seen = self.imbalance(part)
        return (loss if unequal is None else loss + unequal), reported | seen

    def imbalance(self, part: Streams) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What the routers of the forward just done add to the loss, and to the terms."""
        balance = self.balance.collect()
        if balance is None:
            return None, {}
        total, _ = balance
        reported = {"aux": total.detach() * (part.share / self.routers(part))}
        return (self.aux_loss * part.share * total if self.aux_loss else None), reported

    def routers(self, part: Streams) -> int:
        """Router passes of one forward, whichever stage of a pipeline they happen in."""
        config = self.model.config
        return config.pattern.count("E") + (len(part.depths) - 1) * config.mtp_pattern.count("E")


def weighted(hidden_BTD: Tensor, head: torch.nn.Module, depth: Depth) -> Tensor:
    """Cross-entropy of one depth, times its weights."""
    return cross_entropy(hidden_BTD.flatten(0, 1), head, depth.targets_BT.flatten(), depth.weights_BT.flatten())
