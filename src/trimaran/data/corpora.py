"""Corpora: named documents from files, each read when its turn comes.

A corpus is a list of files and a way to read each (`READERS`, by suffix). Its digest says which text it holds: equal
digests, equal documents in equal order. What could not be read is kept in `skipped` with the reason, never dropped
in silence.
"""

import codecs
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from trimaran.errors import Refusal, nearest_first

Pair = tuple[str, str]  # name, text


@dataclass(frozen=True)
class Document:
    """One text and where it comes from."""

    name: str
    text: str


class Documents(Protocol):
    """What can be encoded: documents in a fixed order, and a digest that says which."""

    @property
    def digest(self) -> str: ...
    def documents(self) -> Iterator[Document]: ...


@dataclass(frozen=True)
class Source:
    """One file of a corpus: its name there, and its path."""

    name: str
    path: Path


class Corpus:
    """Documents of `sources`, in their order. `field` names the text in JSONL rows and parquet columns."""

    def __init__(self, name: str, sources: list[Source], *, field: str = "text"):
        self.name, self.field = name, field
        self.sources: list[Source] = []
        self.skipped: list[tuple[str, str]] = []
        self.total_bytes = 0
        self.hashes: list[tuple[str, str]] = []
        for source in sources:
            self.survey(source)

    def survey(self, source: Source) -> None:
        """Hashes one file and finds out whether it is text, holding no more than a block of it in memory."""
        if not source.path.is_file():  # a pipe or a device would be read for ever
            self.skipped.append((source.name, "no regular file"))
            return
        try:
            sha, size, problem = inspect(source.path, is_text=source.path.suffix not in BINARY)
        except OSError as unreadable:
            self.skipped.append((source.name, f"unreadable ({unreadable.strerror})"))
            return
        if problem is not None:
            self.skipped.append((source.name, problem))
        elif size == 0:
            self.skipped.append((source.name, "empty"))
        else:
            self.sources.append(source)
            self.hashes.append((source.name, sha))
            self.total_bytes += size

    @cached_property
    def digest(self) -> str:
        """sha256 over the names and content hashes of all files, in order, and the field that is read from them."""
        return hashlib.sha256(json.dumps([self.field, self.hashes]).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        """The documents, one after the other. A text file is one document; a JSONL or parquet row is one."""
        for source in self.sources:
            reader = READERS.get(source.path.suffix, read_text)
            for name, text in reader(source, self.field):
                if text:
                    yield Document(name, text)

    def texts(self) -> Iterator[str]:
        return (document.text for document in self.documents())

    def __str__(self) -> str:
        line = f"{self.name}: {len(self.sources)} files, {self.total_bytes / 1e6:.2f} MB, digest {self.digest[:12]}"
        if self.skipped:
            name, reason = self.skipped[0]
            line += f"; skipped {len(self.skipped)} (first: {name}, {reason})"
        return line


# the standard library

NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "encodings", "idlelib"})
NOT_LIBRARY |= {"lib2to3", "pydoc_data"}
HELD_OUT = ("email", "http", "logging")


def stdlib_source(held_out: tuple[str, ...] = HELD_OUT, root: Path | None = None) -> tuple[Corpus, Corpus]:
    """The `.py` files that came with the running interpreter: (training corpus, held-out corpus).

    Left out: installed packages, test suites, `encodings`, `idlelib`, `lib2to3`, `pydoc_data`, and `_sysconfigdata`,
    which records how one machine built its interpreter. `held_out` names top-level packages or modules; all of each
    goes to the second corpus.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    sources = [source for source in walk(root, NOT_LIBRARY) if source.path.suffix == ".py"]
    sources = [source for source in sources if not source.name.startswith("_sysconfigdata")]
    if not sources:
        raise Refusal(f"no .py files in {str(root)!r}", "an interpreter with its sources", "set data.path to your text")
    packages = {package_of(source) for source in sources}
    for name in held_out:
        if name not in packages:
            nearest = ", ".join(nearest_first(name, packages)[:5])
            raise Refusal(
                f"held-out package {name!r}", f"top-level packages such as {nearest}", "correct data.held_out"
            )
    kept = [source for source in sources if package_of(source) not in held_out]
    away = [source for source in sources if package_of(source) in held_out]
    return filled(Corpus("standard library", kept)), filled(Corpus("held-out " + ", ".join(held_out), away))


def package_of(source: Source) -> str:
    return source.name.split("/")[0].removesuffix(".py")


# the user's own files


def read(path: str | os.PathLike[str], *, field: str = "text") -> Corpus:
    """The corpus at `path`: one file, or every file below a folder that is not hidden.

    `.jsonl` and `.parquet` give a document per row (`field`), any other file is one document of UTF-8 text. Binary
    files in a folder are skipped and said; a binary file named by itself is refused.
    """
    path = Path(path)
    if not path.exists():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        nearest = ", ".join(nearest_first(path.name, beside)[:3]) or "an existing file or folder"
        raise Refusal(f"no such file or folder: {str(path)!r}", nearest, "correct data.path")
    sources = list(walk(path, frozenset({"__pycache__"}))) if path.is_dir() else [Source(path.name, path)]
    return filled(Corpus(path.name, sources, field=field))


def filled(corpus: Corpus) -> Corpus:
    """`corpus`, refused when it holds nothing."""
    if corpus.sources:
        return corpus
    if len(corpus.skipped) == 1:
        name, reason = corpus.skipped[0]
        raise Refusal(f"{name} is {reason}", "UTF-8 text, .jsonl or .parquet", "set data.path to a file with text")
    reasons = ", ".join(sorted({reason for _, reason in corpus.skipped})) or "no files"
    found = f"nothing to read in {corpus.name!r}: {len(corpus.skipped)} files skipped ({reasons})"
    raise Refusal(found, "UTF-8 text, .jsonl or .parquet", "set data.path to a folder with text")


def walk(root: Path, without: frozenset[str]) -> Iterator[Source]:
    """Files below `root`, sorted by name, hidden ones and the folders `without` left out."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in without and not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return (Source(name, root / name) for name in sorted(path.relative_to(root).as_posix() for path in found))


