"""Many episodes at once through one engine: as soon as one answer ends, its episode's next turn joins the pass.

    groups     problems, each with how many times it is played
    submit     a group's first turn is one request: its samples share the prompt
    step       all that run grow by a pass of the engine
    turn       an answer that ended goes to its task, whose reply (if any) is the next request; the prefix cache knows
               all but that reply
    score      an episode that is over is scored at once

What is sampled depends on (seed, task, split, number, sample, turn) and the ids before it: neither on what else runs
nor on the order. The answers of one sample are the same however many samples a group has.
"""

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from math import isfinite
from typing import Literal, TypeVar

from pydantic import Field, model_validator

from trimaran.config import Settings
from trimaran.engine.budget import Thinking
from trimaran.engine.engine import Engine
from trimaran.engine.request import Request
from trimaran.engine.row import Output
from trimaran.engine.sampler import Sampling
from trimaran.errors import Refusal
from trimaran.tasks.episode import Episode, Said, episode
from trimaran.tasks.task import REWARD, Prompt, Task, Trace
from trimaran.text.conversation import Conversation, check_template
from trimaran.text.tokenizer import Tokenizer

T = TypeVar("T")
AHEAD = 2  # episodes under way, in rows of the engine: enough for no row to stay empty


class PlaySettings(Settings):
    """How a model answers in an episode."""

    max_tokens: int = Field(256, ge=1)  # of each answer, its thought included
    turns: int = Field(8, ge=1)  # answers in an episode, at most
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)  # 0: greedy
    top_k: int = Field(0, ge=0)  # 0: all
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    thinking: bool = True  # whether prompts that allow a thought open one
    budget: int | None = Field(None, ge=0)  # tokens of each thought, after which it is closed; None: no end to them
    grace: int = Field(0, ge=0)  # tokens past the budget in which to wait for the end of a line
    tell_budget: bool = False  # whether the prompt mentions the budget
    effort: Literal["low", "medium"] | None = None  # how hard to think, for the chat template
    logprobs: bool = False  # whether outputs carry log-probabilities

    @model_validator(mode="after")
    def _grace_of_a_budget(self) -> "PlaySettings":
        for name, value in (("grace", self.grace), ("tell_budget", self.tell_budget)):
            if value and self.budget is None:
                found = f"{name} = {str(value).lower()} without a budget"
                raise Refusal(found, "a budget", f"set budget, or no {name}")
        return self


@dataclass(frozen=True)
class Group:
    """A problem of `task`, to be played `samples` times."""

    task: Task
    prompt: Prompt
    settings: PlaySettings
    samples: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Played:
    """An episode that is over.

    group: the place of its group among those asked. conversation: its ids, the spans of the model's answers and all
    messages; outputs: the engine's, one per span, `outputs[i].tokens == ids[slice(*spans[i])]`. scores: what the task
    gave `trace`. Where code of the task failed, or the episode outgrew the engine's memory, `error` is the traceback
    and there are neither trace nor scores: a failure is never a score.
    """

    group: int
    sample: int
    prompt: Prompt
    conversation: Conversation
    outputs: tuple[Output, ...]
    trace: Trace | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def reward(self) -> float:
        """What RL maximises; an episode that failed has none, and asking for it is an error."""
        return self.scores[REWARD]

    @property
    def tokens(self) -> int:
        """Tokens that the model said."""
        return sum(len(output.tokens) for output in self.outputs)


@dataclass
class Live:
    """An episode under way."""

    group: Group
    place: int
    sample: int
    conversation: Conversation
    course: Episode
    outputs: list[Output] = field(default_factory=list)

    def turn(self, output: Output) -> Trace | None:
        """Takes the newest answer to the task and hears its reply; the trace once there is none."""
        said = Said(self.conversation.answer(output.tokens), cut=output.finish == "length")
        try:
            reply = self.course.send(said)
        except StopIteration as over:
            trace: Trace = over.value
            return trace
        self.conversation.hear(reply)
        return None

    def over(self, trace: Trace | None, scores: Mapping[str, float], error: str | None = None) -> Played:
        return Played(
            self.place,
            self.sample,
            self.group.prompt,
            self.conversation,
            tuple(self.outputs),
            trace,
            scores,
            error,
        )


