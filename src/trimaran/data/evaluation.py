"""Held-out text in windows: every token after a document's first is scored exactly once.

A window is one row of its own: at most `sequence_length` tokens of one document, read without what came before. Bits
per byte is the sum of the negative log2-probabilities over all windows, divided by `Windows.bytes`.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from trimaran.data.batch import Batch
from trimaran.data.loader import stack
from trimaran.data.packing import Row
from trimaran.data.shards import TokenShards
from trimaran.errors import Refusal


class Windows:
    """Batches over held-out documents, in order, the same at every call of iter(). The last batch may have fewer rows.

    bytes   bytes of UTF-8 text that the scored tokens stand for (eos stands for none, but its loss counts)
    tokens  how many tokens are scored
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        sequence_length: int,
        batch_size: int,
        pad_id: int = 0,
        documents: int | None = None,
    ):
        self.shards, self.sequence_length, self.batch_size, self.pad_id = shards, sequence_length, batch_size, pad_id
        count = len(shards) if documents is None else min(documents, len(shards))
        borders = shards.starts[: count + 1].tolist()
        self.spans = [
            (start, min(start + sequence_length, end - 1))  # the last token of a document is only ever a target
            for first, end in pairwise(borders)
            for start in range(first, end - 1, sequence_length)
        ]
        if not self.spans:
            raise Refusal("held-out documents without a token to score", "documents of two tokens", "hold out more")
        self.tokens = sum(stop - start for start, stop in self.spans)
        self.bytes = int(shards.document_bytes[:count].sum())

    def __len__(self) -> int:
        return -(-len(self.spans) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self.spans), self.batch_size):
            yield stack([self.row(*span) for span in self.spans[first : first + self.batch_size]])

    def row(self, start: int, stop: int) -> Row:
        """Tokens `start` to `stop` of one document, padded to the window; each one's target follows it."""
        piece, count = self.shards.tokens(start, stop + 1), stop - start
        tokens_T = np.full(self.sequence_length, self.pad_id, np.int64)
        targets_T = tokens_T.copy()
        doc_ids_T = np.full(self.sequence_length, -1, np.int32)
        weights_T = np.zeros(self.sequence_length, np.float32)
        tokens_T[:count], targets_T[:count], doc_ids_T[:count], weights_T[:count] = piece[:-1], piece[1:], 0, 1
        return Row(tokens_T, targets_T, doc_ids_T, weights_T)
