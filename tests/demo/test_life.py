"""`trimaran demo --full` after a first run of seconds: every stage is carried out, scored and written down, once."""

import json

import pytest

from tests.train.runs import read_recipe
from trimaran.demo.life import CHAIN, live
from trimaran.train import pretrain

EXAMPLES = [f"data.tasks.{task}.count=8" for task in ("sums", "strings", "sorting", "calls")]
ROLLOUTS = ["train.steps=1", "rollouts.prompts=4", "rollouts.samples=2", "train.batch_size=8", "rollouts.max_tokens=8"]
CHANGES = {
    "tasks": ["n=2", "samples=1", "max_tokens=8"],
    "sft": ["train.steps=1", *EXAMPLES],
    "rlvr": ROLLOUTS,
    "sums": ROLLOUTS,
    "strings": ROLLOUTS,
    "mopd": ["train.steps=1", "rollouts.prompts=4", "train.batch_size=4", "rollouts.max_tokens=8"],
    "heal": [
        *("train.steps=1", "rollouts.pool=4", "train.batch_size=4", "rollouts.max_tokens=8"),
        *("measure.prompts=2", "draft.depth=2"),
    ],
}


@pytest.mark.slow
def test_every_stage_is_scored_beside_its_control_and_none_runs_twice(tmp_path, capsys):
    recipe = read_recipe(tmp_path, steps=2, checkpoint_every=0, eval_every=0)
    assert pretrain.main(recipe) == 0
    base = tmp_path / "run"
    assert live(base, seed=1, changes=CHANGES) == 0
    results = json.loads((base / "results.json").read_text())
    assert list(results) == ["pretrain", *CHAIN]
    for stage in CHAIN:
        assert set(results[stage]) == {"sums", "strings", "sorting", "calls"}
        assert all(set(one) == {"score", "control", "n"} and one["n"] == 2 for one in results[stage].values())
        assert (base / "stages" / stage / "model.safetensors").is_file()
    assert results["mopd"]["sums"]["control"] == results["rlvr"]["sums"]["score"]
    before = {path: path.stat().st_mtime_ns for path in base.rglob("model.safetensors")}
    capsys.readouterr()
    assert live(base, seed=1, changes=CHANGES) == 0
    assert capsys.readouterr().out.count("is finished after") == len(CHAIN)
    assert {path: path.stat().st_mtime_ns for path in base.rglob("model.safetensors")} == before
    assert json.loads((base / "results.json").read_text()) == results
