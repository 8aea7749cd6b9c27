"""What a model's inner vectors still know of the order of what came before: anisotropy-calibrated cosine similarity.

A fixed suffix y is read twice, after a prefix x and after the same prefix shuffled, πx (same tokens, other order). For
layer l and place i of the suffix

    self_l(i) = E cos(h_l(y_i | x y), h_l(y_i | πx y))          1: the order of the prefix left no trace
    aniso_l   = E cos(h_l, h'_l) over suffix tokens of different sequences
    ACCS_l(i) = self_l(i) - aniso_l

A low ACCS is a vector that depends on its distant context. Calibration matters because all vectors of a layer may lean
one way, which raises every cosine. `scaled` is (self - aniso) / (1 - aniso): 1 where order leaves no trace, whatever
the lean. (Method as third-party notes describe it; no official code is known. What the measure cannot see: a layer that
only averages its prefix does not notice a shuffle.)

Choices: h_l is the residual stream after block l, layer 0 the embedding (context-free, so self is 1), no final norm.
Tokens that begin every text (bos) stay where they are. Cosines and sums are fp64, on the vectors as the model gives
them; the anisotropy is exact over all pairs, (|Σ u|² - Σ_n |Σ_i u_ni|²) / (S² N (N - 1)), with unit vectors u.

Legend: N sequences, P prefix lengths, L layers (the embedding first), S suffix places, T tokens, D channels,
K shuffles, X tokens of a prefix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimaran.errors import Refusal
from trimaran.model.hybrid import HybridModel


@dataclass(frozen=True)
class Similarity:
    """self_PNLS: mean over shuffles; aniso_PL; both fp64, of one population of sequences."""

    lengths: tuple[int, ...]
    self_PNLS: Tensor
    aniso_PL: Tensor

    @property
    def accs_PL(self) -> Tensor:
        """Mean over sequences and suffix places."""
        return self.self_PNLS.mean((1, 3)) - self.aniso_PL

    @property
    def scaled_PL(self) -> Tensor:
        """ACCS as a share of what an untouched vector would have; 1 for a layer whose vectors are all one direction."""
        room_PL = 1 - self.aniso_PL
        return torch.where(room_PL > 0, self.accs_PL / room_PL, 1.0)

    @property
    def accs_PNL(self) -> Tensor:
        """Each sequence's own."""
        return self.self_PNLS.mean(3) - self.aniso_PL[:, None]


@torch.no_grad()
def streams(model: HybridModel, tokens_BT: Tensor, places: int) -> Tensor:
    """The residual stream of the last `places` tokens: [L, B, S, D], the embedding first, then after every block."""
    found: list[Tensor] = []

    def note(_module: object, _inputs: object, output: Tensor) -> None:
        found.append(output[:, -places:])

    modules = [model.backbone.embeddings, *model.backbone.layers]
    handles = [module.register_forward_hook(note) for module in modules]
    try:
        model.hidden(tokens_BT)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found)


def layer_names(model: HybridModel) -> list[str]:
    """What the layers of `streams` are called: "0 embedding", "1 M", "2 *", …"""
    return ["0 embedding", *(f"{place} {letter}" for place, letter in enumerate(model.config.pattern, 1))]


def unit(h: Tensor) -> Tensor:
    """Vectors of length 1 along the last axis, fp64."""
    return torch.nn.functional.normalize(h.double(), dim=-1)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Along the last axis, fp64; exactly equal vectors have 1."""
    same = (one == other).all(-1)
    return torch.where(same, 1.0, (unit(one) * unit(other)).sum(-1))


def anisotropy(sums_ND: Tensor, tokens: int) -> Tensor:
    """Mean cosine over all pairs of tokens from different sequences. sums_ND [..., N, D]: each sequence's sum of
    `tokens` unit vectors."""
    count = sums_ND.shape[-2]
    whole = sums_ND.sum(-2).square().sum(-1)
    own = sums_ND.square().sum((-2, -1))
    return (whole - own) / (tokens**2 * count * (count - 1))


def reordered(tokens_BT: Tensor, first: int, order_BK: Tensor) -> Tensor:
    """Each row with the K tokens from `first` on in the order given."""
    middle_BK = tokens_BT[:, first : first + order_BK.shape[1]].gather(1, order_BK)
    return torch.cat([tokens_BT[:, :first], middle_BK, tokens_BT[:, first + order_BK.shape[1] :]], 1)


def measure(
    model: HybridModel,
    tokens_NT: Tensor,
    lengths: Sequence[int],
    suffix: int,
    *,
    lead: Sequence[int] = (),
    shuffles: int = 1,
    seed: int = 0,
    rows: int = 8,
    tell: Callable[[int], None] = lambda tokens: None,
) -> Similarity:
    """Reads every sequence with each of the prefix `lengths` before its last `suffix` tokens, as it is and shuffled.

    tokens_NT (int64, on the CPU): N sequences of different documents, max(lengths) + suffix tokens or more; lead: ids
    before every prefix; shuffles: orders tried per sequence and length; rows: sequences of one pass; tell: called with
    the tokens of each pass. The orders depend on `seed`, N and the length alone, so that two models see the same ones.
    Raises Refusal for fewer than two sequences, and for sequences that are too short.
    """
    count, stored = tokens_NT.shape
    if count < 2 or stored < max(lengths) + suffix:
        found = f"{count} sequences of {stored} tokens"
        allowed = f"at least 2 of {max(lengths) + suffix}, the longest prefix and the suffix"
        raise Refusal(found, allowed, "give more or longer texts, or shorter lengths")
    alike, aniso = [], []
    for length in lengths:
        own, sums = [], []
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randperm(length, generator=generator) for _ in range(shuffles * count)]
        order_KNX = torch.stack(drawn).view(shuffles, count, length)
        for start in range(0, count, rows):
            piece_BT = tokens_NT[start : start + rows, stored - suffix - length :]
            before_BT = torch.tensor(lead, dtype=torch.long).repeat(len(piece_BT), 1)
            text_BT = torch.cat([before_BT, piece_BT], 1)
            here = streams(model, text_BT.to(model.device), suffix)
            similar = torch.zeros(here.shape[:3], dtype=torch.float64)
            for order_NX in order_KNX:
                other_BT = reordered(text_BT, len(lead), order_NX[start : start + rows])
                there = streams(model, other_BT.to(model.device), suffix)
                similar += cosine(here, there).cpu() / shuffles
            own.append(similar.transpose(0, 1))
            sums.append(unit(here).sum(2).cpu())
            tell(text_BT.numel() * (1 + shuffles))
        alike.append(torch.cat(own))
        aniso.append(anisotropy(torch.cat(sums, 1), suffix))
    return Similarity(tuple(lengths), torch.stack(alike), torch.stack(aniso))
