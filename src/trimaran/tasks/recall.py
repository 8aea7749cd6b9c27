"""Key recall: facts somewhere in a long text, one of which is asked for at its end.

    The rope holds.
    anchor = amber          a fact; the one that is asked is said once
    Rain is near.
    candle = dove
    candle = dove           `repeats` lines say one of the others again, in the same words
    anchor =                the end of the text; the answer is " amber"

Lines are in any order, so a fact is as likely to be far away as near. What is said again is what training on such texts
learns from, for then the value can be known; a small model needs it often, and texts with few facts among the others
(`varied`), before it finds out. A text that a packed row cuts teaches nothing wrong: a fact whose first mention is gone
is simply new.
"""

from random import Random
from typing import Any, ClassVar

from pydantic import Field, model_validator

from trimaran.errors import Refusal
from trimaran.tasks.draw import drawn
from trimaran.tasks.task import REWARD, Message, Prompt, Split, Task, Trace

KEYS = (
    *("anchor", "basket", "bell", "bench", "blanket", "boat", "bottle", "bowl", "box"),
    *("bridge", "brush", "bucket", "button", "cabin", "candle", "chain", "chair", "clock"),
    *("compass", "cord", "cup", "curtain", "desk", "door", "drum", "feather", "flag"),
    *("gate", "glove", "hammer", "hat", "hook", "horn", "jar", "kettle", "key"),
    *("knife", "ladder", "lamp", "lantern", "mast", "mirror", "needle", "oar", "pillow"),
    *("rope", "sail", "table"),
)
VALUES = (
    *("amber", "apple", "ash", "bear", "birch", "blue", "bronze", "brown", "cedar"),
    *("cherry", "clay", "cloud", "copper", "coral", "deer", "dove", "dust", "eagle"),
    *("ember", "fern", "fire", "fog", "fox", "frost", "gold", "grape", "green"),
    *("hazel", "honey", "iron", "ivory", "jade", "lemon", "lily", "maple", "marble"),
    *("mint", "moon", "olive", "opal", "owl", "pearl", "plum", "ruby", "silver"),
    *("snow", "steel", "wolf"),
)
FILLERS = (
    *("The rope holds.", "Rain is near.", "The crew sleeps.", "A gull cries.", "The sea is calm.", "Wind comes up."),
    *("We wait here.", "The night is long.", "Waves roll on.", "All is well.", "The coast is far.", "Fog comes in."),
)
STATEMENT = 3  # words of a fact


class Recall(Task):
    """A text of about `words` words with `facts` facts; the others are said `repeats` times more, one is asked for.

    varied: from two facts up. names: how many different keys and values there are. A text is held out by its facts.
    """

    name: ClassVar[str] = "recall"
    words: int = Field(120, gt=0)
    facts: int = Field(8, ge=2)
    repeats: int = Field(8, ge=0)
    varied: bool = False
    names: int = Field(len(KEYS), ge=2, le=len(KEYS))

    @model_validator(mode="after")
    def _fits(self) -> "Recall":
        if self.facts > self.names:
            raise Refusal(f"facts = {self.facts}", f"2 to names = {self.names}", "lower facts, or raise names")
        least = STATEMENT * (self.facts + self.repeats + 1)
        if self.words < least:
            raise Refusal(f"words = {self.words}", f"at least {least} for so many facts", "raise words, or lower facts")
        return self

    def prompt(self, number: int, split: Split = "train") -> Prompt:
        secret = drawn(self.name, number, split, self._make, lambda made: f"facts {sorted(made['facts'])}")
        messages = ({"role": "user", "content": "\n".join([*secret["lines"], f"{secret['key']} ="])},)
        return Prompt(self.name, split, number, messages, secret=secret, thinking=False)

    def document(self, number: int, split: Split = "train") -> str:
        """The text with its answer, for models that continue plain text."""
        prompt = self.prompt(number, split)
        return f"{prompt.messages[0]['content']} {prompt.secret['value']}"

    def gold(self, prompt: Prompt) -> tuple[Message, ...]:
        return ({"role": "assistant", "content": prompt.secret["value"]},)

    def score(self, trace: Trace) -> dict[str, float]:
        return {REWARD: float(trace.final == trace.prompt.secret["value"])}

    def _make(self, random: Random) -> dict[str, Any]:
        count = random.randint(2, self.facts) if self.varied else self.facts
        keys, values = random.sample(KEYS[: self.names], count), random.choices(VALUES[: self.names], k=count)
        stated = [f"{key} = {value}" for key, value in zip(keys, values)]
        lines = stated + random.choices(stated[1:], k=self.repeats)
        left = self.words - STATEMENT * (len(lines) + 1)
        while left > 0:
            lines.append(random.choice(FILLERS))
            left -= len(lines[-1].split())
        random.shuffle(lines)
        return {"lines": lines, "facts": [list(pair) for pair in zip(keys, values)], "key": keys[0], "value": values[0]}
