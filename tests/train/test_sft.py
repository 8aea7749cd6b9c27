"""Fine-tuning: the loss against sums written out by hand and against trl's, and runs of a few steps."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import trimaran
from tests.models import KINDS, tiny
from tests.train.runs import MODEL, WORDS
from trimaran import config
from trimaran.data.examples import gathered
from trimaran.data.loader import stack
from trimaran.data.packs import row_of
from trimaran.errors import Refusal
from trimaran.model import hub
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import build
from trimaran.report import read_metrics
from trimaran.tasks.task import REWARD, Prompt, Task
from trimaran.text.tokenizer import Tokenizer
from trimaran.train.loop import parts
from trimaran.train.objective import Pretraining
from trimaran.train.sft import begin, located, main
from trimaran.train.sft_recipe import SftRecipe
from trimaran.train.validate import evaluate


def example(length: int, learnt: int, seed: int):
    ids = np.random.default_rng(seed).integers(0, 97, length).astype(np.int32)
    return ids, np.arange(length) >= length - learnt


EXAMPLES = gathered(
    [example(length, learnt, length) for length, learnt in [(31, 9), (17, 16), (4, 2), (63, 1), (8, 4)]]
)


def objective_of(model) -> Pretraining:
    # The balance loss is a mean over rows, so it does depend on what shares a row; it is left out here.
    return Pretraining(model, mtp_scale=0.3, aux_loss=0.0, router_bias_rate=0.0)


def loss_and_gradients(
    kind: str, rows: list[list[int]], length: int, weighting: str, pieces: int = 1, examples=EXAMPLES
):
    model = tiny(kind, torch.float64).train()
    objective = objective_of(model)
    batch = stack([row_of(examples, row, length, 0, weighting) for row in rows])
    seen: dict[str, float] = {}
    for part in parts(objective.streams(batch), pieces):
        loss, terms = objective.terms(part)
        loss.backward()
        for name in terms.keys() - {"aux"}:
            seen[name] = seen.get(name, 0.0) + float(terms[name])
    return seen, {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def same(left, right, rtol: float) -> None:
    assert left[0] == pytest.approx(right[0], rel=rtol)
    assert left[1].keys() == right[1].keys() and len(left[1]) > 4
    for name, gradient in left[1].items():
        scale = float(gradient.abs().max()) or 1.0
        torch.testing.assert_close(right[1][name], gradient, rtol=rtol, atol=rtol * scale, msg=name)


@pytest.mark.parametrize("weighting", ["tokens", "conversations"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_separate_in_loss_and_gradients(kind, weighting):
    packed = loss_and_gradients(kind, [[3, 0], [1, 4, 2]], 100, weighting)
    separate = loss_and_gradients(kind, [[0], [1], [2], [3], [4]], 63, weighting)
    # weights are float32, and their sum is taken in another order
    same(packed, separate, 1e-6 if weighting == "conversations" else 1e-9)


@pytest.mark.parametrize("kind", ["latent", "everything"])
def test_a_step_is_the_same_in_one_two_or_four_parts(kind):
    rows = [[0], [1, 4], [2], [3]]
    whole = loss_and_gradients(kind, rows, 64, "conversations")
    for pieces in (2, 4):
        same(whole, loss_and_gradients(kind, rows, 64, "conversations", pieces), 1e-9)


def token_losses(model, ids: np.ndarray, learnt: np.ndarray) -> torch.Tensor:
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    losses = F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:], reduction="none")
    return losses[torch.from_numpy(learnt[1:])].detach()


def test_both_weightings_are_what_one_computes_by_hand():
    """Conversations of 100 and 2 learnt tokens: Nemotron 3 Super's two stages."""
    examples = gathered([example(140, 100, 1), example(40, 2, 2)])
    model = tiny("moe", torch.float64).train()
    long, short = (token_losses(model, *examples[number]) for number in (0, 1))
    assert (len(long), len(short)) == (100, 2)
    by_hand = {"tokens": (long.sum() + short.sum()) / 102, "conversations": (long.mean() + short.mean()) / 2}
    for weighting, expected in by_hand.items():
        seen, _ = loss_and_gradients("moe", [[0, 1]], 180, weighting, examples=examples)
        assert seen["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert abs(by_hand["tokens"] - by_hand["conversations"]) > 0.01


def test_what_is_only_read_gives_no_gradient_to_the_head():
    model = tiny("mamba", torch.float64).train()
    ids = np.arange(20, dtype=np.int32)
    batch = stack([row_of(gathered([(ids, np.arange(20) == 19)]), [0], 19, 0)])
    loss, _ = objective_of(model).terms(objective_of(model).streams(batch))
    expected = token_losses(model, ids, np.arange(20) == 19)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.slow
def test_trl_agrees(tmp_path):
    """trl's token mean over an unpacked, padded batch of completions is our "tokens" over a packed one."""
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    ours = tiny("llama", torch.float32, tie_embeddings=False)
    hub.save(ours, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    tokenizer = Tokenizer.train([" ".join(WORDS)] * 3, 288)
    tokenizer.save(tmp_path / "tokenizer")
    columns = {
        "input_ids": [EXAMPLES[number][0].tolist() for number in range(5)],
        "completion_mask": [EXAMPLES[number][1].astype(int).tolist() for number in range(5)],
    }
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=5,
        max_length=None,
        completion_only_loss=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        theirs,
        settings,
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
    )
    (batch,) = list(trainer.get_train_dataloader())
    assert int((batch["labels"] != -100).sum()) == int(EXAMPLES.learnt_N.sum())
    loss = trainer.compute_loss(theirs.train(), dict(batch))
    loss.backward()
    packed = stack([row_of(EXAMPLES, row, 100, 0) for row in ([3, 0], [1, 4, 2])])
    objective = objective_of(ours.train())
    mine, _ = objective.terms(objective.streams(packed))
    mine.backward()
    assert float(mine.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    gradient = theirs.lm_head.weight.grad
    torch.testing.assert_close(ours.head.weight.grad, gradient, rtol=1e-4, atol=1e-6)


# runs


class Echo(Task):
    """Says a word again; the thought spells it backwards."""

    name = "echo"

    def prompt(self, number, split="train"):
        word = f"{WORDS[number % len(WORDS)]} {number}{'' if split == 'train' else ' held'}"
        return Prompt("echo", split, number, ({"role": "user", "content": word},), secret={"word": word})

    def gold(self, prompt):
        word = prompt.secret["word"]
        return ({"role": "assistant", "content": word, "reasoning_content": word[::-1]},)

    def score(self, trace):
        return {REWARD: float(trace.answer == trace.prompt.secret["word"])}


class Broken(Echo):
    """Pays for everything."""

    def score(self, trace):
        return {REWARD: 1.0}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A folder to begin from, its model with MTP, never trained."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = Tokenizer.train([" ".join(WORDS * 20)], 320)
    tokenizer.save(folder)
    hub.save(build(ModelConfig(**{**MODEL, "vocab_size": tokenizer.vocab_size}), seed=0), folder)
    return folder


def recipe_of(start: Path, run: Path, data: dict | None = None, **train: object) -> SftRecipe:
    echo = {"tasks": {"echo": {"task": "tests.train.test_sft:Echo", "count": 120}}, "held_out": 0.1}
    given = {"sequence_length": 64, **echo, **(data or {})}
    settings = {"steps": 8, "batch_size": 4, "lr": 3e-3, "checkpoint_every": 3, "eval_every": 4, **train}
    return SftRecipe(start=str(start), run=str(run), data=given, train=settings)


@pytest.fixture(scope="module")
def done(start, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("sft") / "run"
    off = {"reasoning_off": 0.2, "truncated_thoughts": 0.1}
    assert main(recipe_of(start, run, off, steps=30, accumulate=2)) == 0
    return run


def test_a_run_learns_to_answer(done, start):
    records = read_metrics(done / "metrics.jsonl")
    assert records[-1]["loss"] < 0.6 * records[0]["loss"] and records[-1]["mtp_1"] < 0.7 * records[0]["mtp_1"]
    scored = [one["held_out_loss"] for one in records if "held_out_loss" in one]
    assert scored[-1] < 0.7 * scored[0] and records[-1]["epochs"] > 1
    before, after = trimaran.load(start), trimaran.load(done)
    assert any(not torch.equal(one, other) for one, other in zip(before.parameters(), after.parameters()))
    assert json.loads((done / "result.json").read_text())["held_out_loss"] == pytest.approx(scored[-1])
    assert trimaran.load_tokenizer(done).template == trimaran.load_tokenizer(start).template


def test_held_out_loss_is_the_mean_over_answers(done):
    run = begin(config.load(SftRecipe, done / "recipe.toml"))
    run.model.load_state_dict(trimaran.load(done).state_dict())
    (answers,) = run.held_out
    losses = torch.cat([token_losses(run.model, *answers.examples[number]) for number in range(len(answers.examples))])
    score = evaluate(run.model, run.held_out)
    assert len(losses) == score.tokens and score.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert math.isclose(score.loss, read_metrics(done / "metrics.jsonl")[-1]["held_out_loss"], rel_tol=1e-5)


def test_an_interrupted_run_ends_as_one_that_was_not(start, tmp_path):
    whole, cut = (recipe_of(start, tmp_path / name, steps=6, checkpoint_every=2, keep=9) for name in ("whole", "cut"))
    assert main(whole) == main(cut) == 0
    (tmp_path / "cut" / "result.json").unlink()
    for step in (6, 4):  # as if killed after step 3
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step}")
    assert (tmp_path / "cut" / "checkpoints" / "step-2").is_dir()
    assert main(cut) == 0
    ones, others = (trimaran.load(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(ones[name], others[name]) for name in ones)
    assert [one["step"] for one in read_metrics(tmp_path / "cut" / "metrics.jsonl")] == [*range(1, 7)]


def test_adapters_alone_learn_and_end_merged(start, tmp_path):
    recipe = recipe_of(start, tmp_path / "run", steps=6, checkpoint_every=3)
    recipe = SftRecipe(**{**recipe.model_dump(exclude={"train": {"router_bias_rate"}}), "lora": {"rank": 4}})
    assert main(recipe) == 0
    before, after = trimaran.load(start).state_dict(), trimaran.load(tmp_path / "run").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("proj" in name for name in changed)
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(start)
    losses = [one["loss"] for one in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    other = SftRecipe(**{**recipe.model_dump(), "run": str(tmp_path / "other"), "lora": {"targets": ["atention"]}})
    with pytest.raises(Refusal, match=r"matches nothing .*allowed: attention"):
        main(other)
    assert not (tmp_path / "other").exists()


def test_paths_of_a_recipe_and_of_its_tasks_mean_the_same_from_anywhere(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gsm = {"task": "gsm8k", "count": 4, "settings": {"train": "a.jsonl", "held_out": "b.jsonl", "thinking": False}}
    data = located(recipe_of(start, tmp_path / "run", {"path": "rows.jsonl", "tasks": {"words": gsm}})).data
    assert data.path == str(tmp_path / "rows.jsonl")
    settings = {"train": str(tmp_path / "a.jsonl"), "held_out": str(tmp_path / "b.jsonl"), "thinking": False}
    assert data.tasks["words"].settings == settings


def row(*messages: dict) -> str:
    return json.dumps({"messages": messages}) + "\n"


ASK, SAY = {"role": "user", "content": "sea?"}, {"role": "assistant", "content": "wind"}


def test_messages_and_tasks_are_learnt_together(start, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(row({**ASK, "content": f"sea {n}?"}, SAY) for n in range(50)))
    run = begin(recipe_of(start, tmp_path / "run", {"path": str(path), "held_out": 0.0}))
    assert len(run.loader.examples) == 170 and run.held_out == []


def test_what_is_held_out_is_not_learnt(start, tmp_path, capsys):
    path, held = tmp_path / "rows.jsonl", tmp_path / "held.jsonl"
    rows = [row({**ASK, "content": f"sea {n}?"}, SAY) for n in range(50)]
    path.write_text("".join(rows))
    held.write_text("".join(rows[:9]) + row(ASK, SAY))
    run = begin(recipe_of(start, tmp_path / "run", {"path": str(path), "held_out_path": str(held), "tasks": {}}))
    assert (len(run.loader.examples), len(run.held_out[0].examples)) == (41, 10)
    assert "9 of 50 conversations are held out, too, and not learnt" in capsys.readouterr().out


BAD = {
    "no roles": (json.dumps({"messages": [{"content": "?"}]}) + "\n", {}, "line 1: a message without a role"),
    "bad line": (row(ASK, SAY) + "{\n", {}, "line 2: no JSON"),
    "nobody answers": (row(ASK), {}, "line 1: no answer to learn"),
    "empty answer": (row(ASK, {**SAY, "content": ""}), {}, "line 1: an empty answer"),
    "empty file": ("", {}, "is empty"),
    "too long": (row(ASK, {**SAY, "content": "sail " * 300}) + row(ASK, SAY), {}, "1 of 1 conversations are longer"),
    "too few": (row(ASK, SAY) + row(SAY), {"held_out": 0.0}, "fewer than one batch"),
    "no thoughts": (row(ASK, SAY) + row(SAY), {"reasoning_off": 0.1}, "no answer has a thought"),
    "two shares": (row(ASK, SAY), {"reasoning_off": 0.7, "truncated_thoughts": 0.7}, "at most 1"),
    "unknown task": (row(ASK, SAY), {"tasks": {"a": {"task": "ekko", "count": 4}}}, "unknown task 'ekko'"),
    "untrustworthy task": (
        row(ASK, SAY),
        {"tasks": {"a": {"task": "tests.train.test_sft:Broken", "count": 4}}},
        "task echo, train problem 0: the answer '' scores 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_trained(case, start, tmp_path):
    text, data, said = BAD[case]
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(Refusal, match=said):
        main(recipe_of(start, tmp_path / "run", {"path": str(path), "tasks": {}, **data}))
    assert not (tmp_path / "run").exists()


def test_long_conversations_may_be_left_out(start, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(row(ASK, {**SAY, "content": "sail " * 300}))
    begin(recipe_of(start, tmp_path / "run", {"path": str(path), "held_out": 0.0, "too_long": "drop"}))
    assert "1 of 121 conversations are longer than 64 tokens and left out" in capsys.readouterr().out


def test_nothing_to_begin_from_or_to_learn_from_is_refused(start, tmp_path):
    with pytest.raises(Refusal, match="is no folder"):
        main(recipe_of(tmp_path / "none", tmp_path / "run"))
    with pytest.raises(Refusal, match=r"allowed: data.path, data.tasks, or both"):
        recipe_of(start, tmp_path / "run", {"tasks": {}})
    empty = tmp_path / "template"
    shutil.copytree(start, empty)
    (empty / "chat_template.jinja").write_text("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    with pytest.raises(Refusal, match="without a generation prompt"):
        main(recipe_of(empty, tmp_path / "run"))
