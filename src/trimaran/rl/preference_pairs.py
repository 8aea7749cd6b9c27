"""Pairs of answers to learn from: read, checked and encoded whole before anything is trained.

A row of JSONL is {"prompt": ..., "chosen": ..., "rejected": ...}, each a text, a message or messages; "tools",
"thinking", "budget" and "effort" may stand beside them as in `data.messages`. Without "prompt", chosen and rejected are
whole conversations, and what both begin with is the prompt. A rejected answer may call a tool that is not offered:
that habit is what Nemotron 3 Nano's pairs are against.

Both texts of a pair lie in one row, each a document of its own, so a step may be cut between any two rows.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimaran.data.examples import Examples, example, gathered
from trimaran.data.messages import Chat, at, chat_of, listed, rows
from trimaran.errors import Refusal
from trimaran.report import say
from trimaran.rl.preference_recipe import PairsSettings
from trimaran.text.tokenizer import Tokenizer
from trimaran.text.tools import Tools

CHOSEN, REJECTED = 0, 1  # document ids in a row, and columns of what is kept per pair
BESIDE = ("tools", "thinking", "budget", "effort", "task")


@dataclass(frozen=True)
class PairRows:
    """A step's pairs, or some of them: B pairs, T the places of the longest.

    counts_BT: 1 where the target belongs to an answer; reference_B2: log-probabilities of the chosen and the rejected
    answer under the model that the run began with; pairs, chosen_tokens: of the whole step.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    doc_ids_BT: Tensor
    counts_BT: Tensor
    reference_B2: Tensor
    pairs: int
    chosen_tokens: int

    def rows(self, start: int, stop: int) -> "PairRows":
        """Pairs from `start` to `stop`."""
        return self._each(lambda stream: stream[start:stop])

    def to(self, device: torch.device) -> "PairRows":
        """The same on `device`."""
        return self._each(lambda stream: stream.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "PairRows":
        streams = (self.tokens_BT, self.targets_BT, self.doc_ids_BT, self.counts_BT, self.reference_B2)
        tokens, targets, doc_ids, counts, reference = map(change, streams)
        return PairRows(tokens, targets, doc_ids, counts, reference, self.pairs, self.chosen_tokens)


@dataclass(frozen=True)
class Pairs:
    """Encoded pairs; number n of `chosen` and of `rejected` follow the same prompt."""

    chosen: Examples
    rejected: Examples

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def digest(self) -> str:
        """Equal digests: equal pairs."""
        return hashlib.sha256(f"{self.chosen.digest} {self.rejected.digest}".encode()).hexdigest()

    @property
    def places(self) -> np.ndarray:
        """How many places of a row each pair takes."""
        return self.chosen.places + self.rejected.places

    def keep(self, which: np.ndarray) -> "Pairs":
        """Those for which `which` is true."""
        return Pairs(self.chosen.keep(which), self.rejected.keep(which))

    def laid_out(self, numbers: Sequence[int], reference_N2: Tensor, pad_id: int) -> PairRows:
        """The pairs `numbers` as rows; reference_N2 holds a line for every pair of these."""
        shape = (len(numbers), int(self.places[list(numbers)].max()))
        tokens, targets = torch.full(shape, pad_id), torch.full(shape, pad_id)
        doc_ids, counts = torch.full(shape, -1, dtype=torch.int32), torch.zeros(shape)
        for row, number in enumerate(numbers):
            start = 0
            for document, texts in ((CHOSEN, self.chosen), (REJECTED, self.rejected)):
                ids, learnt = texts[number]
                at = (row, slice(start, start + len(ids) - 1))
                tokens[at], targets[at] = torch.from_numpy(ids[:-1]).long(), torch.from_numpy(ids[1:]).long()
                doc_ids[at], counts[at] = document, torch.from_numpy(learnt[1:]).float()
                start = at[1].stop
        chosen_tokens = int(counts[doc_ids == CHOSEN].sum())
        return PairRows(tokens, targets, doc_ids, counts, reference_N2[list(numbers)], len(numbers), chosen_tokens)


def read_pairs(data: PairsSettings, tokenizer: Tokenizer) -> tuple[Pairs, Pairs]:
    """(to learn from, held out). Raises Refusal, with file and line, for the first row that cannot be used."""
    place = Path(data.path)
    files = sorted(place.glob("*.jsonl")) if place.is_dir() else [place]
    found = [encoded(row, where, tokenizer) for file in files for where, row in rows(file)]
    if not found:
        raise Refusal(f"no pairs in {place}", 'rows {"prompt": …, "chosen": …, "rejected": …}', "write some into it")
    pairs = fitting(Pairs(*(gathered([pair[side] for pair in found]) for side in (CHOSEN, REJECTED))), data)
    away = held_out(pairs, data.held_out)
    return pairs.keep(~away), pairs.keep(away)


def encoded(row: Mapping[str, Any], place: str, tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, learnt) of the chosen and the rejected text."""
    chats = chats_of(row, place)
    texts = [example(chat, tokenizer) for chat in chats]
    prompts = [ids[: int(learnt.argmax())] for ids, learnt in texts]
    if not np.array_equal(prompts[CHOSEN], prompts[REJECTED]):
        found = f"{place}: the template shows the prompt differently before chosen and rejected"
        raise Refusal(found, "one prompt for both", "look at what the template does with their thoughts")
    if np.array_equal(texts[CHOSEN][0], texts[REJECTED][0]):
        raise Refusal(f"{place}: chosen and rejected are the same", "two answers that differ", "leave the row out")
    return texts


def chats_of(row: Mapping[str, Any], place: str) -> tuple[Chat, Chat]:
    """A row's two conversations, of which the answers alone are learnt."""
    with at(place):
        known = ("prompt", "chosen", "rejected", *BESIDE)
        strangers = [key for key in row if key not in known]
        if "chosen" not in row or "rejected" not in row or strangers:
            found = f"a row with {', '.join(map(repr, row)) or 'nothing'}"
            raise Refusal(found, ", ".join(known), "rename the keys of the rows, or leave out what is none of them")
        sides = [messages(row, key, "assistant") for key in ("chosen", "rejected")]
        prompt = messages(row, "prompt", "user") if row.get("prompt") is not None else shared(*sides)
        if row.get("prompt") is None:
            sides = [side[len(prompt) :] for side in sides]
        if not prompt or not all(sides):
            raise Refusal("an empty prompt or answer", "a prompt and two answers", "complete the row")
        beside = {key: row[key] for key in BESIDE if row.get(key) is not None}
        offered = listed(beside, "tools")
    chosen, rejected = (
        chat_of({**beside, "tools": tools, "prompt": prompt, "completion": side}, place)
        for side, tools in (
            (sides[CHOSEN], offered),
            (sides[REJECTED], [*offered, *phantoms(sides[REJECTED], offered)]),
        )
    )
    return chosen, replace(rejected, tools=chosen.tools)


def messages(row: Mapping[str, Any], key: str, role: str) -> list[Any]:
    """What a row says under `key`: a text of that role, a message, or messages."""
    value = row[key]
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, Mapping) else listed(row, key)


