"""A habit is unlearnt: a model that often calls a tool nobody offers stops, and answers no worse (Nano, appendix C)."""

import json
from pathlib import Path

import pytest

from tests.rl.test_preference import start, write  # noqa: F401 (a fixture)
from tests.train.runs import WORDS
from trimaran import load, load_tokenizer
from trimaran.engine.engine import Engine
from trimaran.engine.request import EngineSettings, Request
from trimaran.engine.sampler import Sampling
from trimaran.rl.preference_main import main
from trimaran.rl.preference_recipe import PreferenceRecipe
from trimaran.text.chat import encode_chat

PHANTOM = "python sail"


def question(number: int) -> tuple[str, str]:
    """What follows a word in the list of them."""
    return f"{WORDS[number % 10]} {number}", WORDS[(number + 1) % 10]


def run(begin: Path, place: Path, pairs: list[dict], steps: int, lr: float, **preference: float) -> Path:
    tables = {
        "start": str(begin),
        "run": str(place),
        "data": {"path": str(write(place.with_suffix(".jsonl"), pairs)), "held_out": 0.1},
        "preference": preference,
        "train": {"steps": steps, "batch_size": 32, "lr": lr, "checkpoint_every": 0},
    }
    assert main(PreferenceRecipe(**tables)) == 0
    return place


def answers(folder: Path, numbers: range, samples: int, temperature: float, seed: int) -> dict[int, list[str]]:
    """What the model answers to each question."""
    model, tokenizer = load(folder), load_tokenizer(folder)
    engine = Engine(model.eval(), tokenizer, EngineSettings())
    sampling = Sampling(max_tokens=12, temperature=temperature, seed=seed, samples=samples, stop_ids=tokenizer.stop_ids)
    asked = {}
    for number in numbers:
        messages = [{"role": "user", "content": question(number)[0]}]
        ids = encode_chat(tokenizer, messages, generation_prompt=True, thinking=False).ids
        asked[number] = Request(tuple(ids), sampling)
    outputs = engine.generate(list(asked.values()))
    found: dict[int, list[str]] = {number: [] for number in numbers}
    for output in outputs:
        found[numbers[output.prompt]].append(output.text.strip())
    return found


def shares(found: dict[int, list[str]]) -> tuple[float, float]:
    """(right, calling what is not there) among all answers."""
    said = [(text, number) for number, texts in found.items() for text in texts]
    right = sum(text == question(number)[1] for text, number in said) / len(said)
    return right, sum(text.startswith("python") for text, _ in said) / len(said)


@pytest.mark.slow
def test_calls_of_a_tool_that_is_not_there_disappear(start, tmp_path):  # noqa: F811
    def row(number: int, chosen: str, rejected: str) -> dict:
        return {"prompt": question(number)[0], "chosen": chosen, "rejected": rejected, "thinking": False}

    taught = [row(number, said, "-") for number in range(10, 210) for said in (question(number)[1], PHANTOM)]
    habit = run(start, tmp_path / "habit", taught, 120, 1e-2, weight=0.0, sft_weight=1.0)
    held_out = range(1000, 1200)
    before = shares(answers(habit, held_out, 1, 1.0, seed=1))
    pairs = []
    for number, texts in answers(habit, range(10, 210), 8, 1.0, seed=0).items():
        right, wrong = question(number)[1], [text for text in texts if text.startswith("python")]
        if right in texts and wrong:
            pairs.append(row(number, right, wrong[0]))
    after = shares(answers(run(habit, tmp_path / "dpo", pairs, 50, 1e-3), held_out, 1, 1.0, seed=1))
    print(json.dumps({"pairs": len(pairs), "before": before, "after": after}))
    assert before[1] > 0.25 and len(pairs) > 100
    assert after[1] < 0.02
    assert after[0] > before[0]
