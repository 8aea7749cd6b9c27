"""Perfect episodes as training data: what SFT learns a task from before RL goes on."""

from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

from trimaran.errors import Refusal
from trimaran.tasks.draw import digest
from trimaran.tasks.task import Task

Row = dict[str, Any]  # of a messages JSONL

SPACING = 10_000_000  # between the problems of two seeds
CHECKED = 8  # problems of each split, before a task is learned from


def conversations(tasks: Mapping[str, tuple[Task, int]], seed: int = 0) -> Iterator[Row]:
    """`count` perfect episodes of each task's training problems, in one shuffled order.

    tasks: name -> (task, count), the names being the caller's own. A row has `messages`, `tools` where any are offered,
    `task` (the name) and `thinking`. Another seed gives other problems and another order. Raises Refusal for a task
    that fails its check.
    """
    for name, (task, count) in tasks.items():
        if count < 1:
            raise Refusal(f"{name}: count = {count}", "1 or more episodes", "leave the task out or ask for some")
        task.check(CHECKED)
    order = [(name, number) for name, (_, count) in tasks.items() for number in range(count)]
    Random(digest(f"order {seed}")).shuffle(order)
    return (row(name, tasks[name][0], seed * SPACING + number) for name, number in order)


def row(name: str, task: Task, number: int) -> Row:
    """The perfect episode of one training problem."""
    prompt = task.prompt(number)
    messages = [dict(message) for message in (*prompt.messages, *task.gold(prompt))]
    tools = {"tools": [dict(tool) for tool in prompt.tools]} if prompt.tools else {}
    return {"messages": messages, **tools, "task": name, "thinking": prompt.thinking}
