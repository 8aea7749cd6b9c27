"""Texts of key recall as a corpus: a source of long documents in which something far away has to be known."""

import hashlib
import json
from collections.abc import Iterator

from trimaran.data.corpora import Document
from trimaran.tasks.gold import SPACING
from trimaran.tasks.recall import Recall


class Recalled:
    """`count` documents of `task`'s training split, another set for each seed; written when their turn comes."""

    def __init__(self, task: Recall, count: int, seed: int = 0):
        self.task, self.count, self.seed = task, count, seed

    @property
    def digest(self) -> str:
        described = [self.task.model_dump(mode="json"), self.count, self.seed]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        for number in range(self.count):
            yield Document(f"recall:{number}", self.task.document(self.seed * SPACING + number))

    def __str__(self) -> str:
        return f"recall: {self.count:,} texts of {self.task.words} words"
