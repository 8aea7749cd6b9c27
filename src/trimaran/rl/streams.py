"""From rollouts to rows of tokens: all that the objective of a policy knows.

Rollouts are packed tightly, best fit first, each whole in one row. A place reads the token ids[t] and predicts
ids[t + 1]; it counts where the model chose that token itself.

Shapes: B rows, T tokens of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from trimaran.data.fit import best_fit
from trimaran.rl.rollout import Rollout

ROUND = 32  # rows are this or a multiple of it long: CPU matrix kernels are made anew for every other shape


@dataclass(frozen=True)
class Example:
    """A rollout to learn from. advantage: of all its tokens; weight: of each of its tokens in the loss.

    proximal, reference, teacher: log-probabilities of `rollout.said` under other weights, None where nobody asked.
    """

    rollout: Rollout
    advantage: float
    weight: float
    proximal: tuple[float, ...] | None = None
    reference: tuple[float, ...] | None = None
    teacher: tuple[float, ...] | None = None

    @property
    def length(self) -> int:
        """Tokens to read: up to the one before the last that was chosen."""
        return self.rollout.said[-1]


@dataclass(frozen=True)
class PolicyStreams:
    """A step's rows, or some of them; every stream is [B, T].

    targets_BT: the next token; weights_BT: of its term in the loss, 0 where the model did not choose it; over a step
    they sum to the share of its tokens that are trained on (`trained`). rollouts_BT: which rollout of the step a place
    belongs to (-1: padding). behaviour, proximal, reference, teacher: log-probabilities of the targets under the
    sampler, under the weights before the first update of the batch (None: the present ones), under the model that the
    run began with, and under a teacher.
    """

    tokens_BT: Tensor
    doc_ids_BT: Tensor
    targets_BT: Tensor
    weights_BT: Tensor
    advantages_BT: Tensor
    behaviour_BT: Tensor
    rollouts_BT: Tensor
    proximal_BT: Tensor | None = None
    reference_BT: Tensor | None = None
    teacher_BT: Tensor | None = None
    trained: float = 1.0

    def rows(self, start: int, stop: int) -> "PolicyStreams":
        """Rows from `start` to `stop`."""
        return self._each(lambda stream: stream[start:stop])

    def to(self, device: torch.device) -> "PolicyStreams":
        """The same on `device`."""
        return self._each(lambda stream: stream.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "PolicyStreams":
        streams = {one.name: getattr(self, one.name) for one in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in streams.items() if isinstance(value, Tensor)}
        return replace(self, **changed)


def pack(examples: Sequence[Example], row: int, pad_id: int) -> PolicyStreams:
    """Rows of `row` tokens, or as long as the longest rollout, with the streams that the examples have."""
    places, (rows, width) = laid_out([one.length for one in examples], row)
    empty = torch.zeros(rows, width)
    streams = PolicyStreams(
        tokens_BT=torch.full((rows, width), pad_id),
        doc_ids_BT=torch.full((rows, width), -1, dtype=torch.int32),
        targets_BT=torch.full((rows, width), pad_id),
        weights_BT=empty.clone(),
        advantages_BT=empty.clone(),
        behaviour_BT=empty.clone(),
        rollouts_BT=torch.full((rows, width), -1),
        **{f"{name}_BT": empty.clone() for name in ("proximal", "reference", "teacher") if has(examples, name)},
        trained=float(sum(one.weight * len(one.rollout.said) for one in examples)),
    )
    for number, (example, place) in enumerate(zip(examples, places, strict=True)):
        write(streams, number, example, *place)
    return streams


def has(examples: Sequence[Example], name: str) -> bool:
    return all(getattr(one, name) is not None for one in examples)


def write(streams: PolicyStreams, number: int, example: Example, row: int, start: int) -> None:
    """Puts an example into its place."""
    ids = torch.tensor(example.rollout.ids[: example.length + 1])
    here = slice(start, start + example.length)
    streams.tokens_BT[row, here], streams.targets_BT[row, here] = ids[:-1], ids[1:]
    streams.doc_ids_BT[row, here] = number
    streams.rollouts_BT[row, here] = number
    said = torch.tensor(example.rollout.said) + start - 1
    streams.weights_BT[row, said] = example.weight
    streams.advantages_BT[row, said] = example.advantage
    streams.behaviour_BT[row, said] = torch.tensor(example.rollout.logprobs)
    for name in ("proximal", "reference", "teacher"):
        if (stream := getattr(streams, f"{name}_BT")) is not None:
            stream[row, said] = torch.tensor(getattr(example, name))


def laid_out(lengths: Sequence[int], row: int) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """(row and start of each length, the shape of all rows): rows of `row`, or as long as the longest, rounded up."""
    width = rounded(max(row, *lengths))
    rows = best_fit(range(len(lengths)), lengths, width).rows
    places = [(0, 0)] * len(lengths)
    for number, chosen in enumerate(rows):
        for one, end in zip(chosen, accumulate(lengths[one] for one in chosen)):
            places[one] = (number, end - lengths[one])
    # a single row need not be longer than what it holds
    return places, (len(rows), width if len(rows) > 1 else rounded(sum(lengths)))


def rounded(length: int) -> int:
    return -(-length // ROUND) * ROUND


def unpack(stream_BT: Tensor, streams: PolicyStreams, examples: Sequence[Example]) -> list[tuple[float, ...]]:
    """What `stream_BT` has at the chosen tokens of each example packed into `streams`."""
    values_N, rollouts_N = stream_BT.flatten().cpu(), streams.rollouts_BT.flatten().cpu()
    begins_N = torch.cat([torch.ones(1, dtype=torch.bool), rollouts_N[1:] != rollouts_N[:-1]])
    starts = begins_N.nonzero()[:, 0]  # a rollout lies whole in one row: it begins once
    start_of = dict(zip(rollouts_N[starts].tolist(), starts.tolist()))
    return [
        tuple(values_N[start_of[number] + torch.tensor(one.rollout.said) - 1].tolist())
        for number, one in enumerate(examples)
    ]
