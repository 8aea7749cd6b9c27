"""Healing as a user runs it: a folder in, a folder out; the trunk untouched, drafts that stand more often."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.rl import toys
from trimaran import config
from trimaran.engine.plain import generate
from trimaran.engine.request import EngineSettings
from trimaran.engine.sampler import Sampling
from trimaran.errors import Refusal
from trimaran.evals.play import Group, seed_of
from trimaran.rl.acceptance import Acceptance, compared, interval, measure
from trimaran.rl.heal import main, measured, opened_tasks
from trimaran.rl.heal_recipe import HealRecipe, WritingSettings
from trimaran.rl.recorded import Recorded
from trimaran.rl.rollout import Rollout
from trimaran.rl.writings import Writings, packed
from trimaran.text.conversation import Conversation
from trimaran.train import loop

MEMORY = {"rows": 16, "memory_bytes": 2**24}


def tables(start: Path, run: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "start": str(start),
        "run": str(run),
        "environments": {"one": {"task": "tests.rl.toys:Capitals"}},
        "rollouts": {"pool": 32, "max_tokens": 12, "row": 64, "uses": 2},
        "draft": {"depth": 3},
        "measure": {"prompts": 8, "draft": 3},
        "engine": MEMORY,
        "train": {"steps": 16, "batch_size": 16, "lr": 4e-2, "checkpoint_every": 6},
    }
    for name, table in changes.items():
        whole[name] = {**whole[name], **table}
    return whole


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A folder whose trunk prefers some tokens and whose draft block knows nothing of it."""
    return toys.folder(tmp_path_factory.mktemp("heal") / "start", initializer_range=0.3)


