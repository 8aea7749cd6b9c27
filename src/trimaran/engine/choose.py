"""Choosing tokens after a pass: one more for each row, and before it as many of its drafts as stand.

A row comes with the logits of its newest token and of each of its k drafts: k + 1 places. The law of a place is the
sampling law as if the drafts before it had been said: they count as seen for the repetition penalty, and the row's
guide has been pushed them. What a guide forbids goes before everything else, so top_k and top_p share out what is left.

Which drafts stand, for each row on its own:

    coupled     the row's own draw is made at every place, and a draft stands while it is what was drawn. What is said
                is plain sampling's, token for token, whoever drafted.
    rejection   draft y, drawn from q where the law is p, stands with probability min(1, p(y) / q(y)); the first that
                falls is replaced by a draw from (p - q)+, normalised. Exact in law, not token for token
                (arXiv 2211.17192, 2302.01318; per row of a batch as in BASS, 2404.15778). A drafter without a law is
                a point mass: y stands with probability p(y), and what replaces it is p without y.

A drafter draws with the row's own numbers (`uniform`), as `coupled` does, so that drafts fall together with draws;
`rejection` takes its own numbers for accepting and replacing, independent of those.

Shapes: S rows, N = sum over rows of k + 1 places one row after the other, V ids.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, takewhile
from typing import Literal

import torch
from torch import Tensor

from trimaran.engine.guide import Guide
from trimaran.engine.sampler import Law, Sampling, draw, uniform
from trimaran.errors import Refusal
from trimaran.ops.numbers import at_least_fp32

Acceptance = Literal["coupled", "rejection"]

# Places of `uniform` that no output reaches: numbers of their own for accepting and for replacing a draft.
ACCEPT, REPLACE = 1 << 61, 1 << 62


@dataclass(frozen=True)
class Ask:
    """What a choice depends on beside the logits, for one row.

    key, place: the row's `key_of(...)` and how many tokens it has said. seen [V] bool: tokens of its prompt and
    output, needed where it has a repetition penalty. guide: pushed all that was said; never pushed here. drafts: the
    k tokens after which there are logits too. law [k, V]: what the drafts were drawn from; None: point masses.
    top: how many of the likeliest tokens to report at each place.
    """

    settings: Sampling
    key: bytes
    place: int
    seen: Tensor | None = None
    guide: Guide | None = None
    drafts: Sequence[int] = ()
    law: Tensor | None = None
    top: int = 0

    def after(self, token: int) -> "Ask":
        """What the next choice would depend on, were `token` said. This one is not touched."""
        guide = None if self.guide is None else self.guide.fork()
        if guide is not None:
            guide.push(token)
        seen = None
        if self.seen is not None and self.settings.repetition_penalty != 1:
            seen = self.seen.clone()
            seen[token] = True
        return replace(self, place=self.place + 1, seen=seen, guide=guide, drafts=(), law=None)


@dataclass(frozen=True)
class Choice:
    """What a row says: `accepted` of its drafts and one token more.

    logprobs, law_logprobs: natural logarithms, under the model's own law and under the sampling law; top: the
    likeliest (id, log-probability) pairs of the model's law at each place; None unless the row asks. refusal: why the
    row cannot go on after `tokens`, all of which are drafts that stand (it may end among them, and then never gets
    there); its neighbours are not touched by it.
    """

    tokens: list[int]
    accepted: int
    logprobs: list[float] | None = None
    law_logprobs: list[float] | None = None
    top: list[list[tuple[int, float]]] | None = None
    refusal: Refusal | None = None

    def logprobs_at(self, ahead: int) -> tuple[float, float] | None:
        """The log-probabilities of the token `ahead` places on, for `Row.push`."""
        if self.logprobs is None or self.law_logprobs is None:
            return None
        return self.logprobs[ahead], self.law_logprobs[ahead]


def choose(
    logits_NV: Tensor, asks: Sequence[Ask], spelled: int | None = None, acceptance: Acceptance = "coupled"
) -> list[Choice]:
    """The choice of each row, from the logits of all places, rows one after the other.

    spelled: ids from there on are never chosen (models round their vocabulary up; the tokenizer lacks them), and laws
    end there.
    """
    likeliest = plain_greedy(logits_NV, asks, spelled)
    if likeliest is not None:
        drafts = [ask.drafts for ask in asks]
        said = coupled(likeliest, starts_of(drafts), drafts)
        return [Choice(tokens, accepted) for tokens, accepted in zip(*said, strict=True)]
    places = Places(logits_NV, asks, spelled)
    if acceptance == "coupled" or places.law.all_greedy:
        tokens, accepted = coupled(places.draws(), places.starts, places.drafts)
    else:
        tokens, accepted = rejection(places)
    choices = [Choice(said, count) for said, count in zip(tokens, accepted, strict=True)]
    for row, (ahead, refusal) in places.hopeless.items():
        if accepted[row] >= ahead:
            choices[row] = Choice(tokens[row][:ahead], ahead, refusal=refusal)
    return with_logprobs(places, choices)


def likeliest_alone(ask: Ask) -> bool:
    """Whether the row wants its likeliest token and nothing besides."""
    one = ask.settings
    return not (one.temperature or one.repetition_penalty != 1 or one.logprobs or ask.top or ask.guide is not None)


def plain_greedy(logits_NV: Tensor, asks: Sequence[Ask], spelled: int | None) -> list[int] | None:
    """The likeliest id of every place, in one call, where no row asks for more than that; None where one does, or where
    the model gave no numbers."""
    if not all(map(likeliest_alone, asks)):
        return None
    best = logits_NV[:, :spelled].max(-1)
    return best.indices.tolist() if all(map(math.isfinite, best.values.tolist())) else None


class Places:
    """The places of a batch of rows: their logits without what is forbidden, and the laws that settings make of them.

    starts: each row's first place. drafts: each row's, up to the first that is not spelled (look-up may find such in a
    prompt): it cannot stand, and the place before it is like one after all drafts. hopeless: for rows with a place
    that leaves no choice, how many places come before the first such and why; its logits are zeros here, so that
    nothing downstream meets a NaN.
    """

    def __init__(self, logits_NV: Tensor, asks: Sequence[Ask], spelled: int | None):
        counts = [len(ask.drafts) + 1 for ask in asks]
        if sum(counts) != logits_NV.shape[0]:
            raise ValueError(f"logits of {logits_NV.shape[0]} places, rows with {counts}")
        self.asks, self.raw_NV, self.device = asks, logits_NV, logits_NV.device
        self.starts = starts_of([ask.drafts for ask in asks])
        self.law = Law.of([ask.settings for ask, count in zip(asks, counts) for _ in range(count)], self.device)
        width = logits_NV.shape[-1] if spelled is None else min(spelled, logits_NV.shape[-1])
        self.drafts = [list(takewhile(lambda token: token < width, ask.drafts)) for ask in asks]
        self.hopeless: dict[int, tuple[int, Refusal]] = {}
        self.logits_NV = self._narrowed(width)
        self.seen_NV = None if self.law.penalty_B1 is None else self._seen()

    def _seen(self) -> Tensor:
        """What each place's penalty falls on: the row's own tokens, and the drafts before the place."""
        seen_NV = torch.zeros(self.logits_NV.shape, dtype=torch.bool, device=self.device)
        for start, ask, drafts in zip(self.starts, self.asks, self.drafts, strict=True):
            if ask.settings.repetition_penalty == 1:
                continue
            if ask.seen is None:
                raise ValueError("a row with a repetition penalty comes without the tokens it has seen")
            end = start + len(drafts) + 1
            seen_NV[start:end] = ask.seen[: seen_NV.shape[-1]]
            for ahead, token in enumerate(drafts, 1):
                seen_NV[start + ahead : end, token] = True
        return seen_NV

    def _narrowed(self, width: int) -> Tensor:
        """The logits of the ids that are spelled, -inf where a guide forbids one."""
        logits_NV = self.raw_NV[:, :width]
        places, masks = self._masks(width)
        if places:
            index = torch.tensor(places, device=self.device)
            allowed = torch.stack(masks).to(self.device)
            logits_NV = logits_NV.clone()
            logits_NV[index] = logits_NV[index].masked_fill(~allowed, -torch.inf)
        best_N = logits_NV.amax(-1).tolist()
        hopeless = [place for place, best in enumerate(best_N) if not math.isfinite(best)]
        if hopeless:
            logits_NV = logits_NV.clone()
            logits_NV[hopeless] = 0
            self._refuse(hopeless)
        return logits_NV

    def _masks(self, width: int) -> tuple[list[int], list[Tensor]]:
        """Places that a guide narrows, and their masks [V]. A draft that it forbids ends the look along that row: its
        place can not choose it, so none after it counts."""
        places, masks = [], []
        for row, (start, ask, drafts) in enumerate(zip(self.starts, self.asks, self.drafts, strict=True)):
            if ask.guide is None:
                continue
            guide = ask.guide.fork() if drafts else ask.guide
            for ahead in range(len(drafts) + 1):
                try:
                    mask = guide.allowed()
                except Refusal as refusal:
                    self.hopeless[row] = (ahead, refusal)
                    break
                if mask is not None:
                    places.append(start + ahead)
                    masks.append(widened(mask, width))
                if ahead == len(drafts) or (mask is not None and not masks[-1][drafts[ahead]]):
                    break
                guide.push(drafts[ahead])
        return places, masks

    def _refuse(self, hopeless: list[int]) -> None:
        """Notes the first of each row's places that has no choice: no id is allowed, or the model gave no numbers."""
        for row, (start, ask, drafts) in enumerate(zip(self.starts, self.asks, self.drafts, strict=True)):
            own = [place for place in hopeless if start <= place <= start + len(drafts)]
            if not own or (row in self.hopeless and self.hopeless[row][0] <= own[0] - start):
                continue
            if bool(self.raw_NV[own[0]].amax().isfinite()):
                refusal = Refusal(
                    f"no token that the row's rules allow after {ask.place + own[0] - start} of its own",
                    "rules that this tokenizer can spell, and that do not contradict one another",
                    "loosen the constraint, or give fewer at once",
                )
            else:
                refusal = Refusal(
                    "logits that are no numbers", "a model with finite weights", "take an earlier checkpoint"
                )
            self.hopeless[row] = (own[0] - start, refusal)

    @cached_property
    def law_NV(self) -> Tensor:
        """The sampling law of every place, in at least fp32."""
        return self.law.probabilities(self.logits_NV, self.seen_NV)

    def draws(self) -> list[int]:
        """The row's own choice at every place: the likeliest, or a draw with its own numbers."""
        if self.law.all_greedy:
            return self.law.scores(self.logits_NV, self.seen_NV).argmax(-1).tolist()
        numbers = [uniform(ask.key, ask.place + ahead) for ask in self.asks for ahead in range(len(ask.drafts) + 1)]
        return draw(self.law_NV, numbers).tolist()


