"""Direct preference optimisation: the chosen answer gains probability on the rejected one, measured from a reference.

    margin = beta [(log π(w) - log ref(w)) - (log π(l) - log ref(l))]            w chosen, l rejected, sums over tokens
    loss   = weight * mean over pairs of -log sigmoid(margin) + sft_weight * cross-entropy of w

Rafailov et al., arXiv 2305.18290; at π = ref the gradient is beta / 2 (grad log π(l) - grad log π(w)). The second term
keeps the chosen answers' own probability from falling with the rejected ones' (Nemotron 3 Nano, appendix C; RPO). The
reference is the model that the run begins with, so its log-probabilities are computed once, before the first step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.model.hybrid import HybridModel
from trimaran.ops.logprobs import token_logprobs
from trimaran.ops.numbers import at_least_fp32
from trimaran.rl.objective import freeze
from trimaran.rl.preference_pairs import CHOSEN, REJECTED, PairRows, Pairs
from trimaran.rl.preference_recipe import PreferenceSettings
from trimaran.train.balance import Balance
from trimaran.train.objective import Watched


def answer_logprobs(model: HybridModel, part: PairRows) -> Tensor:
    """log π of the chosen and the rejected answer of each pair [B, 2], in at least fp32; differentiable."""
    hidden_BTD = model.hidden(part.tokens_BT, part.doc_ids_BT)
    row_M, place_M = (part.counts_BT > 0).nonzero(as_tuple=True)
    logp_M = token_logprobs(hidden_BTD[row_M, place_M], model.head, part.targets_BT[row_M, place_M])
    answer_M = 2 * row_M + part.doc_ids_BT[row_M, place_M]
    return logp_M.new_zeros(2 * len(part.tokens_BT)).index_add(0, answer_M, logp_M).view(-1, 2)


@torch.no_grad()
def reference_logprobs(model: HybridModel, pairs: Pairs, batch_size: int, pad_id: int) -> Tensor:
    """log π of both answers of every pair [N, 2] under `model` as it is, on the CPU; pairs of like length together."""
    was_training = model.training
    model.eval()
    found_N2 = torch.zeros(len(pairs), 2, dtype=at_least_fp32(torch.empty(0, dtype=model.dtype)).dtype)
    order = pairs.places.argsort(kind="stable").tolist()
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        rows = pairs.laid_out(numbers, found_N2, pad_id).to(model.device)
        found_N2[numbers] = answer_logprobs(model, rows).to(found_N2)
    model.train(was_training)
    return found_N2


def preference_loss(logp_B2: Tensor, part: PairRows, settings: PreferenceSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """(the loss of these pairs as a part of their step, its terms and what else is reported: detached, parts add up).

    accuracy: share of pairs whose margin is above 0, one of exactly 0 counting half; rewards: beta times the gain in
    log-probability over the reference.
    """
    rewards_B2 = settings.beta * (logp_B2 - part.reference_B2)
    margin_B = rewards_B2[:, CHOSEN] - rewards_B2[:, REJECTED]
    dpo = -F.logsigmoid(margin_B).sum() / part.pairs
    per = part.chosen_tokens if settings.sft_average == "tokens" else part.pairs
    sft = -logp_B2[:, CHOSEN].sum() / per
    loss = settings.weight * dpo + settings.sft_weight * sft
    reported = {
        "loss": loss,
        "dpo": dpo,
        "sft": sft,
        "accuracy": torch.heaviside(margin_B, margin_B.new_tensor(0.5)).sum() / part.pairs,
        "margin": margin_B.sum() / part.pairs,
        "reward_chosen": rewards_B2[:, CHOSEN].sum() / part.pairs,
        "reward_rejected": rewards_B2[:, REJECTED].sum() / part.pairs,
    }
    return loss, {name: value.detach() for name, value in reported.items()}


class Preference(Watched):
    """The objective of a step (see `train.objective.Pretraining` for what an objective is).

    Freezes the draft block, and the routers unless told otherwise; their balancing bias still follows the load.
    """

    def __init__(self, model: HybridModel, settings: PreferenceSettings, *, router_bias_rate: float = 0.0):
        self.model, self.settings = model, settings
        freeze(model, settings.train_router)
        self.balance = Balance(model, router_bias_rate)

    def streams(self, batch: PairRows, step: int = 0) -> PairRows:
        """The batch as it is: its source has made the streams."""
        return batch

    def terms(self, part: PairRows) -> tuple[Tensor, dict[str, Tensor]]:
        """(what to differentiate, its terms by name as they are reported)."""
        found = preference_loss(answer_logprobs(self.model, part), part, self.settings)
        self.balance.collect()
        return found


@torch.no_grad()
def measured(
    model: HybridModel, pairs: Pairs, reference_N2: Tensor, settings: PreferenceSettings, batch_size: int, pad_id: int
) -> dict[str, float]:
    """What `preference_loss` reports over all `pairs`, as one step."""
    logp_N2 = reference_logprobs(model, pairs, batch_size, pad_id)
    whole = pairs.laid_out(range(len(pairs)), reference_N2, pad_id)
    return {name: float(value) for name, value in preference_loss(logp_N2, whole, settings)[1].items()}
