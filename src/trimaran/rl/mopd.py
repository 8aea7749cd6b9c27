"""`trimaran train` with a recipe of stage "mopd": one student learns from several specialists on its own texts.

Multi-teacher on-policy distillation: for every environment there is a teacher, usually the student's own start trained
further on that environment alone. The student answers; the environment's teacher says how likely it would have said
each token; what it would have said more readily becomes likelier, token by token.

    maximise  sum_t m_t c_t min(r_t A_t, clip(r_t) A_t),   A_t = log π_teacher - log π_proximal, clipped
    c_t = π_proximal / π_behaviour, m_t: IcePop's mask on it, r_t = π / π_proximal

(Nemotron 3 Ultra, arXiv 2606.15007, after MiMo-V2-Flash, 2601.02780.) No reward takes part: tasks are scored for the
record alone. Sampling, masks, clips, packing and resuming are those of reinforcement learning.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimaran.errors import Refusal
from trimaran.evals.records import model_digest
from trimaran.model.hybrid import HybridModel
from trimaran.ops.backend import own_process
from trimaran.report import read_metrics, say
from trimaran.rl.main import begin, located
from trimaran.rl.mopd_recipe import MopdRecipe
from trimaran.rl.rollout import Rollout
from trimaran.rl.source import Rollouts
from trimaran.rl.streams import Example, PolicyStreams
from trimaran.rl.teachers import Teachers, check_teacher
from trimaran.rl.whole_laws import WholeLaws, check_laws, with_subjects
from trimaran.text.tokenizer import Tokenizer
from trimaran.train.folder import absolute, carry_out, saved
from trimaran.train.loop import Run


def main(recipe: MopdRecipe) -> int:
    """Carries out a recipe, or what is left of it; returns the exit code (see `loop.fit`).

    The run folder ends as one of reinforcement learning does.
    """
    own_process(recipe.ops)
    teachers = {name: one.replace(path=absolute(one.path)) for name, one in recipe.teachers.items()}
    here = located(recipe.model_copy(update={"teachers": teachers}))
    assert isinstance(here, MopdRecipe)
    return carry_out(here, lambda: opened_run(here), finish)


def opened_run(recipe: MopdRecipe) -> Run:
    """A run at its first step; every teacher is held against the student before a model is opened."""
    student = Tokenizer.load(recipe.start)
    folders = list(dict.fromkeys(one.path for one in recipe.teachers.values()))
    for folder in folders:
        check_teacher(folder, student)
    if recipe.match == "laws":
        check_laws(recipe.start, folders)
    run = begin(recipe, TaughtRollouts)
    if recipe.match == "laws":
        source = run.loader
        assert isinstance(source, TaughtRollouts)
        run.objective = WholeLaws(run.model, recipe, source.teachers)
    return run


class TaughtRollouts(Rollouts):
    """Rollouts whose tokens are worth what the environment's teacher thinks of them, and no more. The position holds a
    digest of every teacher: a run goes on with those it began with, or not at all."""

    def __init__(self, recipe: MopdRecipe, model: HybridModel, *rest: Any):
        super().__init__(recipe, model, *rest)
        self.laws, self.names = recipe.match == "laws", list(recipe.environments)
        self.teachers = Teachers(
            recipe.teacher_of,
            at_once=recipe.teachers_at_once,
            device=model.device,
            row=recipe.rollouts.row,
            pad_id=self.pad_id,
            temperature=recipe.rollouts.temperature,
            cuts=recipe.train.accumulate,
        )
        self.teacher = self.unread if self.laws else self.teachers
        self.digests = {name: model_digest(Path(recipe.teacher_of(name))) for name in self.names}

    @staticmethod
    def unread(examples: Sequence[Example]) -> list[Example]:
        """Where whole laws are compared the objective asks the teachers itself."""
        return list(examples)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "teachers": self.digests}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position. Raises Refusal where a teacher is another model than it was."""
        changed = [name for name, digest in state["teachers"].items() if self.digests.get(name) != digest]
        if changed:
            found = f"the teacher of {', '.join(changed)} has changed since this run was saved"
            raise Refusal(found, "the very files that it began with", "bring them back, or begin a new run: run=…")
        super().load_state_dict(state)

    def rows(self, examples: Sequence[Example]) -> PolicyStreams:
        """The packed rows of an update."""
        streams = super().rows(examples)
        return with_subjects(streams, examples, self.names) if self.laws else streams

    def judge(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Nothing but what a malformed call costs; None for a rollout that failed, or was cut off and is filtered."""
        policy = self.recipe.policy
        return [
            None
            if one.error is not None or (one.finish == "length" and policy.overlong == "filter")
            # not -0.0, which the records would show
            else 0.0 - policy.malformed * one.malformed
            for one in rollouts
        ]

    def learnable(self, rollouts: list[Rollout]) -> list[list[Example]]:
        updates = super().learnable(rollouts)
        if not self.laws:
            self.seen = {**self.seen, **apart([one for update in updates for one in update])}
        return updates


def apart(examples: Sequence[Example]) -> dict[str, float]:
    """Estimates of the reverse KL in nats per token, of each environment and of all: the mean over the student's
    tokens of log π_student - log π_teacher."""
    found: dict[str, list[np.ndarray]] = {}
    for one in examples:
        assert one.teacher is not None
        found.setdefault(one.rollout.environment, []).append(np.subtract(one.rollout.logprobs, one.teacher))
    each = {f"apart/{name}": float(np.concatenate(parts).mean()) for name, parts in found.items()}
    return {"apart": float(np.concatenate([part for parts in found.values() for part in parts]).mean()), **each}


def finish(run: Run) -> dict[str, Any]:
    """The folder as `folder.saved` leaves it, and a word on how near the student has come."""
    result = saved(run)
    seen = [one["apart"] for one in read_metrics(run.folder / "metrics.jsonl") if "apart" in one]
    if seen:
        say(f"nats per token from the teachers: {seen[0]:.4f} at first, {seen[-1]:.4f} at last")
    return result
