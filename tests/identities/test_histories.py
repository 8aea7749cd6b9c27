"""Any history a state can have (passes with and without documents, padding, trials taken back, rows forked) leaves each
row with the numbers of one plain pass over the tokens that counted."""

import pytest
import torch

from tests.models import tiny

BATCH, VOCABULARY = 3, 97
KINDS = ("mamba", "attention", "rope", "window", "latent", "everything")


class Diary:
    """What each row has read and what counts: (token, document number) pairs, and the last document id."""

    def __init__(self):
        self.read: list[tuple[int, int]] = []
        self.last = 0  # tokens that came without ids belong to document 0

    def copy(self) -> "Diary":
        other = Diary()
        other.read, other.last = list(self.read), self.last
        return other

    def add(self, token: int, document: int | None) -> None:
        number = self.read[-1][1] if self.read else 0
        if document is not None:
            number += bool(self.read) and document != self.last
            self.last = document
        self.read.append((token, number))


def random_pass(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens, and documents with padding anywhere, or none at all."""
    length = int(torch.randint(1, 6, (), generator=generator))
    tokens = torch.randint(VOCABULARY, (BATCH, length), generator=generator)
    if torch.rand((), generator=generator) < 0.4:
        return tokens, None
    ids = torch.randint(2, (BATCH, length), generator=generator).cummax(1).values * 5
    padding = torch.rand(BATCH, length, generator=generator) < 0.3
    return tokens, ids.masked_fill(padding, -1)


def note(diaries: list[Diary], tokens: torch.Tensor, ids: torch.Tensor | None, limits: list[int]) -> list[int]:
    """Writes a pass down, at most `limits` tokens a row; returns how many each row made."""
    made = []
    for row, diary in enumerate(diaries):
        real = [i for i in range(tokens.shape[1]) if ids is None or ids[row, i] >= 0]
        for place in real[: limits[row]]:
            diary.add(int(tokens[row, place]), None if ids is None else int(ids[row, place]))
        made.append(len(real))
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_any_history_equals_one_plain_pass(kind, seed):
    model, generator = tiny(kind), torch.Generator().manual_seed(seed)
    state, diaries = model.new_state(BATCH), [Diary() for _ in range(BATCH)]
    for _ in range(8):
        kind_of_step = int(torch.randint(4, (), generator=generator))
        if kind_of_step == 0:  # fork
            index = torch.randint(BATCH, (BATCH,), generator=generator)
            state, diaries = state.fork(index), [diaries[row].copy() for row in index.tolist()]
        elif kind_of_step == 1:  # plain
            tokens, ids = random_pass(generator)
            model(tokens, ids, state)
            note(diaries, tokens, ids, [99] * BATCH)
        else:  # a trial of one to three passes, of which a prefix stays
            passes = [random_pass(generator) for _ in range(int(torch.randint(1, 4, (), generator=generator)))]
            state.mark()
            for tokens, ids in passes:
                model(tokens, ids, state)
            made = [
                sum(t.shape[1] if i is None else int((i[row] >= 0).sum()) for t, i in passes) for row in range(BATCH)
            ]
            left = [int(torch.randint(count + 1, (), generator=generator)) for count in made]
            state.keep(torch.tensor(left))
            for tokens, ids in passes:
                left = [max(0, limit - n) for limit, n in zip(left, note(diaries, tokens, ids, left))]
        assert state.lengths_B.tolist() == [len(diary.read) for diary in diaries]
    probe = torch.randint(VOCABULARY, (BATCH, 3), generator=generator)
    logits = model(probe, state=state)
    for row, diary in enumerate(diaries):
        for token in probe[row].tolist():
            diary.add(token, None)
        tokens, documents = (torch.tensor([column]) for column in zip(*diary.read))
        torch.testing.assert_close(logits[row], model(tokens, documents)[0, -3:], rtol=1e-9, atol=1e-9)
