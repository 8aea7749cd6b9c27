"""Distillation by whole laws: at each place of the student's texts the divergence over all tokens, not the one said.

    loss = sum_t weight_t m_t c_t KL( π(. | s_t) || π_teacher(. | s_t) )

The gradient is what that of the sampled tokens is on average (`mopd.py`, with the update on-policy), without the chance
in it; no clip of advantages is needed. It costs both models' logits at every place, a chunk at a time. m_t and c_t are
those of the sampled tokens, since these made the texts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimaran.errors import Refusal
from trimaran.model import hub
from trimaran.model.hybrid import HybridModel
from trimaran.ops.divergence import reverse_kl
from trimaran.ops.logprobs import token_laws
from trimaran.rl.mopd_recipe import MopdRecipe
from trimaran.rl.objective import PolicyGradient, gap, importance
from trimaran.rl.streams import Example, PolicyStreams
from trimaran.rl.teachers import Teachers


@dataclass(frozen=True)
class TaughtStreams(PolicyStreams):
    """`PolicyStreams` that know who teaches: subjects_BT is the place of the rollout's environment in the recipe (-1:
    padding), subject_weights the sum of the step's weights in each environment."""

    subjects_BT: Tensor | None = None
    subject_weights: tuple[float, ...] = ()


def with_subjects(streams: PolicyStreams, examples: Sequence[Example], names: Sequence[str]) -> TaughtStreams:
    """Packed examples, with the environment of each."""
    numbers = torch.tensor([*(names.index(one.rollout.environment) for one in examples), -1])
    subjects_BT = numbers[streams.rollouts_BT]  # -1, padding, is the last
    weights = tuple(float(streams.weights_BT[subjects_BT == number].sum()) for number in range(len(names)))
    own: dict[str, Any] = {one.name: getattr(streams, one.name) for one in fields(streams)}
    return TaughtStreams(**own, subjects_BT=subjects_BT, subject_weights=weights)


class WholeLaws(PolicyGradient):
    """The objective (see `train.objective.Pretraining` for what an objective is); it asks the teachers itself."""

    def __init__(self, model: HybridModel, recipe: MopdRecipe, teachers: Teachers):
        super().__init__(
            model,
            recipe.policy,
            temperature=recipe.rollouts.temperature,
            router_bias_rate=recipe.train.router_bias_rate,
        )
        self.teachers, self.names = teachers, list(recipe.environments)

    def terms(self, part: PolicyStreams) -> tuple[Tensor, dict[str, Tensor]]:
        """(what to differentiate, its terms by name: `apart` is the divergence, unmasked, as `apart/NAME` is)."""
        assert isinstance(part, TaughtStreams) and part.subjects_BT is not None
        hidden_BTD = self.model.hidden(part.tokens_BT, part.doc_ids_BT)
        counts_BT = part.weights_BT > 0
        with torch.no_grad():
            own_M, entropy_M = token_laws(
                hidden_BTD[counts_BT], self.model.head, part.targets_BT[counts_BT], temperature=self.temperature
            )
        chosen = self.chosen(part, counts_BT, own_M)
        w_M = importance(chosen, self.settings)
        subjects_M = part.subjects_BT[counts_BT]
        loss = hidden_BTD.sum() * 0  # so that a part without a place that counts can be differentiated
        reported: dict[str, Tensor] = {"apart": loss.detach()}
        for number in subjects_M.unique().tolist():
            mine_M = subjects_M == number
            term, plain = self.taught(number, part, hidden_BTD, chosen.weights_M[mine_M], w_M[mine_M])
            loss = loss + term
            reported["apart"] = reported["apart"] + plain
            reported[f"apart/{self.names[number]}"] = plain / part.subject_weights[number]
        share_M = chosen.weights_M / part.trained
        self.gaps.append(gap(chosen, share_M))
        self.balance.collect()
        reported |= {
            "loss": loss.detach(),
            "masked": (chosen.weights_M * (w_M == 0)).sum(),
            "entropy": (share_M * entropy_M).sum(),
        }
        return loss, reported

    def taught(
        self, number: int, part: TaughtStreams, hidden_BTD: Tensor, weights_M: Tensor, w_M: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The divergence from an environment's teacher over its places: with the importance weights, and without."""
        assert part.subjects_BT is not None
        here_BT = (part.subjects_BT == number) & (part.weights_BT > 0)
        teacher = self.teachers.model(self.teachers.of(self.names[number]))
        # all rows of the part, and with gradients on: a teacher that is the student then has its very numbers
        theirs_BTD = teacher.hidden(part.tokens_BT, part.doc_ids_BT)
        student = hidden_BTD[here_BT][None], self.model.head, theirs_BTD[here_BT], teacher.head
        softness = self.temperature**-2  # the law that was sampled from is the one to match: no weight for it
        loss, _ = reverse_kl(*student, weights_M * w_M * softness, self.temperature)
        if bool((w_M == 1).all()):
            return loss, loss.detach()
        with torch.no_grad():
            return loss, reverse_kl(*student, weights_M * softness, self.temperature)[0]


def check_laws(student: str, teachers: Iterable[str]) -> None:
    """Refuses folders of teachers whose vocabulary is not that of the folder `student`."""
    own = hub.read_config(Path(student)).vocab_size
    for folder in teachers:
        if (size := hub.read_config(Path(folder)).vocab_size) != own:
            found = f"teacher {folder} has a law over {size} tokens"
            raise Refusal(found, f"the student's {own}", 'set match="tokens", which compares those that were said')
