"""reasoning-gym's families as tasks; the library is the oracle of its own answers."""

import inspect
import re

import pytest

from trimaran.errors import Refusal
from trimaran.tasks.gym import EVALUATING, Gym
from trimaran.tasks.task import REWARD, Trace

rg = pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize(("dataset", "config"), [
    ("chain_sum", {"min_terms": 2, "max_terms": 3}), ("basic_arithmetic", {}), ("letter_counting", {}),
    ("number_filtering", {}), ("gcd", {}), ("prime_factorization", {}),
])  # fmt: skip
def test_families_check_themselves(dataset, config):
    Gym(dataset=dataset, config=config).check(12)


def test_problems_are_the_librarys_own():
    of = Gym(dataset="chain_sum", seed=5)
    library = rg.create_dataset("chain_sum", seed=5, size=1000)
    prompt = of.prompt(3)
    entry = library[prompt.secret["place"]]
    assert prompt.messages[0]["content"] == entry["question"]
    assert of.gold(prompt)[0]["content"] == entry["answer"]
    for text in (entry["answer"], f"the answer is {entry['answer']}", "?"):
        scores = of.score(Trace(prompt, ({"role": "assistant", "content": text},)))
        assert scores["partial"] == library.score_answer(text, entry)
        assert scores[REWARD] == float(text == entry["answer"])


def test_rows_go_on_where_one_data_set_of_the_library_ends():
    of = Gym(dataset="chain_sum")
    assert of.prompt(1_000).messages != of.prompt(0).messages
    assert len({of.prompt(number).messages[0]["content"] for number in range(40)}) > 35


def test_an_answer_that_the_scorer_cannot_read_is_wrong_and_counted():
    of = Gym(dataset="prime_factorization")
    prompt = of.prompt(0)
    assert of.score(Trace(prompt, ({"role": "assistant", "content": "?"},))) == {REWARD: 0, "partial": 0, "unread": 1}


def test_scorers_that_run_answers_are_known():
    """Every family of the installed library whose scorer, or what it is made of, calls eval on an answer."""
    from reasoning_gym.factory import DATASETS

    running = {
        name
        for name, (family, _) in DATASETS.items()
        if re.search(r"parse_expr\(|sympify\(|\beval\((?!entry)", inspect.getsource(family.score_answer))
    }
    assert running <= set(EVALUATING), running - set(EVALUATING)
    with pytest.raises(Refusal, match="run_answers"):
        Gym(dataset="countdown").prompt(0)
    Gym(dataset="binary_matrix", run_answers="accept").check(2)


def test_families_that_cannot_be_trusted_fail_their_check():
    with pytest.raises(Refusal, match="drawn twice differs"):
        Gym(dataset="list_functions").check(4)
    with pytest.raises(Refusal, match="no answer to show"):
        Gym(dataset="propositional_logic").check(1)


@pytest.mark.parametrize(("fields", "found"), [
    ({"dataset": "chain_sums"}, "did you mean 'chain_sum'"),
    ({"dataset": "chain_sum", "config": {"terms": 3}}, "min_terms"),
    ({"dataset": "chain_sum", "config": {"min_terms": 5, "max_terms": 2}}, "chain_sum"),
])  # fmt: skip
def test_what_the_library_does_not_have(fields, found):
    with pytest.raises(Refusal, match=found):
        Gym(**fields).prompt(0)
