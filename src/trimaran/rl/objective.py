"""What a step of policy optimisation minimises, from token streams alone.

Three policies: the sampler that said the tokens (behaviour), the trainer before it changed anything (proximal), and the
trainer now.

    Δ = log π_proximal - log π_behaviour,   w = importance(exp Δ)           no gradient
    r = π / π_proximal                                                      exactly 1 with one update of a batch
    loss = sum_t weight_t [ -w min(r A, clip(r, 1 - low, 1 + high) A) + kl w k3 ]
    k3 = exp(ρ) - ρ - 1,  ρ = log π_reference - log π                       (Schulman's estimator of KL(π || reference))

The weights of a step are equal and sum to 1 over all its tokens, so a long rollout counts for more than a short one
(token mean), however the step is cut into parts. The importance weight makes up for the difference between sampler and
trainer:

    none          w = 1
    tis           w = exp Δ, clamped into the range
    icepop        w = exp Δ inside of the range, 0 outside
    seq-mask-tis  w = exp Δ, 0 for rollouts whose geometric mean of it leaves the range

and the gate drops rollouts whose mean of exp |Δ| is above it. Tokens that a mask drops stay in the token mean, as
IcePop has it. As in NVIDIA's NeMo-RL (facts: `loss_functions.py`); GRPO: arXiv 2402.03300, clip-higher and token mean:
DAPO, 2503.14476; IcePop: masks from Ling; TIS: truncated importance sampling.

Shapes: B rows, T tokens of a row, M chosen tokens, R rollouts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimaran.errors import Refusal
from trimaran.model.hybrid import HybridModel
from trimaran.model.moe import Router
from trimaran.ops.logprobs import token_laws
from trimaran.rl.recipe import PolicySettings
from trimaran.rl.streams import PolicyStreams
from trimaran.train.balance import Balance
from trimaran.train.objective import Watched


@dataclass(frozen=True)
class Chosen:
    """Tokens that the model chose [M]; see `PolicyStreams`. proximal: of its own where there is one update."""

    weights_M: Tensor
    advantages_M: Tensor
    behaviour_M: Tensor
    rollouts_M: Tensor
    proximal_M: Tensor
    reference_M: Tensor | None = None


def importance(chosen: Chosen, settings: PolicySettings) -> Tensor:
    """w [M] of the rule that the settings name, 0 where the gate or a mask drops a token."""
    delta_M = chosen.proximal_M - chosen.behaviour_M
    low, high = settings.bounds
    ratio_M = delta_M.exp()
    if settings.importance == "none":
        weight_M = torch.ones_like(ratio_M)
    elif settings.importance == "tis":
        weight_M = ratio_M.clamp(low, high)
    elif settings.importance == "icepop":
        weight_M = torch.where((ratio_M >= low) & (ratio_M <= high), ratio_M, 0.0)
    else:
        geometric_M = over_rollouts(delta_M, chosen.rollouts_M).exp()
        weight_M = torch.where((geometric_M >= low) & (geometric_M <= high), ratio_M, 0.0)
    if settings.gate is not None:
        distance_M = over_rollouts(delta_M.abs().exp(), chosen.rollouts_M)
        weight_M = torch.where(distance_M > settings.gate, 0.0, weight_M)
    return weight_M


def over_rollouts(x_M: Tensor, rollouts_M: Tensor) -> Tensor:
    """The mean over each token's own rollout [M]. All of a rollout's chosen tokens must be there."""
    _, place_M = rollouts_M.unique(return_inverse=True)
    sums_R = x_M.new_zeros(len(x_M)).index_add(0, place_M, x_M)
    counts_R = x_M.new_zeros(len(x_M)).index_add(0, place_M, torch.ones_like(x_M))
    return (sums_R / counts_R.clamp(min=1))[place_M]


def policy_loss(logp_M: Tensor, chosen: Chosen, settings: PolicySettings) -> tuple[Tensor, dict[str, Tensor]]:
    """(the loss, sums of what is reported, each token's share by its weight: detached).

    `clipped`: share of tokens whose gradient the clip takes away; `masked`: dropped by importance rule or gate; `kl`:
    the k3 estimate.
    """
    weights_M, advantages_M = chosen.weights_M, chosen.advantages_M
    if settings.advantage_clip is not None:
        advantages_M = advantages_M.clamp(-settings.advantage_clip, settings.advantage_clip)
    w_M = importance(chosen, settings)
    ratio_M = (logp_M - chosen.proximal_M).exp()
    plain_M = ratio_M * advantages_M
    clipped_M = ratio_M.clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantages_M
    losses_M = -w_M * torch.minimum(plain_M, clipped_M)
    reported = {
        "clipped": (weights_M * (clipped_M < plain_M)).sum(),
        "masked": (weights_M * (w_M == 0)).sum(),
    }
    if chosen.reference_M is not None:
        rho_M = chosen.reference_M - logp_M
        k3_M = rho_M.exp() - rho_M - 1
        losses_M = losses_M + settings.kl * w_M * k3_M
        reported["kl"] = (weights_M * k3_M.detach()).sum()
    loss = (weights_M * losses_M).sum()
    return loss, {"loss": loss.detach()} | {name: value.detach() for name, value in reported.items()}


class PolicyGradient(Watched):
    """The objective of an RL step (see `train.objective.Pretraining` for what an objective is).

    Freezes the draft block, and the routers unless told otherwise; their balancing bias still follows the load.
    """

    def __init__(
        self, model: HybridModel, settings: PolicySettings, *, temperature: float = 1.0, router_bias_rate: float = 0.0
    ):
        self.model, self.settings, self.temperature = model, settings, temperature
        freeze(model, settings.train_router)
        self.balance = Balance(model, router_bias_rate)
        self.gaps: list[Tensor] = []

    def streams(self, batch: PolicyStreams, step: int = 0) -> PolicyStreams:
        """The batch as it is: its source has made the streams."""
        return batch

    def terms(self, part: PolicyStreams) -> tuple[Tensor, dict[str, Tensor]]:
        """(what to differentiate, its terms by name as they are reported)."""
        hidden_BTD = self.model.hidden(part.tokens_BT, part.doc_ids_BT)
        counts_BT = part.weights_BT > 0
        logp_M, entropy_M = token_laws(
            hidden_BTD[counts_BT], self.model.head, part.targets_BT[counts_BT], temperature=self.temperature
        )
        chosen = self.chosen(part, counts_BT, logp_M.detach())
        loss, reported = policy_loss(logp_M, chosen, self.settings)
        share_M = chosen.weights_M / part.trained
        self.gaps.append(gap(chosen, share_M))
        self.balance.collect()
        reported["entropy"] = (share_M * entropy_M).sum()
        return loss, reported

    def chosen(self, part: PolicyStreams, counts_BT: Tensor, own_M: Tensor) -> Chosen:
        """The streams of the chosen tokens. A teacher's advantage is how much likelier it would have said the token."""
        proximal_M = own_M if part.proximal_BT is None else part.proximal_BT[counts_BT].to(own_M.dtype)
        advantages_M = part.advantages_BT[counts_BT].to(own_M.dtype)
        if part.teacher_BT is not None:
            advantages_M = advantages_M + part.teacher_BT[counts_BT].to(own_M.dtype) - proximal_M
        return Chosen(
            part.weights_BT[counts_BT].to(own_M.dtype),
            advantages_M,
            part.behaviour_BT[counts_BT].to(own_M.dtype),
            part.rollouts_BT[counts_BT],
            proximal_M,
            None if part.reference_BT is None else part.reference_BT[counts_BT].to(own_M.dtype),
        )

    def observed(self) -> Mapping[str, Tensor]:
        """How far trainer and sampler are apart: the largest |Δ|, the mean of exp |Δ|. Raises Refusal past the limit:
        nothing has been updated by then."""
        found: dict[str, Tensor] = {}
        if self.gaps:
            largest, mean = torch.stack(self.gaps).unbind(1)
            found = {"gap_max": largest.max(), "gap": mean.sum()}
            limit = self.settings.gap_limit
            if limit is not None and float(found["gap"]) > limit:
                self.abandon()
                raise self.apart(float(found["gap"]), float(found["gap_max"]), limit)
        return {**found, **super().observed()}

    def apart(self, mean: float, largest: float, limit: float) -> Refusal:
        found = (
            f"trainer and sampler disagree about the tokens of this step: mean exp|Δ log p| = {mean:.4f}, "
            f"largest |Δ log p| = {largest:.3g}; nothing was updated"
        )
        step = (
            "look for numbers that differ between them (precision, adapters); a stale or warm run may raise the limit"
        )
        return Refusal(found, f"policy.gap_limit = {limit}", step)

    def after_step(self) -> None:
        """Once the optimizer has stepped."""
        self.gaps = []
        super().after_step()

    def abandon(self) -> None:
        """The step will not be finished."""
        self.gaps = []
        super().abandon()


def gap(chosen: Chosen, share_M: Tensor) -> Tensor:
    """(largest |Δ|, sum of share * exp |Δ|) as one tensor."""
    delta_M = (chosen.proximal_M - chosen.behaviour_M).abs()
    largest = delta_M.max() if len(delta_M) else delta_M.new_zeros(())
    return torch.stack([largest, (share_M * delta_M.exp()).sum()])


def freeze(model: HybridModel, train_router: bool) -> None:
    """Takes the draft block out of training, and the routers' weights too unless they train. Refuses a model of which
    nothing is left to learn: adapters on the draft block alone."""
    if model.mtp is not None:
        model.mtp.requires_grad_(False)
    if not train_router:
        for module in model.modules():
            if isinstance(module, Router):
                module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        found = "adapters on the draft block alone, which is not trained here: nothing is left to learn"
        raise Refusal(found, "targets in the trunk", "name others in lora.targets; stage heal trains a draft block")
