"""An episode as a coroutine: it asks for an answer, is sent one, and goes on until the task has nothing more to say.

Whoever runs episodes (one with a function, thousands with an engine) sees the same turns in the same order.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass

from trimaran.tasks.task import Message, Prompt, Task, Trace


@dataclass(frozen=True)
class Said:
    """The model's answer as a message, and whether it was cut off at its longest."""

    message: Message
    cut: bool = False


# It yields what was said since the model spoke last: the prompt's messages first, then the task's.
Episode = Generator[tuple[Message, ...], Said, Trace]


def episode(task: Task, prompt: Prompt, turns: int = 8) -> Episode:
    """The conversation about `prompt`; returns its trace. `turns`: the most answers that the model gives."""
    messages: list[Message] = []
    said = yield prompt.messages
    for number in range(1, turns + 1):
        messages.append(said.message)
        if said.cut:
            return Trace(prompt, tuple(messages), "length")
        reply = task.turn(prompt, messages)
        if not reply:
            return Trace(prompt, tuple(messages), "stop")
        messages += reply
        if number < turns:
            said = yield reply
    return Trace(prompt, tuple(messages), "turns")


def play(task: Task, prompt: Prompt, generate: Callable[[tuple[Message, ...], Prompt], Said], turns: int = 8) -> Trace:
    """One episode with a function that answers: it is given the whole conversation so far."""
    course, said = episode(task, prompt, turns), None
    history: tuple[Message, ...] = ()
    while True:
        try:
            history += next(course) if said is None else course.send(said)
        except StopIteration as over:
            trace: Trace = over.value
            return trace
        said = generate(history, prompt)
        history += (said.message,)
