"""DPO: pairs read and refused, the loss against formulas and trl's, runs that resume, and a habit that is unlearnt."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import trimaran
from tests.models import KINDS, tiny
from tests.train.runs import MODEL, WORDS
from trimaran import config
from trimaran.data.examples import gathered
from trimaran.errors import Refusal
from trimaran.model import adapter, hub, lora
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import build
from trimaran.report import read_metrics
from trimaran.rl.preference import Preference, answer_logprobs, preference_loss, reference_logprobs
from trimaran.rl.preference_main import main
from trimaran.rl.preference_pairs import Pairs, PairSource, chats_of, read_pairs
from trimaran.rl.preference_recipe import PairsSettings, PreferenceRecipe, PreferenceSettings
from trimaran.text.tokenizer import Tokenizer
from trimaran.train.loop import parts

LENGTHS = [(9, 4, 7), (5, 1, 12), (20, 8, 2), (3, 6, 6)]  # of prompt, chosen, rejected


def text(prompt: int, answer: int, seed: int):
    draw = np.random.default_rng(seed)
    ids = np.concatenate([np.random.default_rng(prompt).integers(0, 97, prompt), draw.integers(0, 97, answer)])
    return ids.astype(np.int32), np.arange(len(ids)) >= prompt


PAIRS = Pairs(
    gathered([text(p, w, 10 + p) for p, w, _ in LENGTHS]), gathered([text(p, loser, 50 + p) for p, _, loser in LENGTHS])
)
SETTINGS = PreferenceSettings(beta=0.3, sft_weight=0.2)


def logprob_by_hand(model, ids, learnt) -> torch.Tensor:
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    law = model(tokens[:, :-1])[0].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    return law[torch.from_numpy(learnt[1:])].sum()


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_of_packed_answers_are_those_of_separate_texts(kind):
    model = tiny(kind)
    found = answer_logprobs(model, PAIRS.laid_out([2, 0, 3, 1], torch.zeros(4, 2), 0)).detach()
    for row, number in enumerate([2, 0, 3, 1]):
        for side, texts in enumerate((PAIRS.chosen, PAIRS.rejected)):
            by_hand = logprob_by_hand(model, *texts[number]).detach()
            torch.testing.assert_close(found[row, side], by_hand, rtol=1e-9, atol=1e-9)
    reference = reference_logprobs(model, PAIRS, 3, 0)
    torch.testing.assert_close(reference[[2, 0, 3, 1]], found, rtol=1e-9, atol=1e-9)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_gradient_at_the_reference_is_half_beta_times_the_difference():
    model = tiny("latent")
    settings = SETTINGS.replace(sft_weight=0.0)
    rows = PAIRS.laid_out(range(4), reference_logprobs(model, PAIRS, 4, 0), 0)
    loss, reported = preference_loss(answer_logprobs(model, rows), rows, settings)
    assert float(reported["dpo"]) == pytest.approx(np.log(2), rel=1e-9)
    assert abs(float(reported["margin"])) < 1e-12 and 0 <= float(reported["accuracy"]) <= 1
    found = gradients(model, loss)
    gaps = [
        logprob_by_hand(model, *PAIRS.rejected[number]) - logprob_by_hand(model, *PAIRS.chosen[number])
        for number in range(4)
    ]
    expected = gradients(model, SETTINGS.beta / 2 * torch.stack(gaps).mean())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_the_loss_is_what_one_computes_by_hand():
    model, reference = tiny("mamba"), reference_logprobs(tiny("mamba", seed=4), PAIRS, 4, 0)
    logp = torch.stack(
        [
            torch.stack([logprob_by_hand(model, *texts[number]) for texts in (PAIRS.chosen, PAIRS.rejected)])
            for number in range(4)
        ]
    ).detach()
    gain = logp - reference
    margin = 0.3 * (gain[:, 0] - gain[:, 1])
    dpo = float(torch.log1p(torch.exp(-margin)).mean())
    for average, per in (("tokens", 4 + 1 + 8 + 6), ("pairs", 4)):
        rows = PAIRS.laid_out(range(4), reference, 0)
        settings = SETTINGS.replace(sft_average=average, weight=0.7)
        loss, reported = preference_loss(answer_logprobs(model, rows), rows, settings)
        sft = -float(logp[:, 0].sum()) / per
        assert float(loss.detach()) == pytest.approx(0.7 * dpo + 0.2 * sft, rel=1e-9)
        assert float(reported["accuracy"]) == float((margin > 0).double().mean())
        assert float(reported["reward_chosen"]) == pytest.approx(0.3 * float(gain[:, 0].mean()), rel=1e-9)


@pytest.mark.parametrize("pieces", [2, 4])
def test_a_step_is_the_same_in_parts(pieces):
    model = tiny("latent").train()
    objective = Preference(model, SETTINGS)
    reference = reference_logprobs(tiny("latent", seed=4), PAIRS, 4, 0)
    found = []
    for count in (1, pieces):
        model.zero_grad(set_to_none=True)
        seen: dict[str, float] = {}
        for part in parts(objective.streams(PAIRS.laid_out(range(4), reference, 0)), count):
            loss, terms = objective.terms(part)
            loss.backward()
            seen = {name: seen.get(name, 0.0) + float(value) for name, value in terms.items()}
        found.append((seen, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-9)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_draft_block_and_routers_stay_and_the_bias_follows_the_load():
    model = tiny("latent").train()
    objective = Preference(model, SETTINGS, router_bias_rate=1e-3)
    gate = model.backbone.layers[1].mixer.gate
    bias = gate.e_score_correction_bias.clone()
    loss, _ = objective.terms(PAIRS.laid_out(range(4), torch.zeros(4, 2), 0))
    loss.backward()
    assert gate.weight.grad is None and all(p.grad is None for p in model.mtp.parameters())
    assert model.backbone.layers[1].mixer.experts.up_proj.weight.grad is not None
    objective.after_step()
    assert not torch.equal(gate.e_score_correction_bias, bias)


@pytest.mark.slow
def test_trl_agrees(tmp_path):
    """trl's ["sigmoid", "sft"] with weights 1 and .2, another model as reference, on padded rows of one text each."""
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    ours, other = (tiny("llama", torch.float32, seed=seed, tie_embeddings=False) for seed in (0, 4))
    models = []
    for name, model in (("model", ours), ("reference", other)):
        hub.save(model, tmp_path / name)
        opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager")
        models.append(opened)
    Tokenizer.train([" ".join(WORDS)] * 3, 288).save(tmp_path / "tokenizer")
    trainer = trl.DPOTrainer(
        models[0],
        models[1],
        trl.DPOConfig(
            output_dir=str(tmp_path / "out"),
            beta=SETTINGS.beta,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, SETTINGS.sft_weight],
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "sea", "chosen": "sail", "rejected": "rope"}]),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
    )
    texts = [examples[number] for examples in (PAIRS.chosen, PAIRS.rejected) for number in range(4)]
    width = max(len(ids) for ids, _ in texts)
    inputs = {
        name: torch.stack(
            [torch.nn.functional.pad(torch.from_numpy(row).long(), (0, width - len(row))) for row in rows]
        )
        for name, rows in {
            "input_ids": [ids for ids, _ in texts],
            "completion_mask": [learnt for _, learnt in texts],
            "attention_mask": [np.ones(len(ids), np.int64) for ids, _ in texts],
        }.items()
    }
    theirs = trainer.compute_loss(models[0].train(), inputs)
    theirs.backward()
    rows = PAIRS.laid_out(range(4), reference_logprobs(other, PAIRS, 4, 0), 0)
    loss, _ = preference_loss(answer_logprobs(ours.train(), rows), rows, SETTINGS)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    torch.testing.assert_close(ours.head.weight.grad, models[0].lm_head.weight.grad, rtol=1e-3, atol=1e-5)


