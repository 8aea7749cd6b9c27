"""The sequences that a representation analysis reads, and how compressible they are.

    text       windows of documents, each from another one while there are enough
    periodic   a random pattern of tokens, repeated
    noise      tokens drawn one by one

Pattern and noise take their tokens from the very windows of `text`, so the three differ in order, not in words.
"""

import lzma
import random
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Literal

import numpy as np

from trimaran.errors import Refusal
from trimaran.text.tokenizer import Tokenizer

Source = Literal["text", "periodic", "noise"]
PRESET, SMALLEST_WINDOW = 9 | lzma.PRESET_EXTREME, 4096


def windows(texts: Iterable[str], tokenizer: Tokenizer, count: int, length: int, seed: int) -> np.ndarray:
    """[count, length] int64: pieces of `length` tokens, one of each document in a random order, then further ones of
    the same documents. Raises Refusal when the texts are too short."""
    order = [text for text in texts if len(text.encode()) >= length]
    chance = random.Random(seed)
    chance.shuffle(order)
    first: list[list[int]] = []
    later: list[list[list[int]]] = []
    for text in order:
        ids = tokenizer.encode(text)
        pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        if pieces:
            first.append(pieces.pop(chance.randrange(len(pieces))))
            later.append(pieces)
        if len(first) == count:
            return np.array(first, dtype=np.int64)
    rounds = zip_longest(*later)
    more = [piece for turn in rounds for piece in turn if piece is not None]
    if len(first) + len(more) < count:
        found = f"{len(first) + len(more)} pieces of {length} tokens in the texts"
        raise Refusal(found, f"{count} (samples)", "give more text, fewer samples or shorter lengths")
    return np.array([*first, *more[: count - len(first)]], dtype=np.int64)


def sequences(source: Source, text_NT: np.ndarray, period: int, seed: int) -> np.ndarray:
    """What `source` makes of the windows of text: [N, T]."""
    rng = np.random.default_rng(seed)
    count, length = text_NT.shape
    if source == "text":
        return text_NT
    if source == "noise":
        return rng.choice(text_NT.reshape(-1), (count, length))
    pattern_NK = rng.choice(text_NT.reshape(-1), (count, period))
    return np.tile(pattern_NK, (1, -(-length // period)))[:, :length]


def compressibility(data: bytes) -> float:
    """Bytes after LZMA as a share of those before (a bare LZMA2 stream, so that short texts pay for no container)."""
    window = max(SMALLEST_WINDOW, len(data))  # the preset's own 64 MiB take longer to allocate than all else
    how = [{"id": lzma.FILTER_LZMA2, "preset": PRESET, "dict_size": window}]
    return len(lzma.compress(data, lzma.FORMAT_RAW, filters=how)) / len(data)


def compressed_shares(tokenizer: Tokenizer, tokens_NT: np.ndarray, length: int, suffix: int) -> list[float]:
    """The compressibility of each sequence's prefix of `length` tokens."""
    stop = tokens_NT.shape[1] - suffix
    return [compressibility(text_bytes(tokenizer, row[stop - length : stop])) for row in tokens_NT.tolist()]


def text_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    return b"".join(tokenizer.token_bytes[identity] for identity in ids)
