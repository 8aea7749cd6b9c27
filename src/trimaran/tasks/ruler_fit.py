"""How long a problem is, and the longest that fits: a search that always ends.

A problem of n units (sentences, words, documents) has about a + b·n tokens. The search keeps a bracket, an n that fits
and one that does not, and asks where the line through what it knows meets the budget; each question narrows the
bracket, and halving takes over where the line does not help. What it returns was counted, so it fits; one unit more was
counted too, and does not.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from trimaran.errors import Refusal
from trimaran.text.chat import encode_chat
from trimaran.text.tokenizer import Tokenizer

WORD = re.compile(r"\w+|[^\w\s]")
GUESSES = 6  # questions along the line before halving
FAR = 1 << 24  # units that nobody needs: 16 million


@dataclass(frozen=True)
class Ruled:
    """Counts tokens as a model will read them. tokenizer None: words and signs are counted instead.

    overhead: what the chat template writes round a single message, up to where the answer begins.
    """

    tokenizer: Tokenizer | None = None
    overhead: int = 0

    def tokens(self, text: str) -> int:
        """Tokens of a message."""
        return sum(1 for _ in WORD.finditer(text)) if self.tokenizer is None else len(self.tokenizer.encode(text))

    def head(self, text: str, tokens: int) -> str:
        """The first `tokens` tokens of a text."""
        if self.tokenizer is not None:
            return self.tokenizer.decode(self.tokenizer.encode(text)[:tokens])
        ends = [found.end() for found in WORD.finditer(text)][:tokens]
        return text[: ends[-1]] if ends else ""


def ruled(folder: Path | None) -> Ruled:
    """The counter of a folder's tokenizer. Raises Refusal for a folder without one."""
    if folder is None:
        return Ruled()
    document = Path(folder) / "tokenizer.json"
    return opened(folder, document.stat().st_mtime_ns if document.exists() else 0)


@lru_cache(maxsize=4)  # thirteen tasks of several lengths read the same file
def opened(folder: Path, changed: int) -> Ruled:
    tokenizer = Tokenizer.load(folder)
    if tokenizer.template is None:
        return Ruled(tokenizer, int(tokenizer.bos_id is not None))
    chat = encode_chat(tokenizer, [{"role": "user", "content": "text"}], generation_prompt=True, thinking=False)
    return Ruled(tokenizer, len(chat.ids) - len(tokenizer.encode("text")))


def largest(tokens: Callable[[int], int], budget: int, least: int, most: int = FAR, guess: int | None = None) -> int:
    """The n of `least` to `most` whose tokens are within the budget while those of n + 1 are not (or n is `most`).

    tokens: counts a problem of n units. guess: where to look first. Raises Refusal where `least` units are too many.
    """
    known = {least: tokens(least)}
    if known[least] > budget:
        found = f"{known[least]} tokens of the smallest problem"
        raise Refusal(found, f"at most {budget}, the length less template and answer", "give a greater length")
    low, high = least, most + 1  # low fits; high does not, or is not allowed
    following = least + 8 if guess is None else guess
    asked = 0
    while high - low > 1:
        here = min(max(following, low + 1), high - 1)
        known[here] = tokens(here)
        asked += 1
        low, high = (here, high) if known[here] <= budget else (low, here)
        following = along(known, budget, low, high) if asked % GUESSES or high > most else (low + high) // 2
    return low


def along(known: dict[int, int], budget: int, low: int, high: int) -> int:
    """Where the line through two sizes known meets the budget; right beside `low` once it points there."""
    other = high if high in known else max((size for size in known if size < low), default=low)
    if other == low or known[other] == known[low]:
        return 2 * low + 8
    slope = (known[other] - known[low]) / (other - low)
    if slope <= 0:
        return (low + high) // 2
    return low + max(1, int((budget - known[low]) / slope))