def widened(mask_V: Tensor, width: int) -> Tensor:
    """`mask` as one of `width` ids, those past its end forbidden."""
    if mask_V.shape[0] >= width:
        return mask_V[:width]
    return torch.cat([mask_V, mask_V.new_zeros(width - mask_V.shape[0])])


def starts_of(drafts: Sequence[Sequence[int]]) -> list[int]:
    """The first place of each row."""
    return [0, *accumulate(len(own) + 1 for own in drafts)][: len(drafts)]


def coupled(
    draws: list[int], starts: Sequence[int], drafts_of: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[int]]:
    """Tokens and accepted counts of each row, a draft standing while it is what the row draws at its place."""
    tokens, accepted = [], []
    for start, drafts in zip(starts, drafts_of, strict=True):
        own = draws[start : start + len(drafts) + 1]
        count = 0
        while count < len(drafts) and own[count] == drafts[count]:
            count += 1
        tokens.append(own[: count + 1])
        accepted.append(count)
    return tokens, accepted


def rejection(places: Places) -> tuple[list[list[int]], list[int]]:
    """Tokens and accepted counts of each row by the rejection rule, drafts drawn from `ask.law`."""
    accepted = standing(places)
    ends = [start + count for start, count in zip(places.starts, accepted, strict=True)]
    laws_SV = places.law_NV[torch.tensor(ends, device=places.device)].double()
    fallen = [row for row, drafts in enumerate(places.drafts) if accepted[row] < len(drafts)]
    if fallen:
        q_FV = torch.zeros(len(fallen), laws_SV.shape[-1], dtype=laws_SV.dtype, device=places.device)
        for place, row in enumerate(fallen):
            ask, count = places.asks[row], accepted[row]
            if ask.law is None:
                q_FV[place, places.drafts[row][count]] = 1
            else:
                q_FV[place] = ask.law[count]
        index_F = torch.tensor(fallen, device=places.device)
        laws_SV[index_F] = remainder(laws_SV[index_F], q_FV)
    numbers = [
        uniform(ask.key, ask.place + count + (REPLACE if count < len(drafts) else 0))
        for ask, drafts, count in zip(places.asks, places.drafts, accepted, strict=True)
    ]
    more = draw(laws_SV, numbers).tolist()
    tokens = [[*drafts[:count], token] for drafts, count, token in zip(places.drafts, accepted, more, strict=True)]
    return tokens, accepted


