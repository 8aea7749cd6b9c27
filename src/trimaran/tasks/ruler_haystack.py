"""What needles are hidden in: five sentences again and again, somebody's own text, or sentences made up here.

No essay is shipped. Without a path, `essay` is a text that never says the same twice, made of the words of
ruler_lexicon; the published essays, or any other text, are a file or folder of one's own.
"""

import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import cycle, islice
from pathlib import Path
from random import Random

from trimaran.errors import Refusal
from trimaran.tasks.ruler_lexicon import ADJECTIVES, NOUNS, VERBS

NOISE = (
    "The wind is soft.",
    "The tide is low.",
    "The boats are tied.",
    "We sit by the fire.",
    "So one day follows the other.",
)
DEPTHS = tuple(round(100 * place / 39) for place in range(40))  # per cent, where needles go in an essay
SENTENCE = re.compile(r"(?<=[.!?])\s+")
SUFFIXES = (".txt", ".md", ".json")


def noise(sentences: int) -> list[str]:
    return list(islice(cycle(NOISE), sentences))


def made_up(seed: int, words: int) -> list[str]:
    """The first `words` words of a text of made-up sentences; the same beginning for any number of words."""
    return essay(seed).first(words)


@dataclass
class Essay:
    """A text without end, as far as anyone has read it."""

    random: Random
    words: list[str] = field(default_factory=list)

    def first(self, words: int) -> list[str]:
        while len(self.words) < words:
            self.words += sentence(self.random).split()
        return self.words[:words]


@lru_cache(maxsize=1)  # the search for a problem's size reads the same text several times
def essay(seed: int) -> Essay:
    return Essay(Random(seed))


def sentence(random: Random) -> str:
    """One sentence, such as: The calm sailor did not admire the village, because every old harp could wander."""

    def thing() -> str:
        first = random.choice(("the", "a", "every", "this", "one"))
        return f"{first} {random.choice(ADJECTIVES)} {random.choice(NOUNS)}"

    def act() -> str:
        return f"{random.choice(('can', 'will', 'may', 'did not', 'would', 'must'))} {random.choice(VERBS)}"

    words = f"{thing()} {act()} {random.choice(('near', 'with', 'before', 'behind', 'for'))} {thing()}"
    if random.random() < 0.5:
        words += f"{random.choice((', and', ', but', ' because', ' while'))} {thing()} {act()}"
    return words[0].upper() + words[1:] + "."


def own_words(path: Path, words: int) -> list[str]:
    """The first words of a text, begun anew where it ends."""
    return list(islice(cycle(read(path)), words))


@lru_cache(maxsize=2)  # read again for each of thousands of problems otherwise
def read(path: Path) -> tuple[str, ...]:
    """The words of a file or of a folder's files in the order of their names: text, Markdown, or JSON with a `text`.
    Raises Refusal where there are none."""
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if one.suffix in SUFFIXES)
    elif path.exists():
        files = [path]
    else:
        raise Refusal(f"no file or folder {str(path)!r}", "a text file, or a folder of them", "correct the path")
    found = tuple(word for one in files for word in text_of(one).split())
    if not found:
        raise Refusal(f"no words in {str(path)!r}", f"files {', '.join(SUFFIXES)}", "give a text")
    return found


def text_of(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise Refusal(f"{path}: byte {problem.start} is no UTF-8", "a text file", "give a text file") from None
    except OSError as problem:
        found = f"cannot read {path}: {(problem.strerror or str(problem)).lower()}"
        raise Refusal(found, "files that can be read", "correct the path, or its rights") from None
    if path.suffix != ".json":
        return text
    try:
        return str(json.loads(text)["text"])
    except (ValueError, TypeError, KeyError):
        raise Refusal(f"{path}: no JSON object with a text", '{"text": "..."}', "give a text file") from None


def with_needles(words: list[str], needles: list[str], depths: list[int]) -> str:
    """An essay with needles as sentences of their own, each at its depth in per cent of the sentences."""
    sentences = SENTENCE.split(" ".join(words))
    places = [len(sentences) * depth // 100 for depth in depths]
    for place, needle in sorted(zip(places, needles), reverse=True):
        sentences.insert(place, needle)
    return " ".join(sentences)


def among(lines: list[str], needles: list[str], random: Random) -> list[str]:
    """Lines with needles between them, at random places of which no two are the same."""
    places = sorted(random.sample(range(len(lines)), len(needles)), reverse=True)
    for place, needle in zip(places, reversed(needles)):  # the first needle comes first
        lines.insert(place, needle)
    return lines
