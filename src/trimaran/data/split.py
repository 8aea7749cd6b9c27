"""Parts of a corpus: what is held out for validation, and documents that are already in memory."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator

from trimaran.data.corpora import Document, Documents
from trimaran.errors import Refusal


class Part:
    """The documents of `corpus` that `take` keeps, whole or in part. `label` tells the parts of one corpus apart."""

    def __init__(self, corpus: Documents, label: str, take: Callable[[Document], Document | None]):
        self.corpus, self.label, self.take = corpus, label, take

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.corpus.digest} {self.label}".encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        taken = (self.take(document) for document in self.corpus.documents())
        return (document for document in taken if document is not None)

    def texts(self) -> Iterator[str]:
        return (document.text for document in self.documents())


class Listed:
    """Documents in memory, as a corpus."""

    def __init__(self, documents: Iterable[Document]):
        self.kept = list(documents)

    @property
    def digest(self) -> str:
        texts = [(one.name, hashlib.sha256(one.text.encode()).hexdigest()) for one in self.kept]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        return iter(self.kept)

    def texts(self) -> Iterator[str]:
        return (document.text for document in self.kept)


def split(corpus: Documents, held_out: float) -> tuple[Part, Part]:
    """(training part, held-out part): about `held_out` of the documents, at least one, chosen by a hash of the name.

    New documents move none of the old ones to the other side, unless there are very few. A single document is cut
    instead, at a line end where one is near, and its end is held out.
    """
    if not 0 < held_out < 1:
        raise Refusal(f"held_out = {held_out}", "a share between 0 and 1", "set data.held_out to 0.05, say")
    names = sorted((one.name for one in corpus.documents()), key=place_of)
    if not names:
        raise Refusal("no documents to split", "at least one text that is not empty", "check data.path")
    if len(names) == 1:
        return cut(corpus, held_out)
    share = sum(place_of(name) < held_out for name in names)
    away = frozenset(names[: min(max(share, 1), len(names) - 1)])
    label = f"held out {held_out}"
    return (
        Part(corpus, f"not {label}", lambda one: None if one.name in away else one),
        Part(corpus, label, lambda one: one if one.name in away else None),
    )


def place_of(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def cut(corpus: Documents, held_out: float) -> tuple[Part, Part]:
    """The start and the end of a corpus of one document."""

    def border(text: str) -> int:
        wanted = round(len(text) * (1 - held_out))
        furthest = max(0, 2 * wanted - len(text))  # no line end is worth more than twice the share
        return text.rfind("\n", furthest, wanted) + 1 or wanted

    def start(one: Document) -> Document:
        return Document(f"{one.name}:start", one.text[: border(one.text)])

    def end(one: Document) -> Document:
        return Document(f"{one.name}:end", one.text[border(one.text) :])

    return Part(corpus, f"first {1 - held_out}", start), Part(corpus, f"last {held_out}", end)
