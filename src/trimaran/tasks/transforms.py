"""Strings changed by rule: letters written one by one, such as k-f-q, so that each stays a token of its own."""

from collections.abc import Callable, Mapping
from random import Random
from string import ascii_lowercase, ascii_uppercase
from typing import Any, ClassVar, Literal

from pydantic import Field

from trimaran.tasks.draw import drawn
from trimaran.tasks.task import REWARD, Message, Prompt, Split, Task, Trace

Kind = Literal["reverse", "upper", "double", "swap", "rotate", "shift", "remove"]


class Transforms(Task):
    """`length` letters and the rules to apply, one after another; with a thought, every result on the way.

    kinds: the rules to draw from; steps: rules in a problem; varied: from two letters up. separator: what stands
    between letters, which may be nothing. A string is held out, together with its mirror image, under every rule.
    """

    name: ClassVar[str] = "transforms"
    kinds: tuple[Kind, ...] = Field(("reverse", "upper", "double", "swap", "rotate", "shift", "remove"), min_length=1)
    length: int = Field(5, ge=2, le=64)
    steps: int = Field(1, ge=1, le=4)
    varied: bool = False
    separator: Literal["-", " ", ""] = "-"
    thinking: bool = False

    def prompt(self, number: int, split: Split = "train") -> Prompt:
        secret = drawn(self.name, number, split, self._make, identity)
        rules = ", ".join(secret["rules"])
        messages = ({"role": "user", "content": f"{rules}:\n{self.separator.join(secret['text'])}"},)
        return Prompt(self.name, split, number, messages, secret=secret, thinking=self.thinking)

    def gold(self, prompt: Prompt) -> tuple[Message, ...]:
        results = [self.separator.join(text) for text in applied(prompt.secret["text"], prompt.secret["rules"])]
        said = {"role": "assistant", "content": results[-1]}
        return (said | {"reasoning_content": "\n".join(results)} if prompt.thinking else said,)

    def score(self, trace: Trace) -> dict[str, float]:
        right = applied(trace.prompt.secret["text"], trace.prompt.secret["rules"])[-1]
        return {REWARD: float(trace.final == self.separator.join(right))}

    def _make(self, random: Random) -> dict[str, Any] | None:
        """A string and rules of which each changes what is there."""
        length = random.randint(2, self.length) if self.varied else self.length
        start = "".join(random.choice(ascii_lowercase) for _ in range(length))
        text, rules = start, []
        for _ in range(self.steps):
            rules.append(rule_of(random.choice(self.kinds), text, random))
            changed = apply(text, rules[-1])
            if not changed or changed in (text, start):
                return None
            text = changed
        return {"text": start, "rules": rules}


def identity(secret: Mapping[str, Any]) -> str:
    """The string, or its mirror image: whoever has seen one reversed has seen the other."""
    text = secret["text"]
    return f"string {min(text, text[::-1])}"


def rule_of(kind: Kind, text: str, random: Random) -> str:
    """A rule as the prompt writes it: its kind, and what some kinds need besides."""
    if kind == "shift":
        return f"shift {random.randint(1, 3)}"
    return f"remove {random.choice(text)}" if kind == "remove" else kind


def applied(text: str, rules: list[str]) -> list[str]:
    """What each rule makes of the one before."""
    results = []
    for rule in rules:
        text = apply(text, rule)
        results.append(text)
    return results


def apply(text: str, rule: str) -> str:
    """`text` changed by a rule, such as "reverse" or "shift 2"."""
    kind, _, operand = rule.partition(" ")
    return CHANGES[kind](text, operand)


def shifted(text: str, by: str) -> str:
    """Every letter so many places on in its alphabet, the first after the last, as Caesar wrote."""
    turn = {case[at]: case[(at + int(by)) % 26] for case in (ascii_lowercase, ascii_uppercase) for at in range(26)}
    return "".join(turn[letter] for letter in text)


CHANGES: dict[str, Callable[[str, str], str]] = {
    "reverse": lambda text, _: text[::-1],
    "upper": lambda text, _: text.upper(),
    "double": lambda text, _: "".join(letter * 2 for letter in text),
    "swap": lambda text, _: "".join(text[at : at + 2][::-1] for at in range(0, len(text), 2)),
    "rotate": lambda text, _: text[1:] + text[:1],
    "shift": shifted,
    "remove": lambda text, letter: text.replace(letter, ""),
}
