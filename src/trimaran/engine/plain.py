"""Batch generation, readable before fast: the oracle that a faster engine is held against.

    prefill   the prompts, padded on the left, in blocks that carry the state; only the last place meets the head
    draft     the model's draft block (MTP) proposes k tokens per row from the newest hidden vector
    verify    one pass of the whole model over them; the sampler chooses after each as if there had been no draft,
              and a row's drafts count as long as they are what was chosen
    keep      each row keeps the tokens that count, the rest never happened; the choice after them comes for free

Without a draft (k = 0) a pass is one token per row and nothing is taken back. Since a choice depends on the law and
on (seed, sample, prompt, place) alone, drafting changes how many tokens a pass gives, never which, greedy or sampled.

Shapes: B rows still growing, K = k + 1 tokens per pass, T pairs that the draft block has not read, D width, V ids.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimaran.engine.choose import Ask, Choice, Places, choose
from trimaran.engine.guide import Guide
from trimaran.engine.row import Output, Row, open_rows
from trimaran.engine.sampler import Sampling
from trimaran.errors import Refusal
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import HybridModel
from trimaran.model.layout import PADDING
from trimaran.model.state import GROWTH, State
from trimaran.text.tokenizer import Tokenizer

BLOCK = 2048  # prompt tokens per row and pass: bounds the memory of a long prompt's activations
LONG = 8192  # a longer prompt is read in blocks half as large on a CPU; see `block_of`


@dataclass(frozen=True)
class Piece:
    """What one pass gave to row `row` (a place in `generate`'s list): tokens and settled text; `output` at its end."""

    row: int
    tokens: list[int]
    text: str
    output: Output | None


def generate(
    model: HybridModel,
    prompts: Sequence[Sequence[int]],
    settings: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 (frozen)
    *,
    tokenizer: Tokenizer | None = None,
    draft: int = 0,
    block: int | None = None,
    guides: Sequence[Callable[[], Guide] | None] | None = None,
) -> list[Output]:
    """Continues all prompts (token ids) as one batch; an output for each sample of each prompt, in that order.

    settings: for all prompts, or one per prompt. tokenizer: needed for text and stop strings; ids that it cannot spell
    are then never chosen. draft: tokens that the model's draft block proposes per pass. block: prompt tokens per pass
    (None: as `block_of` says). guides: for each prompt, what makes the guide of each of its samples.
    Raises `Refusal` for an empty prompt, ids outside the vocabulary, and a draft asked of a model without MTP.
    """
    pieces = stream(model, prompts, settings, tokenizer=tokenizer, draft=draft, block=block, guides=guides)
    ended = {piece.row: piece.output for piece in pieces if piece.output is not None}
    return [ended[row] for row in sorted(ended)]


@torch.no_grad()
def stream(
    model: HybridModel,
    prompts: Sequence[Sequence[int]],
    settings: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 (frozen)
    *,
    tokenizer: Tokenizer | None = None,
    draft: int = 0,
    block: int | None = None,
    guides: Sequence[Callable[[], Guide] | None] | None = None,
) -> Iterator[Piece]:
    """`generate`, a piece at a time: every pass yields one piece for each row that grew."""
    check_draft(draft, model.config)
    each = [settings] * len(prompts) if isinstance(settings, Sampling) else list(settings)
    rows = open_rows(model.config, prompts, each, tokenizer, guides)
    if not rows:
        return

    # prefill
    state, hidden_B1D = prefill(model, prompts, block, drafting=draft > 0)
    of_row = torch.tensor([row.output.prompt for row in rows], device=model.device)
    if len(rows) > len(prompts):
        state, hidden_B1D = state.fork(of_row), hidden_B1D[of_row]
    batch = Batch(model, rows, state, tokenizer, prompts)
    yield from batch.take(hidden_B1D, batch.nothing_drafted())

    while batch.rows:
        # No row can use more drafts than it has room for, less the token that verification adds.
        k = min(draft, max(row.room for row in batch.rows) - 1)

        # draft
        drafts_Bk = batch.draft(k) if k else batch.nothing_drafted()

        # verify
        if k:
            batch.state.mark()
        hidden_BKD = model.hidden(torch.cat([batch.newest_B1, drafts_Bk], 1), state=batch.state)

        # keep
        yield from batch.take(hidden_BKD, drafts_Bk)


def check_draft(draft: int, config: ModelConfig) -> None:
    """Refuses a number of drafts that a model of this configuration cannot make."""
    if draft < 0:
        raise Refusal(f"draft = {draft}", "0 or more tokens per pass", "set draft to an allowed value")
    if draft and not config.mtp_pattern:
        raise Refusal(f"draft = {draft}", "0, for this model has no draft block (MTP)", "leave draft out")


def block_of(longest: int, device: torch.device) -> int:
    """Prompt tokens per row and pass, where nobody says.

    Past LONG tokens a CPU takes half as many: what that leaves of activations makes room for the prompt's keys, so that
    32k tokens need little more memory than 2k do (docs/benchmarks.md has both figures, and what it costs in time).
    """
    return BLOCK // 2 if longest > LONG and device.type == "cpu" else BLOCK


def prefill(
    model: HybridModel, prompts: Sequence[Sequence[int]], block: int | None = None, drafting: bool = False
) -> tuple[State, Tensor]:
    """The state after all prompts, and the hidden vector of each one's last token [B, 1, D].

    block: prompt tokens per pass (None: as `block_of` says). When drafting, the draft block has read every pair (hidden
    vector, token after it) that lies within a prompt.
    """
    longest = max(map(len, prompts))
    block = block or block_of(longest, model.device)
    padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    tokens_BT = torch.tensor(padded, device=model.device)
    ids_BT = None
    if any(len(prompt) < longest for prompt in prompts):
        starts_B1 = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=model.device)
        ids_BT = torch.where(torch.arange(longest, device=model.device) < starts_B1, PADDING, 0)
    state = model.new_state(len(prompts), room=longest + GROWTH)
    for start in range(0, longest, block):
        part = slice(start, start + block)
        hidden_BTD = model.hidden(tokens_BT[:, part], None if ids_BT is None else ids_BT[:, part], state)
        next_BT = tokens_BT[:, start + 1 : start + 1 + block]
        pairs = next_BT.shape[1]
        if drafting and pairs:
            assert model.mtp is not None
            pair_ids_BT = None if ids_BT is None else ids_BT[:, start : start + pairs]
            model.mtp(hidden_BTD[:, :pairs], next_BT, pair_ids_BT, state.mtp)
    return state, hidden_BTD[:, -1:]


