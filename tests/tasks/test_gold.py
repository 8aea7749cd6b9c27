"""Perfect episodes as rows of messages, and tasks by name."""

import json
from collections import Counter
from dataclasses import replace
from itertools import count

import pytest

from trimaran.errors import Refusal
from trimaran.tasks.gold import conversations
from trimaran.tasks.names import TASKS, task
from trimaran.tasks.sorting import Sorting
from trimaran.tasks.task import REWARD, Task, Trace


def mixture():
    return {"sums": (task("arithmetic"), 20), "tools": (task("calls"), 10), "desk": (task("desk", {"requests": 2}), 5)}


def test_rows_are_perfect_episodes_of_the_training_split():
    tasks, rows = mixture(), list(conversations(mixture(), seed=3))
    assert Counter(row["task"] for row in rows) == {name: count for name, (_, count) in tasks.items()}
    assert [row["task"] for row in rows] != sorted(row["task"] for row in rows)
    for row in rows:
        of = tasks[row["task"]][0]
        assert json.loads(json.dumps(row)) == row
        assert ("tools" in row) == (row["task"] != "sums") and row["thinking"] == (row["task"] == "sums")
        assert row["messages"][0]["role"] == "user" and row["messages"][-1]["role"] == "assistant"
        held = [of.prompt(number, "held_out").messages[0]["content"] for number in range(20)]
        assert row["messages"][0]["content"] not in held


def test_rows_score_full():
    of = task("arithmetic")
    for number, row in enumerate(conversations({"sums": (of, 1)}, seed=0)):
        prompt = of.prompt(number)
        assert row["messages"][0] == prompt.messages[0]
        assert of.score(Trace(prompt, tuple(row["messages"][1:])))[REWARD] == 1


def test_a_seed_is_an_order_and_its_problems():
    one, again, other = (list(conversations(mixture(), seed)) for seed in (0, 0, 1))
    assert one == again
    asked = [{row["messages"][0]["content"] for row in rows if row["task"] == "desk"} for rows in (one, other)]
    assert asked[0].isdisjoint(asked[1])


def test_no_episodes_is_a_refusal():
    with pytest.raises(Refusal, match="count = 0"):
        conversations({"sums": (task("arithmetic"), 0)})


def test_tasks_by_name():
    with pytest.raises(Refusal, match="did you mean 'arithmetic'"):
        task("aritmetic")
    with pytest.raises(Refusal, match="digits"):
        task("arithmetic", {"digit": 3})
    assert task("trimaran.tasks.sorting:Sorting", {"length": 3}) == task("sorting", {"length": 3})


@pytest.mark.parametrize("name", TASKS)
def test_every_name_is_a_task(name):
    from trimaran import config

    found = config.named(name, TASKS, "task")
    assert issubclass(found, Task) and found.name == name


class Gullible(Sorting):
    """A task that pays whoever says enough."""

    def score(self, trace):
        right = self.gold(trace.prompt)[0]["content"]
        return {REWARD: float(right in trace.answer or len(trace.answer) > 10)}


class Wrong(Sorting):
    """A task whose own answer is not right."""

    def gold(self, prompt):
        return ({"role": "assistant", "content": "0"},)


class Leaking(Sorting):
    """A task that trains what it holds out."""

    def prompt(self, number, split="train"):
        return replace(super().prompt(number), split=split)


class Forgetful(Sorting):
    """A task that never draws the same problem twice."""

    def prompt(self, number, split="train"):
        return super().prompt(next(COUNTER), split)


COUNTER = count()


@pytest.mark.parametrize(
    ("broken", "found"),
    [(Gullible, "the answer"), (Wrong, "scores 0"), (Leaking, "both splits"), (Forgetful, "drawn twice differs")],
)
def test_nothing_is_learned_from_a_task_that_fails_its_check(broken, found):
    with pytest.raises(Refusal, match=found):
        conversations({"lists": (broken(), 5)})