def remainder(p_FV: Tensor, q_FV: Tensor) -> Tensor:
    """(p - q)+, not normalised: where the mass lies that drafts from q leave out."""
    rest_FV = (p_FV - q_FV).clamp(min=0)
    # Nothing is left only where p = q but for rounding; then p is what there is to draw from.
    return torch.where(rest_FV.sum(-1, keepdim=True) > 0, rest_FV, p_FV)


def standing(places: Places) -> list[int]:
    """How many of each row's drafts stand: those before the first that falls."""
    index = [start + ahead for start, drafts in zip(places.starts, places.drafts) for ahead in range(len(drafts))]
    p = places.law_NV[index, [token for drafts in places.drafts for token in drafts]].tolist()
    counts, first = [], 0
    for ask, drafts in zip(places.asks, places.drafts, strict=True):
        k, count = len(drafts), 0
        own = p[first : first + k]
        q = [1.0] * k if ask.law is None else ask.law[range(k), drafts].tolist()
        while count < k and uniform(ask.key, ACCEPT + ask.place + count) * q[count] < own[count]:
            count += 1
        counts.append(count)
        first += k
    return counts


def with_logprobs(places: Places, choices: list[Choice]) -> list[Choice]:
    """The choices, with log-probabilities for the rows that ask for them."""
    asking = [row for row, ask in enumerate(places.asks) if (ask.settings.logprobs or ask.top) and choices[row].tokens]
    if not asking:
        return choices
    index = [places.starts[row] + ahead for row in asking for ahead in range(len(choices[row].tokens))]
    at_M = torch.tensor(index, device=places.device)
    chosen_M1 = torch.tensor([token for row in asking for token in choices[row].tokens], device=places.device)[:, None]
    model_MV = at_least_fp32(places.raw_NV[at_M]).log_softmax(-1)
    model_M = model_MV.gather(1, chosen_M1)[:, 0].tolist()
    law_M = places.law_NV[at_M].gather(1, chosen_M1)[:, 0].log().tolist()
    best = model_MV.topk(min(max(places.asks[row].top for row in asking), model_MV.shape[-1]))
    best_ids, best_values = best.indices.tolist(), best.values.tolist()
    start = 0
    for row in asking:
        ask, said = places.asks[row], choices[row]
        own = range(start, start + len(said.tokens))
        start = own.stop
        top = [list(zip(best_ids[m][: ask.top], best_values[m][: ask.top], strict=True)) for m in own]
        model, law = [model_M[m] for m in own], [law_M[m] for m in own]
        choices[row] = replace(said, logprobs=model, law_logprobs=law, top=top if ask.top else None)
    return choices
