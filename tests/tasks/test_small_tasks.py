"""The small tasks: answers against independent arithmetic, splits that never meet, scores that nothing else earns."""

from random import Random

import pytest

from trimaran.errors import Refusal
from trimaran.tasks.arithmetic import Arithmetic, columns
from trimaran.tasks.draw import HELD_OUT, drawn, split_of
from trimaran.tasks.names import task
from trimaran.tasks.recall import STATEMENT, Recall
from trimaran.tasks.sorting import Sorting
from trimaran.tasks.task import REWARD, Trace
from trimaran.tasks.transforms import Transforms, apply

SETTINGS = [
    *(("arithmetic", settings) for settings in ({}, {"digits": 1}, {"digits": 12, "varied": True})),
    ("arithmetic", {"thinking": False}),
    ("arithmetic", {"digits": 3, "terms": 3, "operations": "both", "distractors": 2}),
    ("arithmetic", {"operations": "subtract", "terms": 6}),
    *(("transforms", settings) for settings in ({}, {"steps": 3, "thinking": True}, {"separator": "", "varied": True})),
    *(("sorting", settings) for settings in ({}, {"items": "words", "order": "both", "thinking": True}, {"length": 2})),
    *(("recall", settings) for settings in ({}, {"varied": True}, {"facts": 2, "repeats": 0, "names": 2})),
]


def question(of, number, split="train"):
    return of.prompt(number, split).messages[0]["content"]


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_tasks_check_themselves(name, settings):
    task(name, settings).check()


@pytest.mark.parametrize("settings", [settings for name, settings in SETTINGS if name == "arithmetic"])
def test_sums_are_right_by_python(settings):
    sums = Arithmetic(**settings)
    for number in range(50):
        prompt = sums.prompt(number)
        [sum_text] = [word for word in prompt.messages[0]["content"].split() if word.endswith("=?")]
        said = sums.gold(prompt)[0]
        assert int(said["content"]) == eval(sum_text.removesuffix("=?"), {}) >= 0
        assert ("reasoning_content" in said) == sums.thinking
        assert prompt.messages[0]["content"].count("has") == sums.distractors


@pytest.mark.parametrize(("total", "term", "thought"), [
    (47, 85, "7+5=12 4+8+1=13"),
    (52, -18, "12-8=4 5-1-1=3"),
    (9, 995, "9+5=14 0+9+1=10 0+9+1=10"),
    (1000, -1, "10-1=9 10-0-1=9 10-0-1=9 1-0-1=0"),
    (0, 0, "0+0=0"),
])  # fmt: skip
def test_columns_carry_and_borrow(total, term, thought):
    assert columns(total, term) == thought


def test_columns_spell_the_answer():
    random = Random(0)
    for _ in range(300):
        one, other = random.randrange(10**6), random.randrange(10**6)
        results = [step.split("=")[1] for step in columns(one, other).split()]
        assert int(results[-1] + "".join(result[-1] for result in results[-2::-1])) == one + other
        one, other = max(one, other), min(one, other)
        results = [step.split("=")[1] for step in columns(one, -other).split()]
        assert int("".join(reversed(results))) == one - other


@pytest.mark.parametrize(("rule", "result"), [
    ("reverse", "edcba"), ("upper", "ABCDE"), ("double", "aabbccddee"), ("swap", "badce"),
    ("rotate", "bcdea"), ("shift 2", "cdefg"), ("remove c", "abde"),
])  # fmt: skip
def test_every_rule(rule, result):
    assert apply("abcde", rule) == result


def test_shift_goes_round_in_both_cases():
    assert apply("xyzXYZ", "shift 3") == "abcABC"


def test_sorting_sorts_by_python():
    both = Sorting(order="both", varied=True)
    downwards = set()
    for number in range(100):
        prompt = both.prompt(number)
        words, listed = prompt.messages[0]["content"].split("\n")
        items = [int(word) for word in listed.split()]
        down = words == "sort down:"
        downwards.add(down)
        assert both.gold(prompt)[0]["content"] == " ".join(map(str, sorted(items, reverse=down))) != listed
    assert downwards == {True, False}


def test_more_items_than_there_are_is_a_refusal():
    with pytest.raises(Refusal, match="length = 11 different numbers below 10"):
        Sorting(length=11, below=10)
    assert Sorting(length=20, below=10, items="words").prompt(0).messages