# pairs


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A folder to begin from, its model with MTP, never trained."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = Tokenizer.train([" ".join(WORDS * 20)], 320)
    tokenizer.save(folder)
    hub.save(build(ModelConfig(**{**MODEL, "vocab_size": tokenizer.vocab_size}), seed=0), folder)
    return folder


def row(number: int) -> dict:
    word = WORDS[number % len(WORDS)]
    return {"prompt": f"{word} {number // 2}", "chosen": f"{word} sail", "rejected": f"{word} rope{'!' * (number % 2)}"}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def recipe_of(start: Path, run: Path, rows: list | None = None, lora: dict | None = None, **train) -> PreferenceRecipe:
    tables = {
        "start": str(start),
        "run": str(run),
        "data": {"path": str(write(run.with_suffix(".jsonl"), rows or [row(n) for n in range(24)])), "held_out": 0.2},
        "train": {"steps": 6, "batch_size": 8, "lr": 1e-2, "checkpoint_every": 2, **train},
    }
    return PreferenceRecipe(**tables, **({"lora": lora} if lora else {}))


def said(messages) -> list[str]:
    return [f"{one['role']}: {one.get('content')}" for one in messages]


def test_the_forms_of_a_row_are_read_alike():
    plain = {"prompt": "hull", "chosen": "mast", "rejected": "tide"}
    question, good, bad = (
        {"role": role, "content": content}
        for role, content in (("user", "hull"), ("assistant", "mast"), ("assistant", "tide"))
    )
    forms = [
        plain,
        {"prompt": [question], "chosen": good, "rejected": [bad]},
        {"chosen": [question, good], "rejected": [question, bad]},
    ]
    for form in forms:
        chosen, rejected = chats_of(form, "here")
        assert said(chosen.messages) == ["user: hull", "assistant: mast"]
        assert said(rejected.messages) == ["user: hull", "assistant: tide"]
        assert chosen.learns == rejected.learns == (False, True)


