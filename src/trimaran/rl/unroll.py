"""The draft block taught by the trunk it drafts for, on texts that the model wrote itself.

The block reads pairs (hidden vector at place t, token t + 1) and its output stands for the trunk's hidden vector at
t + 1: from it the head makes the law of token t + 2, and the next draft goes on from it. At first a draft reads hidden
vectors of the trunk; further along it reads its own. So it is unrolled over `depth` steps that see the same tokens:

    s_0[t] = h[t]                            the trunk's own
    s_k[t] = block(x_k, tokens)[t - 1]       what step k would have in its stead
    x_k[t] = s_j[t],  j drawn evenly from 0 ... k - 1, for each place and step anew

    loss = 1 / depth * sum_k sum_t w_t T^2 KL( softmax(head(h[t + 1]) / T) || softmax(head(block(x_k)[t]) / T) )

Forward KL to the trunk's own law at T = 2, no cross-entropy, and the earlier step drawn at random are Nemotron 3
Ultra's (arXiv 2606.15007: depth 7, 12,000 steps of 64 rollouts). The trunk, the embeddings and the head are frozen.

Where the model wrote nothing, the engine never drafts: prompts carry no weight, and are read with the trunk's vectors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimaran.errors import Refusal
from trimaran.model.hybrid import HybridModel
from trimaran.ops.divergence import forward_kl
from trimaran.train.balance import Balance
from trimaran.train.objective import Watched, shifted


@dataclass(frozen=True)
class Written:
    """Packed rows of texts [B, T]: tokens, documents (-1: padding), and which tokens the model wrote itself."""

    tokens_BT: Tensor
    doc_ids_BT: Tensor
    said_BT: Tensor


@dataclass(frozen=True)
class Unrolled:
    """A step's rows, or some of them. weights_BT sum to 1 over the step; sources_BKT: j of the lines above."""

    tokens_BT: Tensor
    doc_ids_BT: Tensor
    following_BT: Tensor
    weights_BT: Tensor
    sources_BKT: Tensor

    def rows(self, start: int, stop: int) -> "Unrolled":
        """Rows from `start` to `stop`."""
        return self._each(lambda x: x[start:stop])

    def to(self, device: torch.device) -> "Unrolled":
        """The same on `device`."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Unrolled":
        return Unrolled(
            change(self.tokens_BT),
            change(self.doc_ids_BT),
            change(self.following_BT),
            change(self.weights_BT),
            change(self.sources_BKT),
        )


def unrolled(batch: Written, depth: int, draws: torch.Generator) -> Unrolled:
    """The streams of a step. Raises Refusal where no text has two tokens of the model's in a row."""
    ids_BT, said_BT = batch.doc_ids_BT, batch.said_BT
    goes_on_BT = torch.zeros_like(said_BT)
    goes_on_BT[:, :-1] = (ids_BT[:, 1:] == ids_BT[:, :-1]) & (ids_BT[:, :-1] >= 0)
    said_next_BT = shifted(said_BT) & goes_on_BT
    # the first token of an answer comes with the pass that reads the prompt: it is never drafted
    drafted_BT = said_next_BT & shifted(said_next_BT)
    total = int(drafted_BT.sum())
    if not total:
        raise Refusal("rollouts too short to draft in", "answers of two tokens and more", "raise rollouts.max_tokens")
    shape = (depth, *ids_BT.shape)
    sources_KBT = torch.stack([torch.randint(k + 1, shape[1:], generator=draws) for k in range(depth)])
    sources_KBT *= said_BT  # what the prompt's places are read with is known
    following_BT = shifted(batch.tokens_BT) * goes_on_BT
    return Unrolled(batch.tokens_BT, ids_BT, following_BT, drafted_BT / total, sources_KBT.movedim(0, 1))


class Healing(Watched):
    """The objective of a healing step (see `train.objective.Pretraining` for what an objective is).

    Freezes all of `model` but its draft block, whose experts are balanced on the way; the trunk's routers are not.
    """

    def __init__(
        self,
        model: HybridModel,
        *,
        depth: int,
        temperature: float,
        seed: int,
        router_bias_rate: float = 0.0,
        chunk: int = 1024,
    ):
        self.model, self.depth, self.temperature, self.seed = model, depth, temperature, seed
        self.chunk = chunk
        self.mtp = frozen_but_draft(model)
        self.balance = Balance(self.mtp, router_bias_rate)

    def streams(self, batch: Written, step: int = 0) -> Unrolled:
        """A whole step, its weights normalised; its draws depend on the seed and `step` alone."""
        seed = int(np.random.default_rng([self.seed, step]).integers(2**63))
        return unrolled(batch, self.depth, torch.Generator().manual_seed(seed))

    def terms(self, part: Unrolled) -> tuple[Tensor, dict[str, Tensor]]:
        """(what to differentiate, its terms by name: `loss` over all steps, `kl_K` of each)."""
        head = self.model.head
        with torch.no_grad():
            trunk_BTD = self.model.hidden(part.tokens_BT, part.doc_ids_BT)
        outputs_KMD, places = [], part.weights_BT.nonzero(as_tuple=True)
        stands_BTD = [trunk_BTD]
        for k in range(self.depth):
            hidden_BTD = self.mtp(chosen(stands_BTD, part.sources_BKT[:, k]), part.following_BT, part.doc_ids_BT)
            outputs_KMD.append(hidden_BTD[places])
            stands_BTD.append(torch.cat([torch.zeros_like(hidden_BTD[:, :1]), hidden_BTD[:, :-1]], 1))
        teacher_MD = trunk_BTD[places[0], places[1] + 1]  # a weight stands only where the document goes on
        weights_M = part.weights_BT[places] / self.depth
        loss, losses_K = forward_kl(
            torch.stack(outputs_KMD), head, teacher_MD, head, weights_M, self.temperature, self.chunk
        )
        reported = {"loss": loss.detach()}
        reported |= {f"kl_{k}": self.depth * one for k, one in enumerate(losses_K.unbind(), 1)}
        self.balance.collect()
        return loss, reported


def chosen(stands_BTD: Sequence[Tensor], sources_BT: Tensor) -> Tensor:
    """stands[sources[b, t]][b, t] at every place."""
    found_BTD = stands_BTD[0]
    for number, stand_BTD in enumerate(stands_BTD[1:], 1):
        found_BTD = torch.where((sources_BT == number)[..., None], stand_BTD, found_BTD)
    return found_BTD


def frozen_but_draft(model: HybridModel) -> torch.nn.Module:
    """Freezes the model but for its draft block, which is returned. Refuses a model without one."""
    if model.mtp is None:
        raise Refusal("a model without a draft block", "one with mtp_pattern", "pretrain with model.mtp_pattern set")
    model.requires_grad_(False)
    return model.mtp.requires_grad_(True)
