"""The benchmark of evaluations keeps its rules: no speed for problems that are wrong, nor for other answers."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from tests.evals.boats import Talk, Word
from tests.models import tiny
from trimaran.evals.run import ScoreSettings
from trimaran.tasks.names import task
from trimaran.tasks.ruler import PUBLISHED

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def evals():
    """`evals.py` as a script of that folder sees it."""
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("evals")
    sys.path[:] = before
    for name in ("evals", "engine_cases"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def asked(evals, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evals")
    scale = evals.Scale(lengths=(1024,), bins=(13,), drawn=2, n=3, rows=2, speakers=("toy",))
    return evals.Asked(scale, 1, folder, evals.tokenizer_in(folder))


@pytest.fixture(scope="module")
def toy(asked):
    """Random weights, but for a head that often ends its turn."""
    model = tiny("mamba", torch.float32, vocab_size=asked.tokenizer.vocab_size, initializer_range=0.1)
    bonus = torch.zeros(model.config.vocab_size)
    bonus[asked.tokenizer.id_of("<|im_end|>")] = 6.0
    model.head.register_forward_hook(lambda head, hidden, logits: logits + bonus)
    return model


def test_every_family_is_measured(evals, asked):
    families = evals.families(asked)
    assert {f"ruler {name} 1024" for name in PUBLISHED} | {"l0 13 steps", "arithmetic", "code", "gsm8k"} <= set(
        families
    )
    for name in ("ruler niah_single_1 1024", "arithmetic", "gsm8k"):
        row = evals.drawn(families[name], asked)
        assert row["prompt_tokens"] > 5 and min(row["per_second"], row["ms"]) > 0
        assert row["per_second"] * row["ms"] == pytest.approx(1000, rel=0.05)


def test_problems_that_are_wrong_have_no_speed(evals, asked):
    class Soft(Word):
        def score(self, trace):
            return {"reward": 1.0}

    with pytest.raises(evals.Red, match=r"an empty one 1"):
        evals.drawn(Soft(), asked)


def test_scoring_and_raw_generation_say_the_same(evals, asked, toy):
    scored = [({"word": Word(), "arithmetic": task("arithmetic")}, ScoreSettings(n=3, samples=2, max_tokens=5))]
    row = evals.used(toy, scored, asked)
    assert row["episodes"] == 2 * 3 * 3 and row["compared"] + row["ties"] > 0 and row["tokens"] <= 5 * row["episodes"]
    assert row["utilisation"] == pytest.approx(row["score"] / row["raw"], rel=0.02)


def test_an_evaluation_of_several_turns_is_red(evals, asked, toy):
    with pytest.raises(evals.Red, match="2 turns"):
        evals.used(toy, [({"talk": Talk(answers=2)}, ScoreSettings(n=2, samples=0, max_tokens=100))], asked)
