"""Adapters under the engine: sampler and trainer agree after every update, and merging changes neither's words."""

import pytest
from safetensors.torch import load_file

from tests.models import KINDS
from tests.rl import toys
from tests.rl.test_agreement import gap, rolled, update
from trimaran.errors import Refusal
from trimaran.evals.play import Player
from trimaran.model import lora
from trimaran.model.lora import LoraSettings
from trimaran.rl.main import main


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ngpt"])
def test_sampler_and_trainer_agree_with_adapters_after_every_update(kind):
    model, words = toys.pair(kind)
    lora.apply(model, LoraSettings(rank=4, alpha=64.0))
    player, task = Player(toys.engine(model, words)), toys.Capitals(turns=2)
    for step in range(3):
        rollouts = rolled(player, task, seed=step)
        assert gap(model, rollouts) <= 1e-4
        if step < 2:
            before = {name: module.lora_B.weight.clone() for name, module in lora.adapters(model).items()}
            update(model, rollouts)
            found = lora.adapters(model)
            moved = [name for name, weight in before.items() if not weight.equal(found[name].lora_B.weight)]
            assert {name for name in before if not name.startswith("mtp.")} >= set(moved) and moved
    lora.merge(model)
    assert gap(model, rollouts) <= 1e-3  # the engine's words of before, the merged trainer's judgement
    assert gap(model, rolled(player, task, seed=9)) <= 1e-4


def trained(tmp_path, **lora_settings):
    """(weights before, weights after) of a short run with adapters on a model with a draft block."""
    start = toys.folder(tmp_path / "start", pattern="M*", mtp_pattern="*")
    changes = {"train": {"steps": 2, "lr": 0.05}, "lora": {"rank": 2, **lora_settings}}
    assert main(toys.recipe(start, tmp_path / "run", **changes)) == 0
    return load_file(start / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")


def test_adapters_leave_a_frozen_draft_block_as_it_was(tmp_path):
    before, after = trained(tmp_path)
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and not any(name.startswith("mtp.") for name in moved)


def test_adapters_on_nothing_but_a_frozen_draft_block_are_refused(tmp_path):
    with pytest.raises(Refusal, match="nothing is left to learn"):
        trained(tmp_path, targets=["mtp.*"])
    assert not (tmp_path / "run").exists()