class Player:
    """Plays episodes with an engine that nobody else uses meanwhile.

    Raises Refusal for an engine without a tokenizer, and for a chat template without a generation prompt.
    """

    def __init__(self, engine: Engine):
        if engine.tokenizer is None:
            raise Refusal("an engine without a tokenizer", "one that has it", "make it with Engine(model, tokenizer)")
        check_template(engine.tokenizer)
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.live: dict[str, dict[int, Live]] = {}  # by request, then by its sample

    def play(self, groups: Iterable[Group]) -> Iterator[Played]:
        """The episodes of all groups, each as it ends. Groups are drawn as there is room for them; leaving early aborts
        the rest. Raises Refusal for a prompt that the template or the engine's memory cannot take."""
        waiting = enumerate(groups)
        most = AHEAD * self.engine.settings.rows
        try:
            while True:
                while sum(map(len, self.live.values())) < most and (one := next(waiting, None)):
                    self._open(*one)
                if not self.live:
                    return
                for piece in self.engine.step():
                    if piece.error is not None:
                        raise piece.error
                    if piece.output is not None and (played := self._take(piece.request, piece.sample, piece.output)):
                        yield played
        finally:
            for request in self.live:
                self.engine.abort(request)
            self.live.clear()

    def _open(self, place: int, group: Group) -> None:
        """Begins the episodes of a group."""
        conversation = conversation_of(self.tokenizer, group)
        conversation.hear(group.prompt.messages)
        lives = {}
        for sample in range(group.samples):
            course = episode(group.task, group.prompt, group.settings.turns)
            next(course)
            lives[sample] = Live(group, place, sample, conversation.fork(), course)
        request = request_of(conversation, group, seed_of(group), group.samples)
        self.live[self.engine.submit(request)] = lives

    def _take(self, request: str, sample: int, output: Output) -> Played | None:
        """An answer has ended: asks for its episode's next, or returns the episode."""
        live = self.live[request].pop(sample)
        if not self.live[request]:
            del self.live[request]
        live.outputs.append(output)
        if (played := self._turn(live, output)) is not None:
            return played
        seed = seed_of(live.group, live.sample, len(live.outputs))
        try:
            number = self.engine.submit(request_of(live.conversation, live.group, seed))
        except Refusal:  # it has outgrown the engine's memory, which no other episode has to pay for
            return live.over(None, {}, traceback.format_exc())
        self.live[number] = {0: live}
        return None

    def _turn(self, live: Live, output: Output) -> Played | None:
        """The episode, where the answer was its last."""
        found, error = guarded(lambda: judged(live.group.task, live.turn(output)))
        if error is not None:
            return live.over(None, {}, error)
        return None if found is None else live.over(*found)


def guarded(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """What a task's code gives, or its traceback: the boundary between that code and everybody else's episodes."""
    try:
        return work(), None
    except Exception:
        return None, traceback.format_exc()


def judged(task: Task, trace: Trace | None) -> tuple[Trace, dict[str, float]] | None:
    """An episode's end and its scores, where it has ended."""
    return None if trace is None else (trace, scores_of(task, trace))


def scores_of(task: Task, trace: Trace) -> dict[str, float]:
    """The task's scores, the reward among them. Raises Refusal for a reward outside of 0 to 1, or none, and for a score
    that is no finite number."""
    scores = {name: float(value) for name, value in task.score(trace).items()}
    reward = scores.get(REWARD)
    if reward is None or not 0 <= reward <= 1:
        raise Refusal(f"task {task.name}: {REWARD} = {reward}", "0 to 1", "correct the task's score")
    for name, value in scores.items():
        if not isfinite(value):
            raise Refusal(f"task {task.name}: {name} = {value}", "a finite number", "correct the task's score")
    return scores


def conversation_of(tokenizer: Tokenizer, group: Group) -> Conversation:
    """An empty conversation set up for a group's prompt and settings."""
    settings, prompt = group.settings, group.prompt
    thinking = settings.thinking and prompt.thinking
    budget = settings.budget if settings.tell_budget and thinking else None
    return Conversation(tokenizer, prompt.tools, thinking=thinking, budget=budget, effort=settings.effort)


def request_of(conversation: Conversation, group: Group, seed: int, samples: int = 1) -> Request:
    """What to ask the engine for the conversation's next answer."""
    settings, tokenizer = group.settings, conversation.tokenizer
    sampling = Sampling(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        max_tokens=settings.max_tokens,
        stop_ids=tokenizer.stop_ids,
        samples=samples,
        seed=seed,
        logprobs=settings.logprobs,
    )
    guide = None
    if settings.budget is not None:
        guide = partial(Thinking, tokenizer, settings.budget, settings.grace, opened=conversation.opened)
    return Request(tuple(conversation.ids), sampling, guide=guide)


def seed_of(group: Group, *later: int) -> int:
    """The seed of a group's first turn, which its samples share; `later`: sample and turn of another."""
    words = repr((group.seed, group.prompt.task, group.prompt.split, group.prompt.number, *later))
    return int.from_bytes(blake2b(words.encode(), digest_size=6).digest(), "little")
