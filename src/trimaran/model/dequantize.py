"""The block formats of GGUF: bytes -> fp32, as ggml defines them.

A row is cut into blocks of 32 or 256 numbers; a block is a small record with its own scale. In the formulas q is a
stored integer, d and m are the block's scale and minimum (fp16), s and z those of a sub-block (six or eight bits).
Shape legend: N blocks, B bytes of a block; what comes out is [N, numbers of a block]. Products and sums are rounded in
the order in which ggml makes them, so that the numbers are the same to the last bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Decoder = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Block:
    """A format: how many numbers a block holds, in how many bytes, and how they are read."""

    name: str
    elements: int
    nbytes: int
    decode: Decoder


def dequantize(kind: int, raw: np.ndarray) -> np.ndarray:
    """raw: the bytes of whole blocks of the format numbered `kind` in `FORMATS`. Returns the flat numbers in fp32
    (fp64 for F64). A scale that is no number gives numbers that are none."""
    block = FORMATS[kind]
    with np.errstate(invalid="ignore"):
        return block.decode(raw.reshape(-1, block.nbytes)).reshape(-1)


def plain(form: str) -> Decoder:
    def decode(x_NB: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x_NB).view(form).astype(np.float64 if form == "<f8" else np.float32)

    return decode


def bf16(x_NB: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x_NB).view("<u2").astype(np.uint32) << 16).view(np.float32)


def half(x_NB: np.ndarray, place: int) -> np.ndarray:
    """The fp16 at byte `place` of each block, as fp32 [N, 1]."""
    return np.ascontiguousarray(x_NB[:, place : place + 2]).view("<f2").astype(np.float32)


def nibbles(x_NB: np.ndarray) -> np.ndarray:
    """All low halves of the bytes, then all high halves: [N, B] -> [N, 2 B]."""
    return np.concatenate([x_NB & 15, x_NB >> 4], axis=1)


def q8_0(x_NB: np.ndarray) -> np.ndarray:
    """d q: d, 32 signed bytes."""
    return x_NB[:, 2:].view(np.int8).astype(np.float32) * half(x_NB, 0)


def q4_0(x_NB: np.ndarray) -> np.ndarray:
    """d (q - 8): d, 16 bytes of nibbles."""
    return (nibbles(x_NB[:, 2:]).astype(np.float32) - 8) * half(x_NB, 0)


def q4_1(x_NB: np.ndarray) -> np.ndarray:
    """d q + m: d, m, 16 bytes of nibbles."""
    return nibbles(x_NB[:, 4:]).astype(np.float32) * half(x_NB, 0) + half(x_NB, 2)


def fifth_bits(x_NB: np.ndarray, place: int) -> np.ndarray:
    """The 32 bits from byte `place`, the lowest first, as 16 or 0: [N, 32]."""
    return np.unpackbits(x_NB[:, place : place + 4], axis=1, bitorder="little") << 4


def q5_0(x_NB: np.ndarray) -> np.ndarray:
    """d (q - 16): d, 4 bytes of fifth bits, 16 bytes of nibbles."""
    return ((nibbles(x_NB[:, 6:]) | fifth_bits(x_NB, 2)).astype(np.float32) - 16) * half(x_NB, 0)


def q5_1(x_NB: np.ndarray) -> np.ndarray:
    """d q + m: d, m, 4 bytes of fifth bits, 16 bytes of nibbles."""
    return (nibbles(x_NB[:, 8:]) | fifth_bits(x_NB, 4)).astype(np.float32) * half(x_NB, 0) + half(x_NB, 2)


def scales_of_eight(x_NB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """s and z of the eight sub-blocks, from 12 bytes: six bits each, the last four pairs' upper two bits in the upper
    bits of the first four pairs. Both [N, 8], in fp32."""
    first_N4, second_N4, third_N4 = x_NB[:, 4:8], x_NB[:, 8:12], x_NB[:, 12:16]
    s_N8 = np.concatenate([first_N4 & 63, (third_N4 & 15) | (first_N4 >> 6 << 4)], axis=1)
    z_N8 = np.concatenate([second_N4 & 63, (third_N4 >> 4) | (second_N4 >> 6 << 4)], axis=1)
    return s_N8.astype(np.float32), z_N8.astype(np.float32)


def pairs_of_nibbles(x_NB: np.ndarray) -> np.ndarray:
    """128 bytes as four times 32 low halves, then 32 high halves: [N, 8, 32]."""
    q_N4B = x_NB.reshape(-1, 4, 32)
    return np.stack([q_N4B & 15, q_N4B >> 4], axis=2).reshape(-1, 8, 32)


def scaled(x_NB: np.ndarray, q_N8K: np.ndarray) -> np.ndarray:
    """(d s) q - (dmin z): the blocks of Q4_K and Q5_K, once their integers are known."""
    s_N8, z_N8 = scales_of_eight(x_NB)
    d_N8, m_N8 = half(x_NB, 0) * s_N8, half(x_NB, 2) * z_N8
    return d_N8[..., None] * q_N8K.astype(np.float32) - m_N8[..., None]


def q4_k(x_NB: np.ndarray) -> np.ndarray:
    """d, dmin, 12 bytes of s and z, 128 bytes of nibbles."""
    return scaled(x_NB, pairs_of_nibbles(x_NB[:, 16:]))


def q5_k(x_NB: np.ndarray) -> np.ndarray:
    """d, dmin, 12 bytes of s and z, 32 bytes whose bit j is the fifth bit of sub-block j, 128 bytes of nibbles."""
    fifth_N8K = x_NB[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return scaled(x_NB, pairs_of_nibbles(x_NB[:, 48:]) | fifth_N8K << 4)


def q6_k(x_NB: np.ndarray) -> np.ndarray:
    """(d s) (q - 32): 128 bytes of nibbles, 64 bytes of upper two bits, 16 signed bytes s (one for 16 numbers), d."""
    low_N2B = x_NB[:, :128].reshape(-1, 2, 64)
    low_NH4K = np.concatenate([low_N2B & 15, low_N2B >> 4], axis=2).reshape(-1, 2, 4, 32)
    shift = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    high_NH4K = x_NB[:, 128:192].reshape(-1, 2, 1, 32) >> shift & 3
    q_NSK = (low_NH4K | high_NH4K << 4).reshape(-1, 16, 16).astype(np.float32) - 32
    d_NS = half(x_NB, 208) * x_NB[:, 192:208].view(np.int8).astype(np.float32)
    return d_NS[..., None] * q_NSK


FORMATS: dict[int, Block] = {
    0: Block("F32", 1, 4, plain("<f4")),
    1: Block("F16", 1, 2, plain("<f2")),
    2: Block("Q4_0", 32, 18, q4_0),
    3: Block("Q4_1", 32, 20, q4_1),
    6: Block("Q5_0", 32, 22, q5_0),
    7: Block("Q5_1", 32, 24, q5_1),
    8: Block("Q8_0", 32, 34, q8_0),
    12: Block("Q4_K", 256, 144, q4_k),
    13: Block("Q5_K", 256, 176, q5_k),
    14: Block("Q6_K", 256, 210, q6_k),
    28: Block("F64", 1, 8, plain("<f8")),
    30: Block("BF16", 1, 2, bf16),
}
