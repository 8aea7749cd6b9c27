"""Batches without end, from a position that can be saved.

The order depends only on the settings and the seed. The position is a handful of counts, so resuming replays nothing:
the permutation of an epoch is drawn again from (seed, source, length, epoch), and reading goes on at the next row.
A source that is read at two sequence lengths is walked through once per epoch *at each* of them.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from trimaran.data.batch import Batch
from trimaran.data.mixture import Mixture, furthest_behind
from trimaran.data.packing import Epoch, Row
from trimaran.data.shards import TokenShards
from trimaran.errors import Refusal


class Loader:
    """An endless iterator of `Batch`, [batch_size, sequence_length] unless a phase says otherwise.

    `sources` maps names to encoded documents. `steps` is the number of batches of the whole run; only phases need it.
    """

    def __init__(
        self,
        sources: Mapping[str, TokenShards] | TokenShards,
        *,
        sequence_length: int,
        batch_size: int,
        pad_id: int = 0,
        seed: int = 0,
        mixture: Mixture | None = None,
        steps: int | None = None,
    ):
        self.sources = {"text": sources} if isinstance(sources, TokenShards) else dict(sources)
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.pad_id, self.seed, self.steps = pad_id, seed, steps
        self.mixture = mixture or Mixture()
        self.step = 0
        self.phase = 0
        self.turns: dict[str, int] = {}  # steps drawn in this phase, by length
        self.drawn: dict[str, int] = {}  # rows drawn in this phase, by cursor
        self.cursors: dict[str, list[int]] = {}  # cursor ("source@length") -> [epoch, place in it]
        self.epochs: dict[str, Epoch] = {}
        self.check()

    def check(self) -> None:
        """Refuses what would fail later: lengths that do not divide a step, unknown sources, too little data."""
        per_step = self.batch_size * self.sequence_length
        sizes = {name: shards.total_tokens for name, shards in self.sources.items()}
        for phase in range(len(self.mixture.phases)):
            self.mixture.phase_at(0, self.steps)
            for length in self.mixture.lengths_of(phase, self.sequence_length):
                if per_step % length.sequence_length:
                    found = f"sequence_length {length.sequence_length} does not divide a step of {per_step} tokens"
                    allowed = f"a divisor of batch_size {self.batch_size} x sequence_length {self.sequence_length}"
                    raise Refusal(found, allowed, "change the phase's sequence_length or the batch_size")
                used = self.mixture.weights_of(phase, length, sizes)
                total = sum(sizes[name] for name in used)
                if total < per_step:
                    found = f"{total} tokens of data, shorter than one batch"
                    allowed = f"at least batch_size {self.batch_size} x sequence_length {self.sequence_length}"
                    raise Refusal(found, f"{allowed} = {per_step}", "give more text, or set a smaller batch")

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.enter_phase()
        lengths = self.mixture.lengths_of(self.phase, self.sequence_length)
        names = [str(length.sequence_length) for length in lengths]
        turn = furthest_behind([one.share for one in lengths], [self.turns.get(name, 0) for name in names])
        self.turns[names[turn]] = self.turns.get(names[turn], 0) + 1
        length = lengths[turn]
        sizes = {name: shards.total_tokens for name, shards in self.sources.items()}
        weights = self.mixture.weights_of(self.phase, length, sizes)
        count = self.batch_size * self.sequence_length // length.sequence_length
        rows = [self.draw(weights, length.sequence_length) for _ in range(count)]
        self.step += 1
        return stack(rows)

    def enter_phase(self) -> None:
        phase = self.mixture.phase_at(self.step, self.steps)
        if phase != self.phase:
            self.phase, self.turns, self.drawn = phase, {}, {}

    def draw(self, weights: dict[str, float], sequence_length: int) -> Row:
        """The next row of the source that is furthest behind its weight."""
        cursors = [f"{name}@{sequence_length}" for name in weights]
        chosen = furthest_behind(list(weights.values()), [self.drawn.get(cursor, 0) for cursor in cursors])
        name, cursor = list(weights)[chosen], cursors[chosen]
        self.drawn[cursor] = self.drawn.get(cursor, 0) + 1
        number, place = self.cursors.setdefault(cursor, [0, 0])
        epoch = self.epoch(name, cursor, sequence_length, number)
        self.cursors[cursor] = [number, place + 1] if place + 1 < len(epoch) else [number + 1, 0]
        return epoch.row(place)

    def epoch(self, name: str, cursor: str, sequence_length: int, number: int) -> Epoch:
        """The current epoch of a cursor; kept until the cursor leaves it."""
        held = self.epochs.get(cursor)
        if held is None or held.number != number:
            key = (self.seed, zlib.crc32(cursor.encode()))
            held = Epoch(self.sources[name], sequence_length, self.pad_id, key, number)
            self.epochs[cursor] = held
        return held

    def observed(self) -> dict[str, float]:
        """What is worth a line in the metrics about the batch just drawn: nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON holds it: counts, and what the data was, so that other data is refused on loading."""
        return {
            "settings": self.settings(),
            "step": self.step,
            "phase": self.phase,
            "turns": dict(self.turns),
            "drawn": dict(self.drawn),
            "cursors": {cursor: list(place) for cursor, place in self.cursors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position. Refuses one of other data, seed, lengths, batch size or mixture."""
        for name, value in self.settings().items():
            if state["settings"].get(name) != value:
                found = f"saved position has {name} = {state['settings'].get(name)!r}"
                raise Refusal(found, f"{name} = {value!r}", "resume with the run's own settings, or start a new run")
        self.step, self.phase = state["step"], state["phase"]
        self.turns, self.drawn = dict(state["turns"]), dict(state["drawn"])
        self.cursors = {cursor: list(place) for cursor, place in state["cursors"].items()}

    def settings(self) -> dict[str, Any]:
        """All that the order depends on."""
        origins = {name: shards.index["origin"] for name, shards in self.sources.items()}
        shape = {"sequence_length": self.sequence_length, "batch_size": self.batch_size, "seed": self.seed}
        return shape | {"steps": self.steps, "mixture": self.mixture.model_dump(mode="json"), "sources": origins}


def stack(rows: list[Row]) -> Batch:
    """Rows of equal length as one batch."""

    def stream(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(row, name) for row in rows]))

    return Batch(stream("tokens_T"), stream("targets_T"), stream("doc_ids_T"), stream("weights_T"))
