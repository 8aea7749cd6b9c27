"""Functions to write, tried on hidden arguments in a sandbox.

The values that a solution should give never enter the sandbox; those that it gives come out and are compared here. So
there is no verdict in there to forge: a program can only earn its reward by the right values.
"""

import json
from collections.abc import Sequence
from random import Random
from typing import Any, ClassVar

from pydantic import Field

from trimaran.tasks.draw import drawn
from trimaran.tasks.exercises import CLASSICS, Arguments, Exercise, steps
from trimaran.tasks.sandbox import Isolation, Limits, call
from trimaran.tasks.task import REWARD, Message, Prompt, Split, Task, Trace

EXAMPLES = 2  # calls that a prompt shows
LONGEST = 20_000  # characters of an answer


class Code(Task):
    """Write `solve`. The reward is 1 when all tests pass, else 0; `tests` is the share that pass, `code` whether there
    was a solution to try.

    level: 1 one step on a list, 2 two steps, 3 classical exercises. isolation, limits: of the sandbox.
    """

    name: ClassVar[str] = "code"
    level: int = Field(1, ge=1, le=3)
    tests: int = Field(10, ge=3, le=100)
    thinking: bool = True
    isolation: Isolation = "namespaces"
    limits: Limits = Limits(cpu_seconds=2, wall_seconds=8)

    def prompt(self, number: int, split: Split = "train") -> Prompt:
        exercise, calls, values = drawn(self.name, number, split, self._make, lambda made: made[0].source)
        shown = "\n".join(f"{written(c)} == {v!r}" for c, v in zip(calls[:EXAMPLES], values))
        text = f"Write a Python function. {exercise.wording}\n\n{shown}\n\nAnswer with one ```python block."
        secret = {
            "calls": calls[EXAMPLES:],
            "values": values[EXAMPLES:],
            "source": exercise.source,
            "thought": exercise.thought,
        }
        messages = ({"role": "user", "content": text},)
        return Prompt(self.name, split, number, messages, secret=secret, thinking=self.thinking)

    def gold(self, prompt: Prompt) -> tuple[Message, ...]:
        said = {"role": "assistant", "content": f"```python\n{prompt.secret['source']}```"}
        return (said | {"reasoning_content": prompt.secret["thought"]} if prompt.thinking else said,)

    def score(self, trace: Trace) -> dict[str, float]:
        """Raises Refusal where there is no sandbox."""
        source = code_in(trace.final or "")
        if source is None:
            return {REWARD: 0.0, "tests": 0.0, "code": 0.0}
        secret = trace.prompt.secret
        given, _ = call(source, "solve", secret["calls"], self.limits, self.isolation)
        passed = [one.returned and same(one.value, value) for one, value in zip(given, secret["values"])]
        return {REWARD: float(all(passed)), "tests": sum(passed) / len(passed), "code": 1.0}

    def _make(self, random: Random) -> tuple[Exercise, list[Arguments], list[Any]] | None:
        exercise = random.choice(CLASSICS)(random) if self.level == 3 else steps(random, self.level)
        found: dict[str, Arguments] = {}
        for _ in range(20 * (self.tests + EXAMPLES)):
            arguments = exercise.arguments(random)
            found.setdefault(json.dumps(arguments), arguments)
            if len(found) == self.tests + EXAMPLES:
                break
        else:
            return None
        calls = list(found.values())
        values = exercise.answers(json.loads(json.dumps(calls)))  # on copies: a solution may change its arguments
        # One value for most of the tests would reward whoever says it always.
        common = max(values.count(value) for value in values)
        return (exercise, calls, values) if common <= 0.7 * len(values) else None


def written(arguments: Sequence[Any]) -> str:
    return f"solve({', '.join(map(repr, arguments))})"


def same(value: Any, expected: Any) -> bool:
    """Whether two JSON values are equal in value and in kind: True is not 1, and 1.0 is not 1."""
    try:
        return json.dumps(value, sort_keys=True) == json.dumps(expected, sort_keys=True)
    except RecursionError:  # nested deeper than anything that is expected
        return False


def code_in(answer: str) -> str | None:
    """What stands in the one fence of an answer; None where there is none, or several, or one that never closes."""
    lines = answer.split("\n")
    fences = [number for number, line in enumerate(lines) if line.lstrip().startswith(("```", "~~~"))]
    if len(answer) > LONGEST or len(fences) != 2:
        return None
    first, last = fences
    if lines[first].rstrip() not in ("```python", "```py", "```") or lines[last].rstrip() != "```":
        return None
    source = "\n".join(lines[first + 1 : last]) + "\n"
    return source if source.strip() else None