BLOCK = 1 << 22
BINARY = frozenset({".parquet"})


def inspect(path: Path, *, is_text: bool) -> tuple[str, int, str | None]:
    """(sha256, bytes, why it is not text or None) of a file."""
    sha, size, decoder = hashlib.sha256(), 0, codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            sha.update(block)
            size += len(block)
            if is_text and b"\0" in block:
                return "", size, "binary (holds NUL bytes)"
            try:
                decoder.decode(block if is_text else b"")
            except UnicodeDecodeError as problem:
                return "", size, f"not UTF-8 (byte {problem.object[problem.start]:#x})"
    if is_text and decoder.getstate()[0]:
        return "", size, "not UTF-8 (ends inside a character)"
    return sha.hexdigest(), size, None


# one reader per kind of file


def read_text(source: Source, field: str) -> Iterator[Pair]:
    # newline="" keeps \r\n as it is: the tokenizer is lossless, so reading should be too
    yield source.name, source.path.open(encoding="utf-8", newline="").read()


def read_jsonl(source: Source, field: str) -> Iterator[Pair]:
    with source.path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{source.name}:{number}", row_text(line, field, f"{source.name} line {number}")


def row_text(line: str, field: str, where: str) -> str:
    """The text of one JSONL line, or a refusal that says which line and what is wrong with it."""
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as problem:
        found = f"{where} is no JSON ({problem.msg} at column {problem.colno})"
        raise Refusal(found, "one JSON object a line", "correct the line") from None
    if not isinstance(row, dict):
        raise Refusal(f"{where} is a {type(row).__name__}", "a JSON object", f'write {{"{field}": "..."}}')
    if field not in row:
        keys = ", ".join(nearest_first(field, row)) or "none"
        raise Refusal(f"{where} has no field {field!r}", f"its fields: {keys}", "set data.field to one of them")
    return text_of(row[field], field, where)


def text_of(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise Refusal(f"{where}: {field!r} is {type(value).__name__}", "a string", "set data.field to a text field")
    try:
        value.encode()
    except UnicodeEncodeError as problem:  # JSON can write what UTF-8 can not
        found = f"{where}: {field!r} holds half a surrogate pair at character {problem.start}"
        raise Refusal(found, "text that UTF-8 can spell", "correct the line") from None
    return value


def read_parquet(source: Source, field: str) -> Iterator[Pair]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        found = f"{source.name} needs pyarrow, which is not installed"
        raise Refusal(found, "text and JSONL without it", "pip install trimaran[data]") from None
    try:
        table = pyarrow.parquet.ParquetFile(source.path)
    except pyarrow.ArrowInvalid as problem:
        raise Refusal(f"{source.name}: {problem}", "a parquet file", "copy the file again") from None
    if field not in table.schema_arrow.names:
        columns = ", ".join(nearest_first(field, table.schema_arrow.names))
        raise Refusal(f"{source.name} has no column {field!r}", columns, "set data.field to one of them")
    number = 0
    for batch in table.iter_batches(columns=[field]):
        for value in batch.column(0).to_pylist():
            number += 1
            yield f"{source.name}:{number}", text_of(value, field, f"{source.name} row {number}")


READERS: dict[str, Callable[[Source, str], Iterator[Pair]]] = {".jsonl": read_jsonl, ".parquet": read_parquet}
