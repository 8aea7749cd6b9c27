"""Distillation: what a teacher adds to a token, who teaches whom, a student that comes to speak like its teachers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.rl import toys
from trimaran import config
from trimaran.errors import Refusal
from trimaran.model import hub
from trimaran.model.hybrid import build
from trimaran.rl.mopd import apart, main, opened_run
from trimaran.rl.mopd_recipe import MopdRecipe
from trimaran.rl.rollout import Rollout
from trimaran.rl.streams import Example
from trimaran.rl.teachers import Teachers
from trimaran.tasks.task import Prompt, Split
from trimaran.text.tokenizer import Tokenizer
from trimaran.train import loop


class Others(toys.Capitals):
    """The same, asked in other words."""

    name = "others"

    def prompt(self, number: int, split: Split = "train") -> Prompt:
        words = {"role": "user", "content": f"{split} ABC abc ABC {number}"}
        return Prompt(self.name, split, number, (words,), thinking=False)


ENVIRONMENTS = {
    "one": {"task": "tests.rl.toys:Capitals"},
    "two": {"task": "tests.rl.test_mopd:Others", "share": 2},
}


def tables(start: Path, run: Path, taught: dict[str, Path], **changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "start": str(start),
        "run": str(run),
        "environments": {name: ENVIRONMENTS[name] for name in taught},
        "teachers": {name: {"path": str(path)} for name, path in taught.items()},
        "rollouts": {"prompts": 12, "samples": 1, "max_tokens": 8, "row": 64},
        "engine": {"rows": 16, "memory_bytes": 2**24},
        "train": {"steps": 4, "batch_size": 12, "lr": 1e-2, "checkpoint_every": 2},
    }
    for name, table in changes.items():
        whole[name] = {**whole[name], **table} if isinstance(table, dict) and name in whole else table
    return whole


def recipe(*args: Any, **changes: Any) -> MopdRecipe:
    return MopdRecipe(**tables(*args, **changes))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A student that says eight tokens, and two teachers that each prefer other four of them."""
    place = tmp_path_factory.mktemp("mopd")
    drawn = toys.folder(place / "drawn")
    made = {name: place / name for name in ("student", "one", "two")}
    for name, likes in (("student", None), ("one", slice(100, 104)), ("two", slice(104, 108))):
        model = hub.load(drawn, dtype=torch.float32)
        with torch.no_grad():
            model.backbone.embeddings.weight[:, 0] += 1  # much the same in every place, so the head can prefer tokens
            model.lm_head.weight[100:108, 0] += 1.5
            if likes is not None:
                model.lm_head.weight[likes, 0] += 0.3
        hub.save(model, made[name])
        Tokenizer.load(drawn).save(made[name])
    return made


def one_step(run: Any) -> tuple[dict[str, float], list[torch.Tensor]]:
    """What a step reports, and the gradients that it would have followed."""
    run.model.train()
    found = []
    run.optimizer.step = lambda: found.extend(p.grad.clone() for p in run.parameters if p.grad is not None)
    return loop.train_step(run, next(run.loader), 0.0), found