@pytest.fixture(scope="module")
def healed(start, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("heal") / "run"
    assert main(HealRecipe(**tables(start, run))) == 0
    return run


def test_the_trunk_is_the_same_to_the_bit_and_the_draft_block_is_not(start, healed):
    before, after = load_file(start / "model.safetensors"), load_file(healed / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert all(name.startswith("mtp.") for name in changed)


def test_drafts_stand_more_often(healed):
    result = json.loads((healed / "result.json").read_text())
    assert set(result["acceptance"]) == {"greedy", "sampled"} and result["steps"] == 16
    for found in result["acceptance"].values():
        assert found["gain"] == found["after"]["length"] - found["before"]["length"]
        assert 1 <= found["before"]["length"] <= found["after"]["length"] <= 4
        # the trunk says the same texts
        assert found["before"]["tokens"] == found["after"]["tokens"]
    # drawn from a random trunk's nearly even law, drafts hardly ever stand; its likeliest tokens can be learnt
    assert result["acceptance"]["greedy"]["gain_interval"][0] > 0.05
    losses = [json.loads(line)["loss"] for line in (healed / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.6 * losses[0]


def test_interrupted_and_resumed_is_uninterrupted(start, healed, tmp_path, monkeypatch):
    """Stopped amid a pool and carried on from the checkpoint by another process' worth of objects."""
    steps = []

    def stopping(run: Any, *rest: Any) -> Any:
        if len(steps) == 9:
            raise KeyboardInterrupt
        steps.append(run.step)
        return plain(run, *rest)

    recipe, plain = HealRecipe(**tables(start, tmp_path / "run")), loop.train_step
    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            main(recipe)
    assert main(recipe) == 0
    one, other = (load_file(run / "model.safetensors") for run in (healed, tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    results = [json.loads((run / "result.json").read_text())["acceptance"] for run in (healed, tmp_path / "run")]
    assert results[0] == results[1]


def test_acceptance_is_what_plain_speculative_decoding_does():
    model, words = toys.pair("latent")
    task, settings = toys.Capitals(), WritingSettings(max_tokens=20)
    for temperature in (0.0, 1.0):
        groups = [Group(task, task.prompt(n, "held_out"), settings.play(temperature=temperature)) for n in range(3)]
        measured = measure(model, words, groups, 2, EngineSettings(**MEMORY))
        for place, group in enumerate(groups):
            conversation = Conversation(words, thinking=False)
            conversation.hear(group.prompt.messages)
            sampling = Sampling(
                temperature=temperature, max_tokens=20, stop_ids=words.stop_ids, seed=seed_of(group), logprobs=True
            )
            output = generate(model, [conversation.ids], sampling, tokenizer=words, draft=2)[0]
            assert measured.tokens[place] == len(output.tokens) - 1
            assert measured.passes[place] == output.passes - 1 and measured.accepted[place] == output.accepted


def test_lengths_and_intervals_by_hand():
    before, after = Acceptance((8, 6), (8, 6), (8, 6), (0, 0)), Acceptance((8, 6), (4, 3), (8, 6), (4, 3))
    assert before.length == 1 and after.length == 2
    assert interval([after]) == [2, 2]  # every prompt has it, so every draw has it
    found = compared({"greedy": before}, {"greedy": after})["greedy"]
    assert found["gain"] == 1 and found["gain_interval"] == [1, 1]
    assert found["after"]["accepted_share"] == 0.5
    silent = Acceptance((0,), (0,), (0,), (0,))
    assert silent.length == 1 and interval([silent]) == [1, 1]
    uneven = Acceptance((4, 40), (4, 10), (0, 0), (0, 0))
    low, high = interval([uneven])
    assert low < uneven.length < high and low >= 1 and high <= 4


def test_pools_are_written_once_learnt_from_as_often_as_asked_and_always_the_same(start, tmp_path):
    recipe = HealRecipe(**tables(start, tmp_path, rollouts={"pool": 8, "uses": 2}, train={"batch_size": 4}))
    model, words = toys.pair("latent")

    def source() -> Writings:
        return Writings(recipe, toys.engine(model, words), {"one": toys.Capitals()})

    def texts(batch: Any) -> list[tuple[int, ...]]:
        ids, tokens = batch.doc_ids_BT, batch.tokens_BT
        return [tuple(tokens[ids == number].tolist()) for number in range(4)]

    one = source()
    batches = [texts(next(one)) for _ in range(8)]
    uses = [sorted(batches[n] + batches[n + 1]) for n in (0, 2, 4, 6)]
    assert uses[0] == uses[1] and uses[2] == uses[3] and not set(uses[0]) & set(uses[2])
    assert batches[:2] != batches[2:4]
    other = source()
    other.load_state_dict({"taken": 5})
    assert [texts(next(other)) for _ in range(3)] == batches[5:]


def test_texts_are_packed_whole_with_what_the_model_said():
    texts = [
        Rollout("e", 0, n, n, tuple(range(10 * n, 10 * n + length)), (2, 3, length - 1), (0.0,) * 3, 0, "stop", {})
        for n, length in enumerate((40, 20, 7, 33), 1)
    ]
    batch = packed(texts, 64, 0)
    assert batch.tokens_BT.shape == (2, 64)
    for number, one in enumerate(texts):
        here = batch.doc_ids_BT == number
        assert tuple(batch.tokens_BT[here].tolist()) == one.ids
        assert batch.said_BT[here].nonzero()[:, 0].tolist() == list(one.said)
    assert not batch.said_BT[batch.doc_ids_BT < 0].any()


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    asked = [{"prompt": f"boat {n}?"} for n in range(9)]
    answered = {"messages": [{"role": "user", "content": "hull?"}, {"role": "assistant", "content": "yes"}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*asked, answered]))
    task = Recorded(path=str(path), held_out=5)
    task.check()
    assert task.size("train") == 8 and task.size("held_out") == 2
    assert task.prompt(9).messages == task.prompt(1).messages == ({"role": "user", "content": "boat 1?"},)
    # asked twice it is answered twice: what is sampled hangs on the number
    groups = [Group(task, task.prompt(number), WritingSettings().play()) for number in (1, 9)]
    assert seed_of(groups[0]) != seed_of(groups[1])
    assert task.prompt(1, "held_out").messages == ({"role": "user", "content": "hull?"},)
    path.write_text('{"messages": []}\n')
    with pytest.raises(Refusal, match="line 1: a row that asks nothing"):
        task.replace(held_out=6).check()
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(Refusal, match="1 prompts"):
        task.replace(held_out=7).check()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollouts": {"pool": 20}}, "rollouts.pool = 20"),
        ({"engine": {"drafter": "mtp"}}, "while the draft block changes"),
        ({"environments": {"one": {"task": "nothing"}}}, "unknown task"),
    ],
)
def test_settings_that_cannot_work_are_refused(start, tmp_path, changes, words):
    with pytest.raises(Refusal, match=words):
        main(HealRecipe(**tables(start, tmp_path / "run", **changes)))
    assert not (tmp_path / "run").exists()


def test_a_run_begun_beside_its_prompts_goes_on_from_anywhere(start, tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"boat {n}?"}) + "\n" for n in range(9)))
    mine = {"task": "trimaran.rl.recorded:Recorded", "settings": {"path": "prompts.jsonl", "held_out": 3}}
    changes = {"train": {"steps": 2, "batch_size": 16}, "rollouts": {"pool": 16, "max_tokens": 6}}
    recipe = HealRecipe(**{**tables(start, tmp_path / "run", **changes), "environments": {"mine": mine}})
    monkeypatch.chdir(tmp_path)
    assert main(recipe) == 0
    kept = config.load(HealRecipe, tmp_path / "run" / "recipe.toml")
    assert kept.environments["mine"].settings["path"] == str(tmp_path / "prompts.jsonl")


def test_no_held_out_prompt_is_measured_twice(start, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"boat {n}?"}) + "\n" for n in range(9)))
    mine = {"task": "trimaran.rl.recorded:Recorded", "settings": {"path": str(path), "held_out": 3}}
    recipe = HealRecipe(**{**tables(start, tmp_path / "run"), "environments": {"mine": mine}})
    model, words = toys.pair("latent")
    for found in measured(recipe, model, words, opened_tasks(recipe)).values():
        assert len(found.tokens) == 3


def test_a_model_without_a_draft_block_is_refused(tmp_path):
    bare = toys.folder(tmp_path / "bare", mtp_pattern="")
    with pytest.raises(Refusal, match="without a draft block"):
        main(HealRecipe(**tables(bare, tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_recipe_survives_being_written(start, tmp_path):
    recipe = HealRecipe(**tables(start, tmp_path / "run"))
    config.write(recipe, tmp_path / "recipe.toml")
    assert config.load(HealRecipe, tmp_path / "recipe.toml") == recipe
