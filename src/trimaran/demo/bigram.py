"""The yardstick of the first run: a bigram model of tokens, fitted on the very tokens that the hybrid learns from.

    P(b | a) = (count(a b) + k P(b)) / (count(a) + k)        P(b): add-one unigram

The one constant k is the one of a short list that suits the *held-out* text best, so the yardstick errs on the bigram's
side.
"""

import math

import numpy as np

from trimaran.data.shards import TokenShards

CONSTANTS = (1, 2, 5, 10, 20, 50, 100)


def counts(shards: TokenShards, vocab_size: int) -> np.ndarray:
    """How often token b follows token a within a document: [V, V], float64."""
    table = np.zeros((vocab_size, vocab_size))
    for place in range(len(shards)):
        document = shards.document(place)
        np.add.at(table, (document[:-1], document[1:]), 1)
    return table


def bits_per_byte(training: TokenShards, held_out: TokenShards, vocab_size: int) -> float:
    """Bits per byte of the held-out documents, every token after a document's first scored once."""
    follows_VV, asked_VV = counts(training, vocab_size), counts(held_out, vocab_size)
    unigram_V = follows_VV.sum(0) + 1
    unigram_V /= unigram_V.sum()
    before, after = asked_VV.nonzero()
    weight, seen = asked_VV[before, after], follows_VV[before, after]
    total = follows_VV.sum(1)[before]
    bits = [-(weight * np.log2((seen + k * unigram_V[after]) / (total + k))).sum() for k in CONSTANTS]
    return min(bits) / held_out.total_bytes if held_out.total_bytes else math.nan