def test_answers_in_the_prompt_are_not_learnt_and_later_turns_are():
    early = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    later = [
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f"},
    ]
    chosen, _ = chats_of({"prompt": early, "chosen": later, "rejected": "g"}, "here")
    assert chosen.learns == (False, False, False, True, False, True)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def call(name: str) -> dict:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": {}}}]}


def test_a_rejected_answer_may_call_what_is_not_offered_and_the_prompt_does_not_offer_it(start):
    pair = {"prompt": "2 + 2", "chosen": call("add"), "rejected": call("python"), "tools": [TOOL]}
    chosen, rejected = chats_of(pair, "here")
    assert chosen.tools == rejected.tools and len(chosen.tools) == 1
    with pytest.raises(Refusal, match="unknown tool 'python'"):
        chats_of({**pair, "chosen": call("python")}, "here")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompt": "a", "chosen": "b"}, "a row with 'prompt', 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score": 1}, "'score'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "empty answer"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"prompt": "a", "chosen": [{"content": "b"}], "rejected": "c"}, "without a role"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "chosen is a int"),
        (
            {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]},
            "empty prompt",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_by_its_line(wrong, said, start, tmp_path):
    recipe = recipe_of(start, tmp_path / "run", [row(0), wrong])
    with pytest.raises(Refusal, match=said) as refused:
        main(recipe)
    assert "line 2" in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.sequence_length": 20}, "longer than 20"),
        ({"train.batch_size": 64}, "fewer than one batch"),
        ({"start": "nowhere"}, "no folder"),
        ({"preference.weight": 0.0, "preference.sft_weight": 0.0}, "weight = 0"),
        ({"lora.dropout": 0.1}, "lora.dropout"),
        ({"lora.targets": ["mambo"]}, "matches nothing"),
        ({"lora.rank": 2, "preference.train_router": True}, "train_router"),
        ({"lora.rank": 2, "train.router_bias_rate": 0.001}, "router_bias_rate"),
        ({"train.mtp_scale": 0.3}, "mtp_scale"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(changes, said, start, tmp_path):
    tables = config.plain(recipe_of(start, tmp_path / "run"))
    tables["train"].pop("router_bias_rate")
    tables = config.override(tables, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    with pytest.raises(Refusal, match=said):
        main(PreferenceRecipe(**tables))
    assert not (tmp_path / "run").exists()


def test_pairs_of_a_prompt_are_held_out_together(start, tmp_path):
    path = write(tmp_path / "pairs.jsonl", [row(n) for n in range(24)])
    tokenizer = Tokenizer.load(start)
    training, held_out = read_pairs(PairsSettings(path=str(path), held_out=0.25), tokenizer)
    assert len(training) + len(held_out) == 24 and 3 <= len(held_out) <= 9

    def prompts(pairs):
        texts = (pairs.chosen[number] for number in range(len(pairs)))
        return {ids[: int(learnt.argmax())].tobytes() for ids, learnt in texts}

    assert not prompts(training) & prompts(held_out)


def test_the_order_is_each_pair_once_an_epoch_and_the_position_is_kept():
    source = PairSource(PAIRS, torch.arange(8.0).view(4, 2), batch_size=3, pad_id=0, seed=1)
    seen = [float(value) for _ in range(4) for value in next(source).reference_B2[:, 0]]
    assert sorted(seen[:4]) == sorted(seen[4:8]) == sorted(seen[8:]) == [0, 2, 4, 6] and seen[:4] != seen[4:8]
    other = PairSource(PAIRS, torch.arange(8.0).view(4, 2), batch_size=3, pad_id=0, seed=1)
    next(other)
    state = json.loads(json.dumps(other.state_dict()))
    again = PairSource(PAIRS, torch.arange(8.0).view(4, 2), batch_size=3, pad_id=0, seed=1)
    again.load_state_dict(state)
    assert torch.equal(next(again).tokens_BT, next(other).tokens_BT)
    with pytest.raises(Refusal, match="seed"):
        PairSource(PAIRS, torch.zeros(4, 2), batch_size=3, pad_id=0, seed=2).load_state_dict(state)


# runs


@pytest.mark.parametrize("lora_table", [None, {"rank": 4, "alpha": 8.0}])
def test_a_run_prefers_what_it_was_taught_and_an_interrupted_one_ends_alike(lora_table, start, tmp_path):
    whole, cut = (recipe_of(start, tmp_path / name, lora=lora_table, keep=9) for name in ("whole", "cut"))
    assert main(whole) == main(cut) == 0
    (tmp_path / "cut" / "result.json").unlink()
    for step in (6, 4):  # as if killed after step 3
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step}")
    shutil.rmtree(tmp_path / "cut" / "adapter", ignore_errors=True)
    assert main(cut) == 0
    ones, others = (trimaran.load(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(ones[name], others[name]) for name in ones)
    steps = read_metrics(tmp_path / "cut" / "metrics.jsonl")
    assert [one["step"] for one in steps] == [*range(1, 7)]
    assert steps[-1]["margin"] > steps[0]["margin"] and steps[0]["dpo"] == pytest.approx(np.log(2), rel=1e-4)
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["held_out_pairs"]["accuracy"] > 0.7 and result["steps"] == 6
    assert main(cut) == 0  # finished: nothing to do


def test_a_run_with_adapters_ends_merged_with_them_beside(start, tmp_path):
    recipe = recipe_of(start, tmp_path / "run", lora={"rank": 4, "targets": ["attention", "experts"]})
    assert recipe.train.router_bias_rate == 0
    assert main(recipe) == 0
    merged, base = trimaran.load(tmp_path / "run"), trimaran.load(start)
    adapter.load(base, tmp_path / "run" / "adapter")
    assert {name.rpartition(".")[2] for name in lora.adapters(base)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    }
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(base.eval()(tokens), merged(tokens), rtol=1e-4, atol=1e-4)
    assert (trimaran.load(start)(tokens) - merged(tokens)).abs().max() > 1e-3
    checkpoint = tmp_path / "run" / "checkpoints" / "step-6"
    assert (checkpoint / adapter.WEIGHTS).is_file() and not (checkpoint / "model.safetensors").exists()
    assert config.load(PreferenceRecipe, tmp_path / "run" / "recipe.toml").train.router_bias_rate == 0


def test_bf16_muon_and_adapters_go_together(start, tmp_path):
    table = {"rank": 4, "targets": ["all", "head"]}
    changes = {"precision": "bf16", "optimizer": "muon", "accumulate": 2, "steps": 3}
    recipe = recipe_of(start, tmp_path / "run", lora=table, **changes)
    assert main(recipe) == 0
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert steps[0]["dpo"] == pytest.approx(np.log(2), abs=2e-3) and steps[-1]["margin"] > 0.01


def test_other_pairs_or_another_start_are_not_resumed(start, tmp_path):
    recipe = recipe_of(start, tmp_path / "run")
    assert main(recipe) == 0
    (tmp_path / "run" / "result.json").unlink()
    write(tmp_path / "run.jsonl", [row(n) for n in range(26)])
    with pytest.raises(Refusal, match="other pairs or of another model"):
        main(recipe)
