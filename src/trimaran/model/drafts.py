"""Greedy drafts of a draft block, all depths in one call of ops.native_stack.

Drafting one token is a pass of two small blocks, the head and a choice: shorter than the steps that start it. Where the
block, the embedding and the head are what the kernel knows, and every row wants its likeliest tokens alone, the pairs
that are due and all depths go from one to the next without coming back.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from trimaran.model.few import Pass, Sight
from trimaran.model.linear import Embedding, Head
from trimaran.ops import native_stack
from trimaran.ops.native_stack import MAMBA

if TYPE_CHECKING:
    from trimaran.model.hybrid import HybridModel
    from trimaran.model.state import StackMemory


class Ends:
    """The embedding and the head of a model as the kernel sees them. No copy of the model takes it along."""

    def __init__(self) -> None:
        self.sight: Sight | None = None
        self.weights: tuple[Tensor, Tensor] | None = None

    def __reduce__(self) -> tuple[type["Ends"], tuple[()]]:
        return Ends, ()

    def see(self, model: "HybridModel", hidden_SD: Tensor) -> tuple[Tensor, Tensor] | None:
        """The two weights [V, D]; None where one has been rewritten, or is listened to."""
        if self.sight is None or self.sight.dtype is not hidden_SD.dtype or not self.sight.still():
            self.sight = Sight(hidden_SD.dtype)
            self.weights = ends(self.sight, model)
        return self.weights


def ends(sight: Sight, model: "HybridModel") -> tuple[Tensor, Tensor] | None:
    """Reads embedding and head."""
    embeddings = sight.child(model.backbone, "embeddings", Embedding)
    rows = None if embeddings is None else sight.tensor(embeddings, "weight")
    if embeddings is None or rows is None or sight.value(embeddings, "stretch") is not None:
        return None
    if model.config.tie_embeddings:
        return rows, rows
    head = sight.child(model, "lm_head", Head)
    if head is None or not sight.lacks(head, "s_z") or sight.value(head, "stretch") is not None:
        return None
    weight = sight.tensor(head, "weight")
    return None if weight is None else (rows, weight)


def greedy_drafts(
    model: "HybridModel",
    hidden_ND: Tensor,
    following: Sequence[int],
    rows: int,
    depth: int,
    ids: int | None,
    state: "StackMemory",
) -> tuple[Tensor, list[list[int]]] | None:
    """What `HybridModel.drafts` says."""
    assert model.mtp is not None
    hidden_ND = hidden_ND.contiguous()
    known = model.mtp.few.know(model.mtp.parts(), hidden_ND)
    weights = None if known is None else model.seen_ends.see(model, hidden_ND)
    if known is None or weights is None or None in known.known:
        return None
    pairs = len(hidden_ND)
    layout = state.lay_out(pairs + rows * (depth - 1), None)
    own = Pass(hidden_ND, max(pairs, rows), layout, state.keys(layout), known.words[:])
    memories = [None, *state.layers, None]
    for index, part in enumerate(known.known):
        assert part is not None
        if part.words[0] == MAMBA or not own.takes(index, part, known.mixers[index], memories[index]):
            return None
    if own.at is None:  # a block without attention has no places to draft into
        return None
    room = native_stack.Scratch(own.rows * known.room + own.partial, known.inner)
    ids = len(weights[1]) if ids is None else min(ids, len(weights[1]))
    newest_SD, drafted = native_stack.drafts(hidden_ND, following, own.words, room, own.at, weights, ids, depth)
    return None if any(tokens[-1] < 0 for tokens in drafted) else (newest_SD, drafted)
