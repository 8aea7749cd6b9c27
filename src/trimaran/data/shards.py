"""Tokens on disk: memory-mapped shards, written once and read in place.

A folder holds `tokens-00000.bin`, … (uint16 where the vocabulary allows, else uint32), `documents.bin` (uint64, two a
document: where it ends, in tokens from the start, and the bytes of text that its tokens after the first stand for) and
`index.json`. Those bytes are the whole text where a document begins with bos; without one, its first token is never
predicted, so its bytes must not count where bits per byte are reported.

A document is bos (where the tokenizer has one), its text, eos: bos so that the first word is predicted from something,
eos because every document of this project ends so.
"""

import errno
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trimaran.data.corpora import Document, Documents
from trimaran.disk import sync
from trimaran.errors import Refusal
from trimaran.text.tokenizer import Tokenizer

FORMAT = 1
SHARD_TOKENS = 1 << 28
BATCH_BYTES = 1 << 23  # text handed to the tokenizer at a time, enough to keep its threads busy
PIECE = 1 << 18  # a longer document is encoded in pieces of about this many characters


class TokenShards:
    """Encoded documents, memory-mapped. `shards.document(i)` is an array of token ids; `tokens(start, stop)` any span.

    Opening checks sizes and, unless `verify=False`, checksums (about a second per GB).
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = True):
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.vocab_size: int = self.index["vocab_size"]
        self.total_tokens: int = self.index["tokens"]
        self.total_bytes: int = self.index["bytes"]
        self.files = [self.map(entry, verify) for entry in self.index["files"]]
        self.file_starts = np.cumsum([0, *(len(file) for file in self.files)])
        table = self.map(self.index["documents"], verify).reshape(-1, 2).astype(np.int64)
        self.starts = np.concatenate([np.zeros(1, np.int64), table[:, 0]])  # [documents + 1], in tokens
        self.document_bytes = table[:, 1]

    def map(self, entry: dict[str, Any], verify: bool) -> np.ndarray:
        path = self.folder / entry["name"]
        expected = entry["count"] * np.dtype(entry["dtype"]).itemsize
        found = path.stat().st_size if path.exists() else -1
        if found != expected:
            state = f"{found} bytes" if found >= 0 else "missing"
            raise Refusal(f"{path} is {state}", f"{expected} bytes", f"delete {str(self.folder)!r} and encode again")
        if verify and checksum(path) != entry["crc32"]:
            raise Refusal(
                f"{path} is corrupt (checksum)", "as written", f"delete {str(self.folder)!r} and encode again"
            )
        return np.memmap(path, dtype=entry["dtype"], mode="r") if expected else np.empty(0, entry["dtype"])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def document(self, place: int) -> np.ndarray:
        """Token ids of one document, int64, eos included."""
        return self.tokens(int(self.starts[place]), int(self.starts[place + 1]))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids from `start` to `stop`, counted over all documents; int64."""
        first = int(np.searchsorted(self.file_starts, start, side="right")) - 1
        pieces = []
        while start < stop:
            offset = start - int(self.file_starts[first])
            piece = self.files[first][offset : offset + stop - start]
            pieces.append(piece.astype(np.int64))
            start += len(piece)
            first += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, np.int64)])


def write(
    corpus: Documents,
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    *,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenShards:
    """Encodes `corpus` into `folder`, or opens it where the same text was encoded with the same tokenizer before.

    The folder appears whole or not at all. One that holds other text or another tokenizer's tokens is refused.
    """
    folder = Path(folder)
    origin = {"tokenizer": tokenizer.digest, "corpus": corpus.digest}
    if folder.exists():
        shards = TokenShards(folder)
        for name, digest in origin.items():
            if shards.index["origin"][name] != digest:
                found = f"{str(folder)!r} was encoded from another {name} ({shards.index['origin'][name][:12]})"
                raise Refusal(found, f"{name} {digest[:12]}", "delete the folder, or name another one")
        return shards
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        index = write_files(corpus, tokenizer, partial, shard_tokens) | {"origin": origin}
        (partial / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for path in partial.iterdir():
            sync(path)
        partial.chmod(0o755)
        partial.rename(folder)
        sync(folder.parent)
    except OSError as problem:
        if problem.errno != errno.ENOSPC:
            raise
        raise Refusal(f"no space left for {str(folder)!r}", "room for 2 to 4 bytes a token", "free some disk") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already when all went well
    return TokenShards(folder, verify=False)


def write_files(corpus: Documents, tokenizer: Tokenizer, folder: Path, shard_tokens: int) -> dict[str, Any]:
    """The .bin files, and all of the index but its origin."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    table: list[tuple[int, int]] = []
    total = size = 0
    files: list[dict[str, Any]] = []
    file = None
    for ids, length in encoded(corpus.documents(), tokenizer):
        tokens = np.array(ids, dtype=dtype)
        if file is None or files[-1]["count"] >= shard_tokens:
            if file is not None:
                file.close()
            files.append({"name": f"tokens-{len(files):05d}.bin", "dtype": dtype, "count": 0})
            file = (folder / files[-1]["name"]).open("wb")
        file.write(tokens.tobytes())
        files[-1]["count"] += len(tokens)
        total, size = total + len(tokens), size + length
        table.append((total, length))
    if file is None:
        raise Refusal("no documents to encode", "at least one text that is not empty", "check data.path")
    file.close()
    np.array(table, dtype="uint64").tofile(folder / "documents.bin")
    documents = {"name": "documents.bin", "dtype": "uint64", "count": 2 * len(table)}
    for entry in [*files, documents]:
        entry["crc32"] = checksum(folder / str(entry["name"]))
    counts = {"tokens": total, "bytes": size, "vocab_size": tokenizer.vocab_size}
    return {"format": FORMAT, **counts, "files": files, "documents": documents}


def encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    """(token ids with bos and eos, bytes of text after the first token) of each document, encoded many at a time."""
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for group in grouped(documents):
        cut = [pieces_of(document.text) for document in group]
        ids = iter(tokenizer.encode_batch([piece for pieces in cut for piece in pieces]))
        for document, pieces in zip(group, cut, strict=True):
            inner = [identity for _ in pieces for identity in next(ids)]
            whole = [*before, *inner, tokenizer.eos_id]
            yield whole, len(document.text.encode()) - int(tokenizer.byte_lengths[whole[0]])


def grouped(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of about `BATCH_BYTES` characters."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def pieces_of(text: str) -> list[str]:
    """`text` in pieces that encode to the same ids as the whole: cut only between a line end and a sign that is not
    white space, where every byte-level splitter has a border anyway."""
    pieces, start = [], 0
    while len(text) - start > PIECE:
        cut = text.find("\n", start + PIECE) + 1
        while 0 < cut < len(text) and text[cut].isspace():
            cut = text.find("\n", cut) + 1
        if not 0 < cut < len(text):
            break
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def read_index(folder: Path) -> dict[str, Any]:
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal(
            f"no index.json in {str(folder)!r}", "a folder of token shards", "encode the data first"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise Refusal(f"{path}: {problem}", "an index of token shards", "delete the folder and encode again") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise Refusal(f"{path} has format {found!r}", str(FORMAT), "delete the folder and encode again")
    missing = {"tokens", "bytes", "vocab_size", "files", "documents", "origin"} - index.keys()
    if missing:
        raise Refusal(f"{path} lacks {', '.join(sorted(missing))}", "as written", "delete the folder and encode again")
    return index


def checksum(path: Path) -> int:
    """CRC-32 of a file, read in blocks."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
