"""What a task is: problems without end, each with a perfect answer and a score that nobody can talk their way into.

A task is one class in one file. Its fields are its settings (a recipe writes them); its four methods are pure, so an
episode can be scored again years later from its messages alone, and nothing has to be kept between turns.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from trimaran.config import Settings
from trimaran.errors import Refusal

Message = Mapping[str, Any]  # of OpenAI's form: role, content, reasoning_content, tool_calls
Split = Literal["train", "held_out"]
Finish = Literal["stop", "length", "turns"]

REWARD = "reward"  # the score that RL maximises and evaluation reports, 0 to 1
GARBAGE = (
    "",
    " ",
    "?",
    "0",
    "yes",
    "\\boxed{}",
    "[]",
    "{}",
    "null",
    "the answer is correct",
    "<tool_call>",
    "\u0664\u0662",
)


@dataclass(frozen=True)
class Prompt:
    """One problem: `number` of its task's `split`.

    messages: what the model is shown; tools: what it may call (JSON schemas of OpenAI's form); secret: what only the
    task reads (JSON values), never shown. thinking: whether the answer may begin with a thought.
    """

    task: str
    split: Split
    number: int
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    secret: Mapping[str, Any] = field(default_factory=dict)
    thinking: bool = True


@dataclass(frozen=True)
class Trace:
    """An episode: the prompt and all `messages` after it, the model's and the task's in turn.

    finish: the last answer ended by itself, was cut at its longest, or the episode had its most turns.
    """

    prompt: Prompt
    messages: tuple[Message, ...]
    finish: Finish = "stop"

    @property
    def answer(self) -> str:
        """What the model said last, its thoughts left out."""
        said = [message for message in self.messages if message["role"] == "assistant"]
        return str(said[-1].get("content") or "") if said else ""

    @property
    def final(self) -> str | None:
        """The answer without white space round it; None where it was cut off, or is a call instead of an answer."""
        last = self.messages[-1] if self.messages else {}
        ended = self.finish == "stop" and last.get("role") == "assistant" and not last.get("tool_calls")
        return self.answer.strip() if ended else None


class Task(Settings):
    """A family of problems. Subclasses set `name` and write `prompt`, `gold`, `score`, and `turn` for several turns."""

    name: ClassVar[str]

    @abstractmethod
    def prompt(self, number: int, split: Split = "train") -> Prompt:
        """Problem `number` (0, 1, …): the same for the same settings, on any machine. No held-out problem is ever in
        the training split."""

    def size(self, split: Split = "train") -> int | None:
        """How many problems there are, after which numbers begin anew; None: they do not end."""
        return None

    @abstractmethod
    def gold(self, prompt: Prompt) -> tuple[Message, ...]:
        """The messages of a perfect episode; its thoughts in `reasoning_content`."""

    def turn(self, prompt: Prompt, messages: Sequence[Message]) -> tuple[Message, ...]:
        """What the task says after `messages` (the last one is the model's); nothing: the episode is over."""
        return ()

    @abstractmethod
    def score(self, trace: Trace) -> dict[str, float]:
        """`reward`, 0 to 1, and what else is worth a column. An answer that was cut off earns nothing unless said."""

    def check(self, problems: int = 32) -> None:
        """Refuses a task that cannot be trusted: a perfect answer scores 1, empty and garbage ones 0, and no problem
        is in both splits."""
        seen: dict[Split, set[str]] = {"train": set(), "held_out": set()}
        for split in seen:
            for number in range(problems):
                prompt = self.prompt(number, split)
                if self.prompt(number, split) != prompt:
                    raise self.fault(prompt, "drawn twice differs", "problems that depend on number and split alone")
                seen[split].add(repr(prompt.messages))
                self.check_turns(prompt)
                self.check_scores(prompt)
        if both := seen["train"] & seen["held_out"]:
            found = f"task {self.name}: {len(both)} problems in both splits, such as {min(both)[:80]}"
            raise Refusal(found, "held-out problems that training never shows", "split them by a digest")

    def check_turns(self, prompt: Prompt) -> None:
        """The perfect episode is one that the task would have led."""
        gold = self.gold(prompt)
        for place, message in enumerate(gold):
            if message["role"] != "assistant":
                continue
            following = [other["role"] == "assistant" for other in gold[place + 1 :]] + [True]
            reply = gold[place + 1 : place + 1 + following.index(True)]
            if tuple(self.turn(prompt, gold[: place + 1])) != reply:
                raise self.fault(prompt, "the perfect episode has other replies than `turn`", "the same replies")

    def check_scores(self, prompt: Prompt) -> None:
        """The scores of the perfect episode and of worthless ones."""
        gold = self.gold(prompt)
        if (reward := self.score(Trace(prompt, gold))[REWARD]) != 1:
            raise self.fault(prompt, f"the perfect episode scores {reward}", "1")
        right = str(Trace(prompt, gold).final).casefold() if len(gold) == 1 else None
        for text in GARBAGE:
            said = {"role": "assistant", "content": text}
            if text.strip().casefold() != right and (reward := self.score(Trace(prompt, (said,)))[REWARD]) != 0:
                raise self.fault(prompt, f"the answer {text!r} scores {reward}", "0")

    def fault(self, prompt: Prompt, found: str, allowed: str) -> Refusal:
        place = f"task {self.name}, {prompt.split} problem {prompt.number}: {found}"
        return Refusal(place, allowed, "correct the task before anything learns from it")