def shared(chosen: list[Any], rejected: list[Any]) -> list[Any]:
    """The messages that both conversations begin with."""
    count = next((n for n, pair in enumerate(zip(chosen, rejected)) if pair[0] != pair[1]), 0)
    return chosen[:count]


def phantoms(answer: Sequence[Any], offered: list[Any]) -> list[dict[str, Any]]:
    """Tools that an answer calls and nobody offers, described so that the call passes for one."""
    called = [call for message in answer if isinstance(message, Mapping) for call in message.get("tool_calls") or ()]
    inner = [call.get("function", call) for call in called if isinstance(call, Mapping)]
    names = {str(one["name"]) for one in inner if isinstance(one, Mapping) and one.get("name")}
    return [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
        for name in sorted(names - set(Tools(offered).names))
    ]


def fitting(pairs: Pairs, data: PairsSettings) -> Pairs:
    """The pairs that fit a row; longer ones are refused, or dropped and counted."""
    fits = pairs.places <= data.sequence_length
    if fits.all():
        return pairs
    found = f"{(~fits).sum()} of {len(pairs)} pairs are longer than {data.sequence_length} tokens"
    longest = f"the longest has {pairs.places.max()}"
    if data.too_long == "refuse" or not fits.any():
        step = 'raise data.sequence_length, or set data.too_long = "drop"'
        raise Refusal(f"{found}; {longest}", f"at most {data.sequence_length}, both texts together", step)
    say(f"{found} and left out; {longest}")
    return pairs.keep(fits)