@pytest.mark.parametrize("match", ["tokens", "laws"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_teacher_that_is_the_student_teaches_nothing_at_all(folders, tmp_path, accumulate, match):
    teachers = dict.fromkeys(("one", "two"), folders["student"])
    settings = {"train": {"accumulate": accumulate}, "match": match}
    values, gradients = one_step(opened_run(recipe(folders["student"], tmp_path, teachers, **settings)))
    assert values["loss"] == 0 and gradients and all(not one.any() for one in gradients)


def test_the_gradient_is_that_of_reinforce_with_the_teachers_advantage(folders, tmp_path):
    """By hand: mean over tokens of -(log p_teacher - log p) grad log p, each rollout alone, with its own teacher."""
    teachers = {"one": folders["one"], "two": folders["two"]}
    run = opened_run(
        recipe(folders["student"], tmp_path, teachers, policy={"advantage_clip": 0.3}, train={"clip": None})
    )
    learnt: list[Example] = []
    source: Any = run.loader
    taught = source.teacher
    source.teacher = lambda examples: learnt.extend(taught(examples)) or learnt[-len(examples) :]
    values, gradients = one_step(run)
    models = {name: hub.load(path, dtype=torch.float32) for name, path in teachers.items()}
    total = sum(len(one.rollout.said) for one in learnt)
    loss, far = torch.zeros(()), 0
    for one in learnt:
        ids, said = torch.tensor([one.rollout.ids]), torch.tensor(one.rollout.said)
        targets = ids[0, said][:, None]
        own = run.model(ids).log_softmax(-1)[0, said - 1].gather(1, targets)[:, 0]
        with torch.no_grad():
            other = models[one.rollout.environment](ids).log_softmax(-1)[0, said - 1].gather(1, targets)[:, 0]
        gain = (other - own.detach()).clamp(-0.3, 0.3)
        far += int((gain.abs() > 0.2999).sum())
        loss = loss - (gain * own).sum() / total
    assert far, "the clip was never needed"
    run.model.zero_grad()
    loss.backward()
    expected = [p.grad for p in run.parameters if p.grad is not None]
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)  # fp32, summed in another order
    rollouts = {one.rollout.environment for one in learnt}
    assert rollouts == {"one", "two"} and values["grad_norm"] > 0


@pytest.mark.parametrize("accumulate", [1, 4])
def test_whole_laws_are_the_divergence_at_each_place(folders, tmp_path, accumulate):
    """By hand: the mean over the student's tokens of KL(student || teacher), each rollout alone."""
    teachers = {"one": folders["one"], "two": folders["two"]}
    settings = {"match": "laws", "train": {"clip": None, "accumulate": accumulate}, "rollouts": {"row": 32}}
    run = opened_run(recipe(folders["student"], tmp_path, teachers, **settings))
    source: Any = run.loader
    examples = [one for update in source.learnable(source.roll()) for one in update]
    source.updates = [examples]
    values, gradients = one_step(run)
    models = {name: hub.load(path, dtype=torch.float32) for name, path in teachers.items()}
    total, loss, each = sum(len(one.rollout.said) for one in examples), torch.zeros(()), {"one": [], "two": []}
    for one in examples:
        ids, said = torch.tensor([one.rollout.ids]), torch.tensor(one.rollout.said)
        own = run.model(ids).log_softmax(-1)[0, said - 1]
        with torch.no_grad():
            other = models[one.rollout.environment](ids).log_softmax(-1)[0, said - 1]
        kl = (own.exp() * (own - other)).sum(-1)
        each[one.rollout.environment] += kl.tolist()
        loss = loss + kl.sum() / total
    run.model.zero_grad()
    loss.backward()
    assert abs(values["loss"] - loss.item()) < 1e-6 and abs(values["apart"] - loss.item()) < 1e-6
    for name, found in each.items():
        assert abs(values[f"apart/{name}"] - sum(found) / len(found)) < 1e-6
    for one, other in zip(gradients, [p.grad for p in run.parameters if p.grad is not None], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_every_environment_has_its_own_teacher_and_shuffled_the_next_ones(folders, tmp_path):
    teachers = {"one": folders["one"], "two": folders["two"]}
    plain = recipe(folders["student"], tmp_path, teachers)
    assert plain.teacher_of("one") == str(folders["one"]) and plain.teacher_of("two") == str(folders["two"])
    shuffled = recipe(folders["student"], tmp_path, teachers, shuffle_teachers=True)
    assert shuffled.teacher_of("one") == str(folders["two"]) and shuffled.teacher_of("two") == str(folders["one"])


def test_teachers_held_one_at_a_time_say_the_same(folders, tmp_path, monkeypatch):
    teachers = {"one": folders["one"], "two": folders["two"]}
    run = opened_run(recipe(folders["student"], tmp_path, teachers))
    source: Any = run.loader
    examples = [one for update in source.learnable(source.roll()) for one in update]
    opened: list[str] = []
    load = hub.load
    monkeypatch.setattr(hub, "load", lambda path, **options: opened.append(str(path)) or load(path, **options))
    found = []
    for at_once in (0, 1):
        opened.clear()
        spare = Teachers(
            source.recipe.teacher_of, at_once=at_once, device=torch.device("cpu"), row=64, pad_id=0, temperature=1.0
        )
        found.append([spare(examples), spare(examples)])
        assert len(opened) == (4 if at_once else 2) and len(spare.open) == (1 if at_once else 2)
    assert found[0] == found[1] and found[0][0] == found[0][1] == examples


def test_how_far_apart_they_are_is_a_mean_over_tokens():
    rollout = said((0.0, -1.0))
    examples = [Example(rollout, 0, 1, teacher=(-1.0, -4.0)), Example(said((-2.0,)), 0, 1, teacher=(-2.0,))]
    assert apart(examples) == {"apart": 4 / 3, "apart/one": 4 / 3}


def said(logprobs: tuple[float, ...]) -> Rollout:
    return Rollout("one", 0, 0, 0, (1, 2, 3), tuple(range(1, 1 + len(logprobs))), logprobs, 0, "stop", {})


@pytest.mark.parametrize("match", ["tokens", "laws"])
def test_a_student_comes_to_speak_like_its_teacher(folders, tmp_path, match):
    """The two teachers of one student that cannot tell their prompts apart would pull it to and fro: one alone."""
    settings = {"train": {"steps": 10}, "match": match}
    assert main(recipe(folders["student"], tmp_path / "run", {"one": folders["one"]}, **settings)) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = [one["apart"] for one in metrics]
    assert seen[0] > 0.1 and sum(seen[-3:]) / 3 < 0.3 * seen[0]
    assert seen == [one["apart/one"] for one in metrics] and metrics[-1]["gap"] < 1.0001


def test_interrupted_and_resumed_is_uninterrupted(folders, tmp_path, monkeypatch):
    teachers = {"one": folders["one"], "two": folders["two"]}
    straight, again = (recipe(folders["student"], tmp_path / name, teachers) for name in ("straight", "again"))
    assert main(straight) == 0
    steps, plain = [], loop.train_step

    def stopping(run: Any, *rest: Any) -> Any:
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(run.step)
        return plain(run, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            main(again)
    assert main(again) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = [(tmp_path / name / "rollouts.jsonl").read_text() for name in ("straight", "again")]
    assert lines[0] == lines[1]


def test_a_teacher_that_has_changed_is_refused_when_a_run_goes_on(folders, tmp_path):
    teachers = {name: shutil.copytree(folders[name], tmp_path / name) for name in ("one", "two")}
    settings = recipe(folders["student"], tmp_path / "run", teachers)
    run = opened_run(settings)
    position = json.loads(json.dumps(run.loader.state_dict()))
    opened_run(settings).loader.load_state_dict(position)
    model = hub.load(teachers["two"], dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[5, 5] += 1e-3
    hub.save(model, teachers["two"])
    with pytest.raises(Refusal, match=r"^the teacher of two has changed since this run was saved; allowed: "):
        opened_run(settings).loader.load_state_dict(position)


def test_whole_laws_need_one_vocabulary(folders, tmp_path):
    wide = toys.folder(tmp_path / "wide")
    model = hub.load(wide, dtype=torch.float32)
    hub.save(build(model.config.model_copy(update={"vocab_size": 352})), wide)
    with pytest.raises(Refusal, match="over 352 tokens"):
        main(recipe(folders["student"], tmp_path / "run", {"one": wide}, match="laws"))
    assert not (tmp_path / "run").exists()


def test_teachers_of_another_kind_are_refused_before_training(folders, tmp_path):
    other = toys.folder(tmp_path / "other")
    Tokenizer.train(["another text, other words\n" * 3], 300).save(other)
    framed = toys.folder(tmp_path / "framed")
    words = Tokenizer.load(framed)
    (framed / "chat_template.jinja").write_text(str(words.template) + "{# another #}")
    for teacher, found in ((other, "another tokenizer"), (framed, "chat template"), (tmp_path / "none", "no folder")):
        with pytest.raises(Refusal, match=found):
            main(recipe(folders["student"], tmp_path / "run", {"one": teacher}))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teachers": {"one": {"path": "x"}, "three": {"path": "x"}}}, "no environment"),
        ({"environments": {"three": ENVIRONMENTS["one"]}}, "no teacher for three"),
        ({"shuffle_teachers": True}, "one teacher"),
        ({"shaping": {"effort": 0.1}}, "shaping"),
        ({"policy": {"shuffle_rewards": True}}, "shuffle_rewards"),
        ({"match": "laws", "train": {"batch_size": 6}}, "2 updates"),
        ({"match": "laws", "policy": {"kl": 0.1}}, r"policy\.kl = 0\.1"),
        ({"match": "laws", "policy": {"malformed": 5.0}}, r"policy\.malformed = 5\.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(folders, tmp_path, changes, words):
    with pytest.raises((Refusal, ValueError), match=words):
        recipe(folders["student"], tmp_path, {"one": folders["one"]}, **changes)


def test_a_recipe_survives_being_written(folders, tmp_path):
    one = recipe(folders["student"], tmp_path / "run", {"one": folders["one"]}, teachers_at_once=1)
    config.write(one, tmp_path / "recipe.toml")
    assert config.load(MopdRecipe, tmp_path / "recipe.toml") == one
