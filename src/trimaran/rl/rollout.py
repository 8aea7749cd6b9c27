"""A rollout: one episode as the trainer sees it, and how a batch of them is made."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from trimaran.evals.play import Group, Played, Player, PlaySettings
from trimaran.tasks.task import REWARD, Message, Task
from trimaran.text.tags import CALL_CLOSE, CALL_OPEN, THINK_CLOSE, THINK_OPEN

FORCED = -1e-3  # natural logarithm of a probability: less likely under the model, yet certain to come


@dataclass(frozen=True)
class Rollout:
    """One episode, its token ids as they went through the engine.

    environment, number: which prompt; group, sample: its place in the batch. ids: prompt, answers and replies; said:
    places in `ids` of the tokens that the model chose itself, and `logprobs` what it gave them then (the behaviour;
    natural logarithms, under the law it sampled from). thoughts: how many of them were thought. reward: the task's
    score, None where the episode failed (`error` is then the traceback). malformed: a thought or call that is none.
    """

    environment: str
    group: int
    sample: int
    number: int
    ids: tuple[int, ...]
    said: tuple[int, ...]
    logprobs: tuple[float, ...]
    thoughts: int
    finish: Literal["stop", "length", "turns", "error"]
    scores: Mapping[str, float]
    malformed: bool = False
    error: str | None = None

    @property
    def reward(self) -> float | None:
        return None if self.error is not None else self.scores[REWARD]

    def plain(self) -> dict[str, Any]:
        """As JSON holds it, floats to the bit."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Rollout":
        """The reverse of `plain`."""
        lists = {name: tuple(plain[name]) for name in ("ids", "said", "logprobs")}
        return cls(**{**plain, **lists})


@dataclass(frozen=True)
class Asked:
    """A group to be rolled out: prompt `number` of an environment."""

    environment: str
    number: int


def roll(
    player: Player,
    tasks: Mapping[str, Task],
    asked: Sequence[Asked],
    play: Mapping[str, PlaySettings],
    *,
    samples: int,
    seed: int,
) -> list[Rollout]:
    """`samples` rollouts of each group, in order; whatever else runs, the same for the same weights and seed."""
    groups = [
        Group(tasks[one.environment], tasks[one.environment].prompt(one.number), play[one.environment], samples, seed)
        for one in asked
    ]
    found = [
        rollout(asked[played.group], played, play[asked[played.group].environment]) for played in player.play(groups)
    ]
    return sorted(found, key=lambda one: (one.group, one.sample))


def rollout(asked: Asked, played: Played, play: PlaySettings) -> Rollout:
    """What the trainer needs of a played episode."""
    conversation = played.conversation
    said, logprobs = chosen(played, play.temperature)
    return Rollout(
        asked.environment,
        played.group,
        played.sample,
        asked.number,
        tuple(conversation.ids),
        tuple(said),
        tuple(logprobs),
        conversation.thoughts(),
        "error" if played.trace is None else played.trace.finish,
        dict(played.scores),
        malformed(conversation.messages[len(played.prompt.messages) :], conversation.tools is not None),
        played.error,
    )


def chosen(played: Played, temperature: float) -> tuple[list[int], list[float]]:
    """Places of the tokens that were chosen, and their log-probabilities.

    At temperature 1 the model's own law counts, else the law it was sharpened to, as the trainer computes it. A token
    that a budget forced was not chosen: the law left nothing else, whatever the model thought of it.
    """
    places, logprobs = [], []
    for (start, _), output in zip(played.conversation.spans, played.outputs, strict=True):
        assert output.logprobs is not None and output.law_logprobs is not None
        for place, (own, law) in enumerate(zip(output.logprobs, output.law_logprobs, strict=True), start):
            if law == 0 and own < FORCED:
                continue
            places.append(place)
            logprobs.append(own if temperature == 1 else law)
    return places, logprobs


def malformed(messages: Sequence[Message], tools: bool) -> bool:
    """Whether an answer among `messages` has a tag in what it says, or a call whose arguments are no JSON object.

    messages: those after the prompt, whose history is nobody's answer. tools: whether any are offered.
    """
    marks = (THINK_OPEN, THINK_CLOSE) + ((CALL_OPEN, CALL_CLOSE) if tools else ())
    for message in messages:
        if message["role"] != "assistant":
            continue
        if any(mark in (message.get("content") or "") for mark in marks):
            return True
        if not all(whole(call["function"]["arguments"]) for call in message.get("tool_calls", ())):
            return True
    return False


def whole(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except ValueError:
        return False


def check_tasks(tasks: Iterable[Task]) -> None:
    """Refuses tasks that cannot be trusted, before anything learns from them."""
    for one in tasks:
        one.check()
