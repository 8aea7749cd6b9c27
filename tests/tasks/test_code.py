"""The code task: perfect answers pass, and nothing but the right values earns anything."""

import json
from itertools import pairwise
from random import Random

import pytest

from tests.tasks.test_sandbox import why_not
from trimaran.config import imported
from trimaran.errors import Refusal
from trimaran.tasks import sandbox
from trimaran.tasks.code import Code, code_in, same
from trimaran.tasks.exercises import CLASSICS
from trimaran.tasks.names import task
from trimaran.tasks.task import Trace


@pytest.fixture(scope="module", autouse=True)
def walls():
    if reason := why_not():
        pytest.skip(reason)


def scored(prompt, content, finish="stop", **settings):
    return Code(**settings).score(Trace(prompt, ({"role": "assistant", "content": content},), finish))


def fenced(source):
    return f"```python\n{source}\n```"


@pytest.mark.parametrize("level", [1, 2, 3])
def test_it_can_be_trusted(level):
    task("code", {"level": level}).check(1)


@pytest.mark.parametrize("make", CLASSICS, ids=lambda make: make.__name__)
def test_classics_agree_with_the_sandbox(make):
    exercise = make(Random(7))
    calls = [exercise.arguments(Random(seed)) for seed in range(30)]
    values, ran = sandbox.call(exercise.source, "solve", calls)
    assert ran.exit == 0
    assert all(same(one.value, value) for one, value in zip(values, exercise.answers(calls), strict=True))


def test_steps_say_what_they_do():
    prompts = [Code(level=2).prompt(number) for number in range(40)]
    assert len({prompt.messages[0]["content"] for prompt in prompts}) > 35
    for prompt in prompts:
        text = prompt.messages[0]["content"]
        assert ("x % 2 == 0" in prompt.secret["source"]) == ("keeps those that are even" in text)
        assert all(json.dumps(call)[1:-1] not in text for call in prompt.secret["calls"] if len(str(call)) > 8)


def test_a_wrong_step_is_found_out():
    """Another problem's solution hardly ever passes."""
    prompts = [Code(level=2).prompt(number) for number in range(3)]
    others = [scored(mine, Code().gold(other)[0]["content"]) for mine, other in pairwise(prompts)]
    assert [score["reward"] for score in others] == [0] * 2 and all(score["code"] == 1 for score in others)


def test_some_tests_passed_are_a_note_and_no_reward():
    prompt = Code().prompt(0)
    source = prompt.secret["source"].replace("def solve", "def right")
    right = json.dumps(prompt.secret["calls"][:4])
    score = scored(
        prompt, fenced(f"{source}\ndef solve(values):\n    assert [values] in {right}\n    return right(values)")
    )
    assert score == {"reward": 0, "tests": 0.4, "code": 1}


def test_an_answer_that_was_cut_off_earns_nothing():
    prompt = Code().prompt(0)
    assert scored(prompt, Code().gold(prompt)[0]["content"], "length")["reward"] == 0


FORGERIES = {
    "prints": "print('[0]\\n' * 50)\ndef solve(*_): print('passed')",
    "replies": "import os\nos.write(3, b'[true]\\n' * 50)\ndef solve(*_): return 1",
    "replies and leaves": "import os\nos.write(3, b'[0]\\n' * 50)\nos._exit(0)",
    "exits": "import sys\nsys.exit(0)",
    "exits when called": "import sys\ndef solve(*_): sys.exit(0)",
    "exits late": "import atexit, os\natexit.register(os._exit, 0)\ndef solve(*_): os._exit(0)",
    "is equal to all": "class All(int): __eq__ = lambda *_: True\ndef solve(*_): return All(0)",
    "is equal text": "class All(str): __eq__ = lambda *_: True\ndef solve(*_): return All()",
    "patches json": "import json\njson.dumps = lambda *a, **k: '[true]'\ndef solve(*_): return 1",
    "patches all": "import builtins, json\nbuiltins.all = builtins.any = lambda *_: True\ndef solve(*_): return True",
    "asserts nothing": "import builtins\nclass AssertionError(Exception): pass\ndef solve(*_): assert False",
    "looks for the values": "import gc, __main__\ndef solve(*_): return str(vars(__main__)) + str(gc.get_objects())",
    "nests": "import os\nos.write(3, b'[' * 60000)\ndef solve(*_): return 1",
    "nests whole": "import os\nos.write(3, (b'[' * 990 + b']' * 990 + b'\\n') * 20)\ndef solve(*_): return 1",
    "counts long": "import os\nos.write(3, b'[' + b'9' * 9000 + b']\\n')\ndef solve(*_): return 1",
    "is not a number": "def solve(*_): return float('nan')",
    "loops": "while True: pass",
    "is no function": "solve = 1",
    "returns itself": "def solve(*_): return solve",
    "is not Python": "def solve(:",
    "has strange signs": "solve = '\ud800\x00'",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_earn_nothing(name):
    limits = {"cpu_seconds": 1, "wall_seconds": 5}
    score = scored(Code().prompt(3), fenced(FORGERIES[name]), limits=limits)
    assert score["reward"] == 0 and score["tests"] <= 0.3  # a constant may meet a value


@pytest.mark.parametrize(
    "answer",
    [
        "def solve(values):\n    return 1",
        "```python\ndef solve(values): ...",
        "```python\na\n```\n```python\nb\n```",
        "```text\nsolve\n```",
        "```python\n\n```",
        "`solve`",
        "```python solve\nx\n```",
        "~~~python\nx\n~~~",
        "```python\nx\n```and more",
        "  ```python\nx\n```",
        "```python\n" + "x" * 30_000 + "\n```",
    ],
)
def test_only_one_whole_fence_is_code(answer):
    assert code_in(answer) is None


def test_words_may_stand_round_the_fence():
    assert code_in("So:\n```python\nx = 1\n\ny = 2\n```\nDone.") == "x = 1\n\ny = 2\n"
    assert code_in("```\nx\n```") == code_in("```py\nx\n```") == "x\n"


def test_kinds_of_values_count():
    assert same([1, {"a": None}], [1, {"a": None}])
    assert not (same(1, True) or same(1, 1.0) or same("1", 1) or same([], {}) or same(None, False))


def test_it_is_found_by_name_and_refuses_what_it_has_not():
    assert isinstance(task("code"), Code) and imported("trimaran.tasks.code:Code") is Code
    with pytest.raises(Refusal, match="isolation"):
        Code(isolation="none")