class Batch:
    """The rows that are still growing, and what the next pass starts from.

    newest_B1: each row's newest token, which the state has not read yet. unread_*: pairs (hidden vector of the whole
    model, token after it) that the draft block has not read yet; the last real one of each row is its newest.
    """

    def __init__(
        self,
        model: HybridModel,
        rows: list[Row],
        state: State,
        tokenizer: Tokenizer | None,
        prompts: Sequence[Sequence[int]],
    ):
        self.model, self.rows, self.state = model, rows, state
        self.spelled = model.config.vocab_size if tokenizer is None else tokenizer.vocab_size
        self.seen_BV: Tensor | None = None
        if any(row.settings.repetition_penalty != 1 for row in rows):
            self.seen_BV = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool, device=model.device)
            for place, row in enumerate(rows):
                self.seen_BV[place, torch.tensor(prompts[row.output.prompt], device=model.device)] = True
        self.newest_B1: Tensor
        self.unread_hidden_BTD: Tensor
        self.unread_tokens_BT: Tensor
        self.unread_B: Tensor

    def nothing_drafted(self) -> Tensor:
        return torch.empty(len(self.rows), 0, dtype=torch.long, device=self.model.device)

    def draft(self, k: int) -> Tensor:
        """k tokens per row [B, k], each as the row would draw it from the draft block's law, after those before it."""
        mtp, memory = self.model.mtp, self.state.mtp
        assert mtp is not None and memory is not None
        # What was kept is read with the whole model's hidden vectors, not with those that the drafting made up.
        places_T = torch.arange(self.unread_tokens_BT.shape[1], device=self.model.device)
        ids_BT = torch.where(places_T < self.unread_B[:, None], 0, PADDING)
        hidden_BTD = mtp(self.unread_hidden_BTD, self.unread_tokens_BT, ids_BT, memory)
        hidden_B1D = at_place(hidden_BTD, self.unread_B - 1)
        asks, drafts = self.asks(), list[Tensor]()
        memory.mark()
        for depth in range(k):
            if depth:
                hidden_B1D = mtp(hidden_B1D, drafts[-1], state=memory)
            tokens = Places(self.model.head(hidden_B1D)[:, 0], asks, self.spelled).draws()
            asks = [ask.after(token) for ask, token in zip(asks, tokens, strict=True)]
            drafts.append(torch.tensor(tokens, device=self.model.device)[:, None])
        memory.keep(0)
        return torch.cat(drafts, 1)

    def asks(self, drafts: Sequence[Sequence[int]] | None = None) -> list[Ask]:
        """What the rows' next choices depend on, with logits after each of their drafts."""
        return [
            row.ask(None if self.seen_BV is None else self.seen_BV[place], () if drafts is None else drafts[place])
            for place, row in enumerate(self.rows)
        ]

    def take(self, hidden_BKD: Tensor, drafts_Bk: Tensor) -> list[Piece]:
        """Chooses after each token just read, keeps what stands, lets finished rows leave; a piece per row."""
        logits_NV = self.model.head(hidden_BKD).flatten(0, 1)
        choices = choose(logits_NV, self.asks(drafts_Bk.tolist()), self.spelled)
        k, device = drafts_Bk.shape[1], self.model.device
        pieces = [self.push(place, choice, k) for place, choice in enumerate(choices)]
        self.unread_B = torch.tensor([len(choice.tokens) for choice in choices], device=device)
        if k:
            self.state.keep(self.unread_B)
        said = [choice.tokens + [0] * (k + 1 - len(choice.tokens)) for choice in choices]
        self.unread_hidden_BTD, self.unread_tokens_BT = hidden_BKD, torch.tensor(said, device=device)
        self.newest_B1 = self.unread_tokens_BT.gather(1, self.unread_B[:, None] - 1)
        self.leave()
        return pieces

    def push(self, place: int, choice: Choice, k: int) -> Piece:
        """Hands a row its tokens, until it ends: an end token or stop string may stand inside the accepted run."""
        row, tokens, text = self.rows[place], [], ""
        output = row.output
        output.passes += 1
        output.drafted += min(k, row.room)
        for ahead, token in enumerate(choice.tokens):
            tokens.append(token)
            text += row.push(token, choice.logprobs_at(ahead))
            if output.finish is not None:
                break
        if choice.refusal is not None and output.finish is None:
            raise choice.refusal
        output.accepted += min(len(tokens), choice.accepted)
        if self.seen_BV is not None:
            self.seen_BV[place, tokens] = True
        return Piece(row.number, tokens, text, output if output.finish is not None else None)

    def leave(self) -> None:
        """Drops the rows that have ended; the rest go on as a smaller batch."""
        staying = [place for place, row in enumerate(self.rows) if row.output.finish is None]
        if len(staying) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in staying]
        if not self.rows:
            return
        index = torch.tensor(staying, device=self.model.device)
        self.state = self.state.fork(index)
        self.seen_BV = None if self.seen_BV is None else self.seen_BV[index]
        self.newest_B1, self.unread_B = self.newest_B1[index], self.unread_B[index]
        self.unread_hidden_BTD, self.unread_tokens_BT = self.unread_hidden_BTD[index], self.unread_tokens_BT[index]


def at_place(x_BTD: Tensor, place_B: Tensor) -> Tensor:
    """x[b, place[b]] for each row: [B, 1, D]."""
    return x_BTD.gather(1, place_B[:, None, None].expand(-1, 1, x_BTD.shape[-1]))
