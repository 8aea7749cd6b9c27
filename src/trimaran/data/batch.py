"""What a training step is given (contract 4)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Batch:
    """Packed rows. B = rows, T = tokens per row.

    tokens_BT    int64    what the model reads
    targets_BT   int64    the token that follows, in the same document
    doc_ids_BT   int32    equal to the previous one: the document goes on; another: a new one; -1: padding
    weights_BT   float32  weight of each target in the cross-entropy: 0 where the document ends, and on padding
    """

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    doc_ids_BT: torch.Tensor
    weights_BT: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`; pinned memory is copied without waiting."""
        streams = (self.tokens_BT, self.targets_BT, self.doc_ids_BT, self.weights_BT)
        return Batch(*(stream.to(device, non_blocking=True) for stream in streams))

    def rows(self, start: int, stop: int) -> "Batch":
        """Rows from `start` to `stop`, for accumulating a step in parts."""
        streams = (self.tokens_BT, self.targets_BT, self.doc_ids_BT, self.weights_BT)
        return Batch(*(stream[start:stop] for stream in streams))

    def columns(self, start: int, stop: int) -> "Batch":
        """The tokens from `start` to `stop` of every row."""
        streams = (self.tokens_BT, self.targets_BT, self.doc_ids_BT, self.weights_BT)
        return Batch(*(stream[:, start:stop] for stream in streams))

    def padded(self, multiple: int) -> "Batch":
        """With rows of padding behind the others, up to the next multiple."""
        missing = -len(self.tokens_BT) % multiple
        if not missing:
            return self
        tokens, targets, doc_ids, weights = (
            F.pad(stream, (0, 0, 0, missing), value=value)
            for stream, value in (
                (self.tokens_BT, 0),
                (self.targets_BT, 0),
                (self.doc_ids_BT, -1),
                (self.weights_BT, 0),
            )
        )
        return Batch(tokens, targets, doc_ids, weights)
