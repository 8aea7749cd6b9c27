"""Batches of policy optimisation: prompts are rolled out, scored, compared within their groups and packed.

    ask      the curriculum names the prompts of a batch
    roll     the engine answers each of them several times, with the weights as they are now
    judge    rewards are shaped, groups compared: each rollout has an advantage, or is left out
    split    into as many updates as are made of a batch
    pack     rows of tokens with their streams

The position is everything that a run needs to go on to the same bits: the curriculum, rollouts that wait (a stale
batch was sampled before the last update; a batch of several updates may be half used) and the lengths of the records.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trimaran.engine.engine import Engine
from trimaran.evals.play import Player
from trimaran.model.hybrid import HybridModel
from trimaran.ops.logprobs import token_logprobs
from trimaran.rl.advantage import leave_one_out
from trimaran.rl.curriculum import Curriculum, grouped
from trimaran.rl.recipe import PolicySettings, RLRecipe
from trimaran.rl.records import Records
from trimaran.rl.rollout import Rollout, roll
from trimaran.rl.shaping import shaped
from trimaran.rl.streams import Example, PolicyStreams, pack, unpack
from trimaran.rl.summary import summary
from trimaran.tasks.task import Task


class Teacher(Protocol):
    """Adds to examples what another model thinks of their tokens."""

    def __call__(self, examples: Sequence[Example]) -> list[Example]: ...


class Rollouts:
    """The source of an RL run (see `train.loop.Source`). `teacher`: called with the examples of every batch."""

    def __init__(
        self,
        recipe: RLRecipe,
        model: HybridModel,
        engine: Engine,
        tasks: Mapping[str, Task],
        records: Records,
        reference: HybridModel | None = None,
        teacher: Teacher | None = None,
    ):
        self.recipe, self.model, self.tasks, self.records = recipe, model, tasks, records
        self.reference, self.teacher = reference, teacher
        self.player = Player(engine)
        self.pad_id = self.player.tokenizer.pad_id or 0
        rollouts = recipe.rollouts
        self.play = {name: rollouts.play(one.effort) for name, one in recipe.environments.items()}
        self.batches = -(-recipe.train.steps // recipe.updates)
        sizes = {name: task.size() for name, task in tasks.items()}
        self.curriculum = Curriculum(
            recipe.curriculum, recipe.environments, rollouts.prompts, recipe.seed, self.batches, sizes
        )
        self.rolled = self.used = 0  # batches rolled out, and those learnt from
        self.waiting: list[list[Rollout]] = []  # rolled out ahead
        self.updates: list[list[Example]] = []  # of the batch in use, those still to be made
        self.seen: dict[str, float] = {}

    def __next__(self) -> PolicyStreams:
        """The rows of the next update. Rolls out first where no update is left of the last batch."""
        if not self.updates:
            ahead = min(self.recipe.rollouts.stale, self.batches - self.used - 1)
            while len(self.waiting) < 1 + ahead:
                self.waiting.append(self.roll())
            self.updates = self.learnable(self.waiting.pop(0))
        else:
            self.seen = {}
        return self.rows(self.updates.pop(0))

    def rows(self, examples: Sequence[Example]) -> PolicyStreams:
        """The packed rows of an update."""
        return pack(examples, self.recipe.rollouts.row, self.pad_id)

    def roll(self) -> list[Rollout]:
        """A batch of rollouts with the present weights."""
        asked = self.curriculum.ask(self.rolled)
        seed = int(np.random.default_rng([self.recipe.seed, self.rolled]).integers(2**31))
        training = self.model.training
        self.model.eval()  # adapters' dropout is for the trainer
        rollouts = roll(self.player, self.tasks, asked, self.play, samples=self.recipe.rollouts.samples, seed=seed)
        self.model.train(training)
        self.rolled += 1
        self.curriculum.learn(rollouts)
        return rollouts

    def learnable(self, rollouts: list[Rollout]) -> list[list[Example]]:
        """The examples of each update of a batch; notes it in the records."""
        advantages = self.judge(rollouts)
        self.records.write(self.used * self.recipe.updates + 1, rollouts, advantages)
        self.seen = summary(rollouts, advantages)
        self.used += 1
        updates = self.split(rollouts, advantages)
        # in the trainer's own numbers: rounded another way, ratios would begin beside 1
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.recipe.train.precision == "bf16"):
            return [self.read(one) for one in updates]

    def read(self, examples: list[Example]) -> list[Example]:
        """The examples with what others make of their tokens: the reference, the weights of before, a teacher."""
        settings = self.recipe.rollouts
        others = [("reference", self.reference)] if self.reference is not None else []
        if self.recipe.updates > 1:  # with a single one the proximal policy is the present one
            others.append(("proximal", self.model))
        for name, model in others:
            examples = with_logprobs(model, examples, name, settings.row, self.pad_id, settings.temperature)
        return examples if self.teacher is None else self.teacher(examples)

    def judge(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """The advantage of each rollout of a batch; None: it is left out."""
        found: list[float | None] = []
        policy = self.recipe.policy
        for group in grouped(rollouts):
            rewards = [counted(one, policy) for one in group]
            if policy.shuffle_rewards:
                rewards = self.shuffled(rewards, group[0])
            asks_effort = self.recipe.environments[group[0].environment].effort is not None
            rewards = shaped(group, rewards, asks_effort, self.recipe.shaping)
            found += leave_one_out(rewards, policy.normalise)
        return [
            None if one is None else one - policy.malformed * rollout.malformed
            for one, rollout in zip(found, rollouts, strict=True)
        ]

    def shuffled(self, rewards: Sequence[float | None], first: Rollout) -> list[float | None]:
        """The rewards of a group dealt out anew among those who have one."""
        places = [place for place, reward in enumerate(rewards) if reward is not None]
        dealt = np.random.default_rng([self.recipe.seed, self.used, first.group]).permutation(places)
        moved = dict(zip(places, (rewards[place] for place in dealt.tolist())))
        return [moved.get(place) for place in range(len(rewards))]

    def split(self, rollouts: Sequence[Rollout], advantages: Sequence[float | None]) -> list[list[Example]]:
        """The examples of each update: whole groups, every environment in each as far as it goes."""
        updates = self.recipe.updates
        found = []
        for update in range(updates):
            pairs = [
                (one, advantage)
                for one, advantage in zip(rollouts, advantages, strict=True)
                if one.group % updates == update and advantage is not None and one.said
            ]
            weight = 1 / max(1, sum(len(one.said) for one, _ in pairs))
            found.append(
                self.trained([Example(one, float(advantage or 0), weight) for one, advantage in pairs], rollouts)
            )
        return found

    def trained(self, examples: list[Example], rollouts: Sequence[Rollout]) -> list[Example]:
        """Those that go through the model: without an advantage a rollout moves nothing, it only counts in the mean."""
        if self.recipe.policy.idle == "skip" and self.reference is None and self.teacher is None:
            moving = [one for one in examples if one.advantage]
            examples = moving or examples[:1]
        # a batch in which nothing can be learnt still makes a step: of one rollout that counts for nothing
        return examples or [Example(next(one for one in rollouts if one.said), 0.0, 1e-9)]

    def observed(self) -> Mapping[str, float]:
        """What the batch just begun was like, for the metrics."""
        return self.seen

    def state_dict(self) -> dict[str, Any]:
        return {
            "rolled": self.rolled,
            "used": self.used,
            "curriculum": self.curriculum.state(),
            "waiting": [[one.plain() for one in batch] for batch in self.waiting],
            "updates": [[plain(one) for one in update] for update in self.updates],
            "records": self.records.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rolled, self.used = state["rolled"], state["used"]
        self.curriculum.load(state["curriculum"])
        self.waiting = [[Rollout.of(one) for one in batch] for batch in state["waiting"]]
        self.updates = [[example(one) for one in update] for update in state["updates"]]
        self.records.load(state["records"])


def counted(one: Rollout, policy: PolicySettings) -> float | None:
    """The reward that takes part; None for a rollout that failed, or that was cut off and is filtered."""
    return None if one.finish == "length" and policy.overlong == "filter" else one.reward


def with_logprobs(
    model: HybridModel, examples: Sequence[Example], name: str, row: int, pad_id: int, temperature: float
) -> list[Example]:
    """The examples with the stream `name`: log-probabilities of their tokens under `model`."""
    streams = pack(examples, row, pad_id)
    values = unpack(logprobs(model, streams, temperature), streams, examples)
    named: list[dict[str, Any]] = [{name: found} for found in values]
    return [replace(one, **stream) for one, stream in zip(examples, named, strict=True)]


@torch.no_grad()
def logprobs(model: HybridModel, streams: PolicyStreams, temperature: float = 1.0, rows: int = 8) -> Tensor:
    """Log-probabilities [B, T] of the chosen tokens of `streams` under `model`, 0 elsewhere. `rows`: at once.

    Without gradient, in the mode for inference, as the trainer computes them.
    """
    training = model.training
    model.eval()
    found_BT = torch.zeros(streams.tokens_BT.shape, dtype=torch.promote_types(model.dtype, torch.float32))
    for start in range(0, len(found_BT), rows):
        part = streams.rows(start, start + rows).to(model.device)
        counts_BT = part.weights_BT > 0
        hidden_MD = model.hidden(part.tokens_BT, part.doc_ids_BT)[counts_BT]
        logp_M = token_logprobs(hidden_MD, model.head, part.targets_BT[counts_BT], temperature=temperature)
        found_BT[start : start + rows][counts_BT.cpu()] = logp_M.cpu()
    model.train(training)
    return found_BT


def plain(one: Example) -> dict[str, Any]:
    """An example as JSON holds it."""
    return {**asdict(one), "rollout": one.rollout.plain()}


def example(plain: Mapping[str, Any]) -> Example:
    """The reverse of `plain`."""
    streams = {name: plain[name] and tuple(plain[name]) for name in ("proximal", "reference", "teacher")}
    return Example(**{**plain, **streams, "rollout": Rollout.of(plain["rollout"])})
