"""Documents -> rows: concatenate, cut, shuffle; every token of an epoch in exactly one row.

Documents are laid end to end in a shuffled order and cut every T tokens; then the rows are shuffled, so that a long
document does not fill a whole batch. Only the last row of an epoch is padded. A document that goes on in the next row
starts anew there, and the target of a row's last token is the first of the next row when the document goes on.
"""

from dataclasses import dataclass

import numpy as np

from trimaran.data.shards import TokenShards


@dataclass(frozen=True)
class Row:
    """One packed row of T places, as numpy arrays shaped like the streams of a Batch (int64, int64, int32, float32)."""

    tokens_T: np.ndarray
    targets_T: np.ndarray
    doc_ids_T: np.ndarray
    weights_T: np.ndarray


class Epoch:
    """The rows of one pass over `shards`; row r depends only on (seed, number, r)."""

    def __init__(self, shards: TokenShards, sequence_length: int, pad_id: int, seed: tuple[int, ...], number: int):
        self.shards, self.sequence_length, self.pad_id = shards, sequence_length, pad_id
        self.number = number
        random = np.random.default_rng([*seed, number])
        self.documents = random.permutation(len(shards))
        lengths = np.diff(shards.starts)[self.documents]
        self.ends = np.cumsum(lengths)  # of each document in the shuffled stream
        self.rows = random.permutation(-(-shards.total_tokens // sequence_length))

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, place: int) -> Row:
        """The row at `place` of this epoch's order."""
        start = int(self.rows[place]) * self.sequence_length
        stop = min(start + self.sequence_length, int(self.ends[-1]))
        tokens_T = np.full(self.sequence_length, self.pad_id, np.int64)
        targets_T = tokens_T.copy()
        doc_ids_T = np.full(self.sequence_length, -1, np.int32)
        weights_T = np.zeros(self.sequence_length, np.float32)
        first = int(np.searchsorted(self.ends, start, side="right"))
        place_of_document, at = first, start
        while at < stop:
            document, end = int(self.documents[place_of_document]), int(self.ends[place_of_document])
            upto = min(end, stop)
            # where this stretch lies in the shards; one token more, if the document has it, for the last target
            offset = int(self.shards.starts[document + 1]) - end
            piece = self.shards.tokens(at + offset, min(upto + 1, end) + offset)
            here, count, known = at - start, upto - at, len(piece) - 1 if upto == end else upto - at
            tokens_T[here : here + count] = piece[:count]
            targets_T[here : here + known] = piece[1 : known + 1]
            weights_T[here : here + known] = 1
            doc_ids_T[here : here + count] = place_of_document - first
            at, place_of_document = upto, place_of_document + 1
        return Row(tokens_T, targets_T, doc_ids_T, weights_T)
