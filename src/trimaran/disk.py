"""Files that are there whole or not at all, and what has to reach the disk before anything relies on it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from trimaran.errors import writing


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write, which takes the place of `path` once all is written: readers see the old content or the new.

    Makes the folder. A full, read-only or forbidden disk is a `Refusal`.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Asks the disk to keep a file or folder now, so that a rename after it cannot outrun the content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
