"""How Trimaran refuses: what was found, what is allowed, what to do next, on one line."""

import contextlib
import difflib
import errno
import os
from collections.abc import Iterable, Iterator

# What a full or closed disk answers. Anything else that goes wrong while writing is a bug and propagates.
DISK_PROBLEMS = {
    errno.ENOSPC: "a disk with free space",
    errno.EDQUOT: "a disk quota with room left",
    errno.EROFS: "a disk that can be written to",
    errno.EACCES: "a folder you may write to",
    errno.EPERM: "a folder you may write to",
    errno.ENOTDIR: "a path whose parents are folders",
    errno.EISDIR: "the path of a file, not of a folder",
    errno.EEXIST: "a path whose parents are folders",
}


class Refusal(ValueError):
    """A request that cannot be honoured as given. The command line prints it and exits with code 2.

    `found` names the offending value, `allowed` what would have been accepted, `next_step` what to do about it.
    """

    def __init__(self, found: str, allowed: str, next_step: str):
        self.found, self.allowed, self.next_step = found, allowed, next_step
        super().__init__(f"{found}; allowed: {allowed}; next: {next_step}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.found, self.allowed, self.next_step)  # the way from one process to another


def nearest_first(name: str, allowed: Iterable[str]) -> list[str]:
    """The allowed names, the ones most like `name` first."""
    return sorted(allowed, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a full, read-only or forbidden disk met while writing `path` into a `Refusal`."""
    try:
        yield
    except OSError as problem:
        allowed = DISK_PROBLEMS.get(problem.errno or 0)
        if allowed is None:
            raise
        reason = (problem.strerror or str(problem)).lower()
        raise Refusal(
            f"cannot write {os.fspath(path)}: {reason}", allowed, "free some space or choose another path"
        ) from problem
