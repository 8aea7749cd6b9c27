"""Batches of texts that a model wrote itself, without scores: what a draft block is healed on.

The trunk is frozen, so the texts do not depend on how far training has come: a pool of them is a function of the seed
and its number alone. The position is one count, and a run that goes on writes its pool once more.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trimaran.engine.engine import Engine
from trimaran.errors import Refusal
from trimaran.evals.play import Player
from trimaran.rl.curriculum import apportioned
from trimaran.rl.heal_recipe import HealRecipe
from trimaran.rl.rollout import Asked, Rollout, roll
from trimaran.rl.streams import laid_out
from trimaran.rl.unroll import Written
from trimaran.tasks.task import Task

POOL_SEED = 1 << 20  # apart from the seeds that order the pools


class Writings:
    """The source of a healing run (see `train.loop.Source`): batches of `train.batch_size` texts, packed."""

    def __init__(self, recipe: HealRecipe, engine: Engine, tasks: Mapping[str, Task]):
        self.recipe, self.tasks = recipe, tasks
        self.player = Player(engine)
        self.pad_id = self.player.tokenizer.pad_id or 0
        self.play = {name: recipe.rollouts.play(one.effort) for name, one in recipe.environments.items()}
        shares = {name: one.share for name, one in recipe.environments.items()}
        self.counts = apportioned(shares, recipe.rollouts.pool)
        self.taken = 0  # batches
        self.pool: tuple[int, list[Rollout]] = (-1, [])
        self.seen: dict[str, float] = {}

    def __next__(self) -> Written:
        """The next batch; writes the next pool first where the last is used up."""
        size, rollouts = self.recipe.train.batch_size, self.recipe.rollouts
        use, batch = divmod(self.taken, rollouts.pool // size)
        number = use // rollouts.uses
        if self.pool[0] != number:
            self.pool = (number, self.write(number))
        order = np.random.default_rng([self.recipe.seed, use]).permutation(rollouts.pool).tolist()
        texts = [self.pool[1][place] for place in order[batch * size : (batch + 1) * size]]
        self.taken += 1
        self.seen = {"length": float(np.mean([len(one.said) for one in texts]))}
        return packed(texts, rollouts.row, self.pad_id)

    def write(self, number: int) -> list[Rollout]:
        """A pool of texts: new prompts of every environment, in the proportions of their shares."""
        asked = [Asked(name, number * count + place) for name, count in self.counts.items() for place in range(count)]
        seed = int(np.random.default_rng([self.recipe.seed, POOL_SEED, number]).integers(2**31))
        return whole(roll(self.player, self.tasks, asked, self.play, samples=1, seed=seed))

    def observed(self) -> Mapping[str, float]:
        """The mean length of the batch's texts, in tokens that the model wrote."""
        return self.seen

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.taken = state["taken"]


def whole(rollouts: list[Rollout]) -> list[Rollout]:
    """The rollouts, refused where a task failed: a text that stopped half-way is no text of the model's own."""
    failed = next((one for one in rollouts if one.error is not None), None)
    if failed is not None:
        found = (
            f"environment {failed.environment}, prompt {failed.number}: {str(failed.error).strip().splitlines()[-1]}"
        )
        raise Refusal(found, "a task that plays to its end", "correct the task")
    return rollouts


def packed(texts: Sequence[Rollout], row: int, pad_id: int) -> Written:
    """Rows of `row` tokens, or as long as the longest text, each text whole in one of them."""
    places, shape = laid_out([len(one.ids) for one in texts], row)
    tokens_BT = torch.full(shape, pad_id)
    ids_BT = torch.full(shape, -1, dtype=torch.int32)
    said_BT = torch.zeros(shape, dtype=torch.bool)
    for number, (one, (at, start)) in enumerate(zip(texts, places, strict=True)):
        here = slice(start, start + len(one.ids))
        tokens_BT[at, here], ids_BT[at, here] = torch.tensor(one.ids), number
        said_BT[at, torch.tensor(one.said, dtype=torch.long) + start] = True
    return Written(tokens_BT, ids_BT, said_BT)
