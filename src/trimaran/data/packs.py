"""Rows of whole conversations, without end and from a position that can be saved.

Every epoch shuffles the examples, packs them by best fit and shuffles the rows; all of it depends only on the seed and
the number of the epoch, so the position is two counts. Within a row each example has its own document id: nothing is
carried from one to the next.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from trimaran.data.batch import Batch
from trimaran.data.examples import Examples
from trimaran.data.fit import Packed, best_fit
from trimaran.data.loader import stack
from trimaran.data.packing import Row
from trimaran.errors import Refusal

Weighting = Literal["tokens", "conversations"]


def row_of(examples: Examples, chosen: list[int], length: int, pad_id: int, weighting: Weighting = "tokens") -> Row:
    """The examples `chosen` side by side, then padding.

    weighting: "tokens": every learnt token counts alike; "conversations": every example does, whatever its length
    (weight 1 / its learnt tokens). A step divides by the sum of its weights.
    """
    tokens_T = np.full(length, pad_id, np.int64)
    targets_T = tokens_T.copy()
    doc_ids_T = np.full(length, -1, np.int32)
    weights_T = np.zeros(length, np.float32)
    at = 0
    for document, number in enumerate(chosen):
        ids, learnt = examples[number]
        places = slice(at, at + len(ids) - 1)
        tokens_T[places], targets_T[places], doc_ids_T[places] = ids[:-1], ids[1:], document
        weights_T[places] = learnt[1:] / (learnt[1:].sum() if weighting == "conversations" else 1)
        at = places.stop
    return Row(tokens_T, targets_T, doc_ids_T, weights_T)


class Packs:
    """An endless iterator of `Batch` [batch_size, sequence_length] over examples that each fit a row.

    duplicates: "drop" leaves an example out of a row that holds its twin, in that epoch.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        sequence_length: int,
        batch_size: int,
        pad_id: int = 0,
        seed: int = 0,
        weighting: Weighting = "tokens",
        duplicates: Literal["drop", "keep"] = "drop",
    ):
        self.examples, self.sequence_length, self.batch_size = examples, sequence_length, batch_size
        self.pad_id, self.seed, self.weighting, self.duplicates = pad_id, seed, weighting, duplicates
        self.lengths = examples.places.tolist()
        drop = duplicates == "drop"
        self.names = [twin_name(examples, number) for number in range(len(examples))] if drop else None
        self.epoch, self.place = 0, 0
        self.packed = self.pack(0)
        if len(self.packed.rows) < batch_size:
            found = f"{len(examples)} conversations fill {len(self.packed.rows)} rows, fewer than one batch"
            step = "give more conversations, or a smaller batch_size or sequence_length"
            raise Refusal(found, f"at least batch_size = {batch_size} rows of {sequence_length}", step)

    def pack(self, epoch: int) -> Packed:
        """The rows of an epoch, in the order in which they are given out."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.lengths)).tolist()
        packed = best_fit(order, self.lengths, self.sequence_length, self.names)
        shuffled = random.permutation(len(packed.rows)).tolist()
        return Packed([packed.rows[row] for row in shuffled], packed.duplicates)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return stack([self.draw() for _ in range(self.batch_size)])

    def draw(self) -> Row:
        """The next row."""
        if self.place == len(self.packed.rows):
            self.epoch, self.place = self.epoch + 1, 0
            self.packed = self.pack(self.epoch)
        chosen = self.packed.rows[self.place]
        self.place += 1
        return row_of(self.examples, chosen, self.sequence_length, self.pad_id, self.weighting)

    def observed(self) -> dict[str, float]:
        """How often the conversations have been read, up to and with the batch just drawn."""
        return {"epochs": self.epoch + self.place / len(self.packed.rows)}

    def __str__(self) -> str:
        rows, learnt = self.packed.rows, int(self.examples.learnt_N.sum())
        filled = sum(self.lengths[number] for row in rows for number in row) / (len(rows) * self.sequence_length)
        dropped = f", {self.packed.duplicates} twins left out" if self.packed.duplicates else ""
        words = f"{len(self.examples):,} conversations, {learnt:,} of {len(self.examples.ids_N):,} tokens learnt, "
        return words + f"in {len(rows):,} rows of {self.sequence_length} ({filled:.0%} full{dropped})"

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON holds it, and what the data was, so that other data is refused on loading."""
        return {"settings": self.settings(), "epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position. Refuses one of other conversations, seed, lengths, batch size or weighting."""
        for name, value in self.settings().items():
            if state["settings"].get(name) != value:
                found = f"saved position has {name} = {state['settings'].get(name)!r}"
                raise Refusal(found, f"{name} = {value!r}", "resume with the run's own settings, or start a new run")
        self.epoch, self.place = state["epoch"], state["place"]
        self.packed = self.pack(self.epoch)

    def settings(self) -> dict[str, Any]:
        """All that the order depends on."""
        shape = {"sequence_length": self.sequence_length, "batch_size": self.batch_size, "seed": self.seed}
        how = {"weighting": self.weighting, "duplicates": self.duplicates}
        return shape | how | {"conversations": self.examples.digest}


def twin_name(examples: Examples, number: int) -> bytes:
    """Equal for examples that read and learn the same."""
    ids, learnt = examples[number]
    return hashlib.blake2b(ids.tobytes() + learnt.tobytes(), digest_size=16).digest()


class Answers:
    """Batches over held-out examples, in order, the same at every call of iter(); see `evaluation.Windows`.

    tokens: how many are scored, those that would be learnt; bytes: of UTF-8 text that they stand for.
    """

    def __init__(
        self, examples: Examples, byte_lengths: np.ndarray, *, sequence_length: int, batch_size: int, pad_id: int = 0
    ):
        self.examples, self.batch_size, self.pad_id = examples, batch_size, pad_id
        self.sequence_length = sequence_length
        self.rows = best_fit(range(len(examples)), examples.places.tolist(), sequence_length).rows
        self.tokens = int(examples.learnt_N.sum())
        self.bytes = int(byte_lengths[examples.ids_N[examples.learnt_N]].sum())
        if not self.bytes:
            raise Refusal("held-out answers without a byte of text", "answers", "hold out more")

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self.rows), self.batch_size):
            chosen = self.rows[first : first + self.batch_size]
            yield stack([row_of(self.examples, row, self.sequence_length, self.pad_id) for row in chosen])
