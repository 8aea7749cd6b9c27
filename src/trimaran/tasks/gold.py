"""Perfect episodes as training data: what SFT learns a task from before RL goes on.

A share of them may be guesses instead: the right answer to another problem, with no thought but itself. Demonstrations
are seldom all good; a model that imitates such ones can do better than it does, and RL is there to find that out.
"""

from collections.abc import Iterator, Mapping
from random import Random
from types import MappingProxyType
from typing import Any

from trimaran.errors import Refusal
from trimaran.tasks.draw import digest
from trimaran.tasks.task import Message, Prompt, Task

Row = dict[str, Any]  # of a messages JSONL

SPACING = 10_000_000  # between the problems of two seeds
TRIES = 64  # problems looked at for another answer


def conversations(
    tasks: Mapping[str, tuple[Task, int]], seed: int = 0, guesses: Mapping[str, float] = MappingProxyType({})
) -> Iterator[Row]:
    """`count` perfect episodes of each task's training problems, in one shuffled order.

    tasks: name -> (task, count), the names being the caller's own. A row has `messages`, `tools` where any are offered,
    `task` (the name) and `thinking`. Another seed gives other problems and another order. guesses: the chance of an
    episode to be a guess, by name. Raises Refusal for a task that fails its check, and for more episodes than it has
    problems.
    """
    for name, (task, count) in tasks.items():
        if count < 1:
            raise Refusal(f"{name}: count = {count}", "1 or more episodes", "leave the task out or ask for some")
        size = task.size("train")
        if size is not None and count > size:
            found = f"{name}: count = {count} of {size} problems, some of which would come twice"
            raise Refusal(found, f"at most {size}", "lower count; train.steps decides how often they are read")
        task.check()
    order = [(name, number) for name, (_, count) in tasks.items() for number in range(count)]
    Random(digest(f"order {seed}")).shuffle(order)
    return (row(name, tasks[name][0], seed * SPACING + number, guesses.get(name, 0.0)) for name, number in order)


def row(name: str, task: Task, number: int, guesses: float = 0.0) -> Row:
    """The perfect episode of one training problem, or a guess."""
    prompt = task.prompt(number)
    guessed = Random(digest(f"guess {name} {number}")).random() < guesses
    said = guess(task, prompt) if guessed else task.gold(prompt)
    messages = [dict(message) for message in (*prompt.messages, *said)]
    tools = {"tools": [dict(tool) for tool in prompt.tools]} if prompt.tools else {}
    return {"messages": messages, **tools, "task": name, "thinking": prompt.thinking}


def guess(task: Task, prompt: Prompt) -> tuple[Message, ...]:
    """The right answer to another problem, where it is wrong for this one."""
    right = task.gold(prompt)
    for number in range(prompt.number + SPACING // 2, prompt.number + SPACING // 2 + TRIES):
        other = task.gold(task.prompt(number))
        answer = other[-1].get("content")
        if len(other) > 1 or not answer:
            found = f"task {task.name}: guesses for episodes of several turns, or of calls"
            raise Refusal(found, "a task with one answer in words", "set guesses = 0 for it")
        if answer != right[-1].get("content"):
            thought = {"reasoning_content": answer} if prompt.thinking else {}
            return ({"role": "assistant", "content": answer, **thought},)
    raise Refusal(f"task {task.name}: {TRIES} problems with one answer", "answers that differ", "set guesses = 0")
