"""The GGUF container: metadata and tensors of one file, read without trusting a number in it.

    magic "GGUF", version u32, tensors u64, pairs u64                    (little-endian; versions 2 and 3 agree)
    pair     key string, type u32, value;  string = length u64 + UTF-8;  array = type u32 + count u64 + values
    tensor   name string, dimensions u32, sizes u64 each (fastest first), type u32, offset u64 into the data
    data     from the next multiple of `general.alignment` (32) on

Every count is compared with the bytes that are left before anything is made of it, so a damaged file is refused after
at most one walk over its header; the data are mapped, never read whole.
"""

import mmap
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from trimaran.errors import Refusal
from trimaran.model.dequantize import FORMATS, dequantize

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct's codes
U32, U64 = "I", "Q"
STRING, ARRAY = 8, 9
LEAST = {STRING: 8, ARRAY: 12}  # bytes that the shortest value takes
LEAST_PAIR, LEAST_TENSOR = 13, 32  # with an empty key; with an empty name and one size
NESTED, DIMENSIONS = 4, 4  # arrays in arrays, sizes of a tensor: more do not occur


@dataclass(frozen=True)
class Stored:
    """A tensor's place in the file. shape: slowest first, as everywhere else; offset: from the start of the file."""

    kind: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GGUF:
    """An open GGUF file: `metadata` (text, numbers, lists; numeric arrays as numpy), `tensors` by name.

    Raises Refusal for a file that is no GGUF, damaged, truncated, or that holds a type of values we do not know.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_file():
            raise Refusal(f"no file {self.path}", "a GGUF file", "check the path")
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(4) != MAGIC:
                step = "a hub folder needs no import: open it as it is"
                raise Refusal(f"{self.path} does not begin with {MAGIC.decode()}", "a GGUF file", step)
            self.bytes = memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
        reader = Reader(self.bytes, self.damaged)
        version = reader.number(U32)
        if version not in VERSIONS:
            found = f"{self.path} is GGUF version {version}"
            raise Refusal(found, "2 or 3, little-endian", "write it again with llama.cpp's newer tools")
        tensors, pairs = reader.number(U64), reader.number(U64)
        reader.expect(tensors * LEAST_TENSOR + pairs * LEAST_PAIR, f"{tensors} tensors and {pairs} pairs")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            self.add(self.metadata, reader.text(), reader.value(reader.number(U32)))
        self.tensors: dict[str, Stored] = {}
        stored = [(reader.text(), self.read_stored(reader)) for _ in range(tensors)]
        start = self.data_start(reader.place)
        for name, tensor in stored:
            placed = Stored(tensor.kind, tensor.shape, start + tensor.offset, tensor.nbytes)
            if placed.offset + placed.nbytes > size:
                raise self.damaged(f"{name} ends at byte {placed.offset + placed.nbytes:,} of {size:,}")
            self.add(self.tensors, name, placed)

    def damaged(self, why: str) -> Refusal:
        return Refusal(f"{self.path} is damaged or truncated: {why}", "a whole GGUF file", "fetch it again")

    def add(self, table: dict[str, Any], name: str, value: Any) -> None:
        if name in table:
            raise self.damaged(f"{name!r} occurs twice")
        table[name] = value

    def read_stored(self, reader: "Reader") -> Stored:
        """One row of the list of tensors, its offset still relative."""
        dimensions = reader.number(U32)
        if not 1 <= dimensions <= DIMENSIONS:
            raise self.damaged(f"a tensor with {dimensions} dimensions")
        shape = tuple(reader.number(U64) for _ in range(dimensions))[::-1]
        kind, offset = reader.number(U32), reader.number(U64)
        if not all(shape):
            raise self.damaged(f"a tensor of shape {list(shape)}")
        block = FORMATS.get(kind)
        if block is None:
            return Stored(kind, shape, offset, 0)  # refused by name, if it is ever asked for
        if shape[-1] % block.elements:
            raise self.damaged(f"a row of {shape[-1]} numbers in {block.name}, blocks of {block.elements}")
        return Stored(kind, shape, offset, prod(shape) // block.elements * block.nbytes)

    def data_start(self, header: int) -> int:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise self.damaged(f"general.alignment = {alignment!r}")
        return -(-header // alignment) * alignment

    def formats(self) -> dict[str, int]:
        """How many tensors are stored in each format."""
        return dict(Counter(format_name(tensor.kind) for tensor in self.tensors.values()).most_common())

    def check_formats(self, names: Iterable[str]) -> None:
        """Refuses tensors in a format that we do not decode."""
        for name in names:
            if self.tensors[name].kind not in FORMATS:
                known = ", ".join(block.name for block in FORMATS.values())
                step = "quantize the model to one of these with llama.cpp"
                raise Refusal(f"{name} is stored as {format_name(self.tensors[name].kind)}", known, step)

    def read(self, name: str) -> np.ndarray:
        """A tensor's values, fp32 (fp64 where stored so). Raises Refusal for a format that we do not decode."""
        self.check_formats([name])
        stored = self.tensors[name]
        raw = np.frombuffer(self.bytes, np.uint8, stored.nbytes, stored.offset)
        return dequantize(stored.kind, raw).reshape(stored.shape)


def format_name(kind: int) -> str:
    return FORMATS[kind].name if kind in FORMATS else f"type {kind}"


class Reader:
    """Walks over the header; `damaged` makes the refusal."""

    def __init__(self, data: memoryview, damaged: Callable[[str], Refusal]):
        self.data, self.damaged, self.place = data, damaged, len(MAGIC)

    def expect(self, count: int, what: str) -> None:
        """Refuses when fewer than `count` bytes are left."""
        if count > len(self.data) - self.place:
            raise self.damaged(f"{what} at byte {self.place:,} of {len(self.data):,}")

    def take(self, count: int, what: str) -> memoryview:
        self.expect(count, what)
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), "a number"))[0]

    def text(self) -> str:
        length = self.number(U64)
        try:
            return str(self.take(length, f"a text of {length:,} bytes"), "utf-8")
        except UnicodeDecodeError as problem:
            raise self.damaged(f"a text that is not UTF-8 ({problem})") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array(depth)
        return self.number(self.code(kind))

    def code(self, kind: int) -> str:
        if kind not in SCALARS:
            raise self.damaged(f"a value of type {kind} before byte {self.place:,}")
        return SCALARS[kind]

    def array(self, depth: int) -> Any:
        kind, count = self.number(U32), self.number(U64)
        if kind not in LEAST:
            form = np.dtype("<" + self.code(kind))
            return np.frombuffer(self.take(count * form.itemsize, f"an array of {count:,}"), form)
        if depth == NESTED:
            raise self.damaged(f"arrays in arrays, more than {NESTED} deep")
        self.expect(count * LEAST[kind], f"an array of {count:,}")
        return [self.value(kind, depth + 1) for _ in range(count)]
