"""Guesses among the perfect episodes: wrong in content, right in form, of the share that was asked for."""

import pytest

from trimaran.errors import Refusal
from trimaran.tasks.gold import conversations
from trimaran.tasks.names import task
from trimaran.tasks.task import REWARD, Trace


def rewards(name: str, share: float) -> list[float]:
    one = task(name)
    prompts = {one.prompt(number).messages[-1]["content"]: one.prompt(number) for number in range(200)}
    rows = conversations({"x": (one, 200)}, guesses={"x": share})
    said = [(prompts[row["messages"][0]["content"]], row["messages"][1:]) for row in rows]
    return [one.score(Trace(prompt, tuple(messages)))[REWARD] for prompt, messages in said]


@pytest.mark.parametrize("name", ["arithmetic", "transforms", "sorting"])
def test_a_guess_earns_nothing_and_the_rest_all(name):
    assert set(rewards(name, 0.0)) == {1.0}
    assert set(rewards(name, 1.0)) == {0.0}
    assert 70 <= sum(rewards(name, 0.5)) <= 130


def test_guesses_of_an_episode_with_turns_are_refused():
    with pytest.raises(Refusal, match="several turns"):
        list(conversations({"x": (task("desk"), 1)}, guesses={"x": 1.0}))