def test_a_problem_is_held_out_in_every_order_and_setting():
    """No setting of a task trains what another one holds out."""
    held = {tuple(sorted(Arithmetic().prompt(number, "held_out").secret["terms"])) for number in range(500)}
    for sums in (Arithmetic(), Arithmetic(distractors=2, thinking=False), Arithmetic(varied=True)):
        assert held.isdisjoint(tuple(sorted(sums.prompt(number).secret["terms"])) for number in range(500))
    strings = {Transforms(length=2).prompt(number, "held_out").secret["text"] for number in range(200)}
    trained = {Transforms(length=2, steps=2).prompt(number).secret["text"] for number in range(300)}
    assert strings.isdisjoint(trained) and strings.isdisjoint(text[::-1] for text in trained)
    lists = {frozenset(Sorting(length=2, below=12).prompt(number, "held_out").secret["items"]) for number in range(90)}
    assert lists.isdisjoint(
        frozenset(Sorting(length=2, below=12, order="down").prompt(number).secret["items"]) for number in range(200)
    )


def test_the_held_out_share_is_as_said():
    held = sum(split_of(f"problem {number}") == "held_out" for number in range(10_000))
    assert abs(held / 10_000 - 1 / HELD_OUT) < 0.015


def test_numbers_give_different_problems():
    assert len({question(Arithmetic(digits=6), number) for number in range(200)}) == 200


def test_too_few_problems_is_a_refusal():
    other = {"train": "held_out", "held_out": "train"}[split_of("heads")]
    with pytest.raises(Refusal, match=f"no {other} problem"):
        drawn("coins", 0, other, lambda random: 0, lambda coin: "heads")


@pytest.mark.parametrize("name", ["arithmetic", "calls", "desk", "sorting", "transforms"])
def test_an_answer_that_is_cut_off_earns_nothing(name):
    of = task(name)
    prompt = of.prompt(0)
    gold = of.gold(prompt)
    assert of.score(Trace(prompt, gold))[REWARD] == 1
    assert of.score(Trace(prompt, gold, "length"))[REWARD] == of.score(Trace(prompt, gold, "turns"))[REWARD] == 0
    assert of.score(Trace(prompt, ()))[REWARD] == 0


def test_the_thought_is_no_answer():
    for of in (Arithmetic(), Transforms(steps=2, thinking=True), Sorting(thinking=True)):
        prompt = of.prompt(3)
        [said] = of.gold(prompt)
        thought = f"{said['reasoning_content']}\n{said['content']}"
        inside = {"role": "assistant", "content": "", "reasoning_content": thought}
        assert of.score(Trace(prompt, (inside,)))[REWARD] == 0


@pytest.mark.parametrize("settings", [{}, {"varied": True}, {"words": 900, "facts": 48, "repeats": 200}])
def test_a_text_of_key_recall_holds_its_answer_once(settings):
    task = Recall(**settings)
    for number in range(30):
        prompt = task.prompt(number)
        *lines, asked = question(task, number).split("\n")
        stated = dict(line.split(" = ") for line in lines if " = " in line)
        key, value = asked.removesuffix(" ="), task.gold(prompt)[0]["content"]
        assert lines.count(f"{key} = {value}") == 1 and stated[key] == value
        assert sum(" = " in line for line in lines) == len(stated) + task.repeats
        assert 2 <= len(stated) <= task.facts and (task.varied or len(stated) == task.facts)
        assert 0 <= len(" ".join(lines).split()) + STATEMENT - task.words < 4
        assert task.document(number) == f"{question(task, number)} {value}"
    places = []
    for number in range(30):
        lines = question(task, number).split("\n")
        key = lines.pop().removesuffix("=")
        places.append([line.startswith(key) for line in lines].index(True) / len(lines))
    assert min(places) < 0.3 and max(places) > 0.7, "a fact is as likely to be far away as near"


@pytest.mark.parametrize(("settings", "told"), [
    ({"words": 50}, "words = 50; allowed: at least 51"), ({"facts": 9, "names": 8}, "2 to names = 8"),
    ({"facts": 1}, "facts = 1"), ({"names": 49}, "names = 49"),
])  # fmt: skip
def test_settings_of_key_recall_that_cannot_be(settings, told):
    with pytest.raises(Refusal, match=told):
        Recall(**settings)