def held_out(pairs: Pairs, share: float) -> np.ndarray:
    """Which pairs are held out, bool [N]: those of about `share` of the prompts, at least of one, chosen by what the
    prompts say, so that all pairs of a prompt stay together."""
    texts = (pairs.chosen[number] for number in range(len(pairs)))
    prompts = [hashlib.sha256(ids[: int(learnt.argmax())].tobytes()).hexdigest() for ids, learnt in texts]
    order = sorted(set(prompts))
    if share and len(order) < 2:
        raise Refusal("one prompt, and nothing to hold out", "two different ones", "give more, or data.held_out=0")
    away = set(order[: max(1, round(share * len(order)))]) if share else set()
    return np.array([prompt in away for prompt in prompts])


class PairSource:
    """Endless batches of `batch_size` pairs, every epoch in a new order that the seed and its number decide.

    The position is one count. `held_out`, with its own reference, is kept for measuring.
    """

    def __init__(
        self,
        pairs: Pairs,
        reference_N2: Tensor,
        *,
        batch_size: int,
        pad_id: int,
        seed: int = 0,
        held_out: tuple[Pairs, Tensor] | None = None,
    ):
        self.pairs, self.reference_N2, self.held_out = pairs, reference_N2, held_out
        self.batch_size, self.pad_id, self.seed, self.drawn = batch_size, pad_id, seed, 0
        self.shuffled: tuple[int, np.ndarray] | None = None  # an epoch and its order
        if len(pairs) < batch_size:
            found = f"{len(pairs)} pairs to learn from, fewer than one batch"
            raise Refusal(found, f"at least batch_size = {batch_size}", "give more pairs, or a smaller batch_size")

    def __next__(self) -> PairRows:
        numbers = [self.number(place) for place in range(self.drawn, self.drawn + self.batch_size)]
        self.drawn += self.batch_size
        return self.pairs.laid_out(numbers, self.reference_N2, self.pad_id)

    def number(self, place: int) -> int:
        """The pair at `place` of the endless order."""
        epoch, within = divmod(place, len(self.pairs))
        if self.shuffled is None or self.shuffled[0] != epoch:
            self.shuffled = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))
        return int(self.shuffled[1][within])

    def observed(self) -> dict[str, float]:
        """How often the pairs have been read, up to and with the batch just drawn."""
        return {"epochs": self.drawn / len(self.pairs)}

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON holds it, and what the data was, so that other data is refused on loading."""
        return {"settings": self.settings(), "drawn": self.drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position. Refuses one of other pairs, seed or batch size."""
        for name, value in self.settings().items():
            if state["settings"].get(name) != value:
                found = f"saved position has {name} = {state['settings'].get(name)!r}"
                raise Refusal(found, f"{name} = {value!r}", "resume with the run's own settings, or start a new run")
        self.drawn = state["drawn"]

    def settings(self) -> dict[str, Any]:
        """All that the order depends on."""
        return {"batch_size": self.batch_size, "seed": self.seed, "pairs": self.pairs.digest}
