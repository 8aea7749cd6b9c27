"""A bound on how long a row thinks, and rules that wait until it has thought.

At `budget` tokens of thought the row is allowed to reach the end of its line, for at most `grace` tokens more; then the
tokens that close the thought are forced, one after the other, and from there on nothing is asked of the row. The count
is that of `ThoughtCounter`: it begins where the prompt leaves the thought open (never at a tag of the history), or
where the row opens one as its first word.

A thought that closes by itself is never touched, so a budget it does not reach changes nothing at all.
"""

from collections.abc import Sequence
from copy import copy
from functools import lru_cache

import torch
from torch import Tensor

from trimaran.engine.guide import Guide, only
from trimaran.errors import Refusal
from trimaran.text.tags import THINK_CLOSE, WHITE
from trimaran.text.thought import ThoughtCounter
from trimaran.text.tokenizer import Tokenizer

TAG = THINK_CLOSE.encode()
LINE_ENDS = 2  # after a thought, before the answer: as models are taught to write, and as readers take away


class Thinking:
    """The guide of a row with a budget of thought.

    budget: tokens between the tags; None: any number, and this only counts. grace: tokens past the budget in which to
    wait for the end of a line. opened: the prompt ends inside a thought (`thought.opens_thought`). close: the tokens to
    force, which spell `</think>` and may say something before it; None: the tag alone.

    A token that ends its line just as the budget is reached, and a prompt that leaves no budget, need no waiting.
    """

    ended = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        budget: int | None,
        grace: int = 0,
        *,
        opened: bool,
        close: Sequence[int] | None = None,
    ):
        for name, value in (("budget", budget), ("grace", grace)):
            if value is not None and value < 0:
                raise Refusal(f"{name} = {value}", "0 or more tokens", f"raise {name}")
        self.tokenizer, self.budget, self.grace = tokenizer, budget, grace
        self.close = tuple(closing(tokenizer) if close is None else close)
        if TAG not in b"".join(tokenizer.token_bytes[token] for token in self.close):
            spelled = tokenizer.decode(self.close)
            raise Refusal(f"a close that spells {spelled!r}", f"tokens that spell {THINK_CLOSE}", "end it with the tag")
        self.counter = ThoughtCounter(tokenizer, opened)
        self.forced: tuple[int, ...] = ()
        self.done = False
        self._weigh(b"\n")

    @property
    def count(self) -> int:
        """Tokens of thought so far. Those of a closing tag that is being spelled count until it is whole."""
        return self.counter.count

    def allowed(self) -> Tensor | None:
        return only(self.forced[0]) if self.forced else None

    def push(self, token: int) -> None:
        self.counter.push(token)
        if self.forced:
            self.forced = self.forced[1:]
            self.done = not self.forced
        elif not self.done:
            self._weigh(self.tokenizer.token_bytes[token])

    def fork(self) -> "Thinking":
        twin = copy(self)
        twin.counter = self.counter.fork()
        return twin

    def _weigh(self, newest: bytes) -> None:
        """Begins to close the thought when its time has come."""
        if self.counter.over:
            self.done = True
        if self.done or self.budget is None or not self.counter.inside or self.count < self.budget:
            return
        if b"\n" in newest or self.count >= self.budget + self.grace:
            self.forced = self._rest()

    def _rest(self) -> tuple[int, ...]:
        """What closes the thought from here: where the row is spelling the tag already, what is missing of it."""
        if THINK_CLOSE in self.tokenizer.controls:
            return self.close
        begun = begun_tag(self.counter.read)
        spelled = b""
        for place, token in enumerate(self.close):
            if spelled == begun:
                return self.close[place:]
            spelled += self.tokenizer.token_bytes[token]
        return tuple(self.tokenizer.encode(TAG[len(begun) :].decode()))


class AfterThought:
    """A guide that begins where the row's thought ends.

    ends: tokens that end the row, which the thought may not use: it would leave the rules unmet. Line ends between
    thought and answer are left to the row; where the tag is spelled over several tokens, nothing but them may stand
    behind it in its last one.
    """

    def __init__(self, guide: Guide, tokenizer: Tokenizer, *, opened: bool, ends: Sequence[int] = ()):
        self.guide, self.tokenizer, self.ends = guide, tokenizer, tuple(ends)
        self.counter = ThoughtCounter(tokenizer, opened)
        self.thinking = opened
        self.lines = LINE_ENDS if opened else 0  # that may still come before the guide's own tokens

    @property
    def ended(self) -> bool:
        return not self.thinking and self.guide.ended

    def allowed(self) -> Tensor | None:
        if self.thinking:
            mask_V = torch.ones(self.tokenizer.vocab_size, dtype=torch.bool)
            mask_V[list(self.ends)] = False
            if THINK_CLOSE not in self.tokenizer.controls:
                mask_V[overshooting(self.tokenizer, len(begun_tag(self.counter.read)))] = False
            return mask_V
        mask = self.guide.allowed()
        if mask is None or not self.lines:
            return mask
        mask_V = torch.zeros(self.tokenizer.vocab_size, dtype=torch.bool)
        mask_V[: mask.shape[0]] = mask
        mask_V[line_ends(self.tokenizer, self.lines)] = True
        return mask_V

    def push(self, token: int) -> None:
        if self.thinking:
            self.counter.push(token)
            self.thinking = not self.counter.over
            return
        size = len(self.tokenizer.token_bytes[token])
        if size <= self.lines and token in line_ends(self.tokenizer, self.lines):
            self.lines -= size
        else:
            self.lines = 0
            self.guide.push(token)

    def fork(self) -> "AfterThought":
        twin = copy(self)
        twin.guide, twin.counter = self.guide.fork(), self.counter.fork()
        return twin


def closing(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that close a thought: the one reserved for it, or those that spell it."""
    if THINK_CLOSE in tokenizer.controls:
        return (tokenizer.id_of(THINK_CLOSE),)
    return tuple(tokenizer.encode(THINK_CLOSE))


def begun_tag(read: bytes) -> bytes:
    """How much of a closing tag the last bytes read spell."""
    return next((read[-size:] for size in range(len(TAG) - 1, 0, -1) if TAG.startswith(read[-size:])), b"")


@lru_cache(maxsize=64)
def overshooting(tokenizer: Tokenizer, begun: int) -> list[int]:
    """Ids that, `begun` bytes into a closing tag, end it and say more than white space behind it."""
    found = []
    for identity, piece in enumerate(tokenizer.token_bytes):
        _, tag, behind = (TAG[:begun] + piece).partition(TAG)
        if tag and behind.strip(WHITE.encode()):
            found.append(identity)
    return found


@lru_cache(maxsize=64)
def line_ends(tokenizer: Tokenizer, most: int) -> list[int]:
    """Ids that are nothing but line ends, at most `most`."""
    return [identity for identity, piece in enumerate(tokenizer.token_bytes) if piece and piece in b"\n" * most]
