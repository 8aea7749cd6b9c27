"""Thoughts in tokens: whether a prompt ends inside one, and how many tokens of an answer belong to it."""

from collections import deque
from collections.abc import Sequence
from copy import copy

from trimaran.text.tags import THINK_CLOSE, THINK_OPEN, WHITE
from trimaran.text.tokenizer import Tokenizer


def opens_thought(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether what is generated after the prompt `ids` begins inside a thought.

    Only what follows the last other control token counts: tags of history, and those that a message spells, do not.
    """
    borders = {identity for name, identity in tokenizer.controls.items() if name not in (THINK_OPEN, THINK_CLOSE)}
    last = next((place for place in reversed(range(len(ids))) if ids[place] in borders), -1)
    turn = tokenizer.decode(ids[last + 1 :])
    return turn.rfind(THINK_OPEN) > turn.rfind(THINK_CLOSE)


class ThoughtCounter:
    """Counts the tokens of an answer's thought as they arrive, its tags not included.

    A tag may be one token or spread over several; a token that is part of one is none of the thought's, unless it
    holds words before the tag. The rules are those of `answer.AnswerReader`.
    """

    def __init__(self, tokenizer: Tokenizer, opened: bool):
        self.pieces, self.ends = tokenizer.token_bytes, frozenset(tokenizer.stop_ids)
        self.count = 0
        self.inside = opened
        self.over = False
        self.read = b""  # before a thought: all; in one: what a closing tag may have begun in
        self.starts: deque[int] = deque()  # of the thought's tokens within `read`

    def fork(self) -> "ThoughtCounter":
        """A copy that counts on by itself."""
        twin = copy(self)
        twin.starts = self.starts.copy()
        return twin

    def push(self, token: int) -> int:
        """Takes a token and returns the count so far."""
        if self.over or token in self.ends:
            return self.count
        self.read += self.pieces[token]
        if self.inside:
            self._inside(len(self.pieces[token]))
        else:
            self._before()
        return self.count

    def _before(self) -> None:
        bare, tag = self.read.lstrip(WHITE.encode()), THINK_OPEN.encode()
        if bare.startswith(tag):
            self.inside, self.read = True, bare[len(tag) :]
            self.count += bool(self.read)
            self.starts.extend([0] * bool(self.read))
        self.over = not self.inside and not tag.startswith(bare)

    def _inside(self, size: int) -> None:
        self.count += 1
        self.starts.append(len(self.read) - size)
        tag = THINK_CLOSE.encode()
        at = self.read.find(tag)
        if at >= 0:
            self.count -= sum(start >= at for start in self.starts)
            self.over, self.inside = True, False
            return
        past = max(0, len(self.read) - len(tag) + 1)
        self.read = self.read[past:]
        self.starts = deque(start - past for start in self.starts if start >= past)
