"""The loop on several processes that hold copies, or share them: rows alone are dealt out."""

from tests.parallel.compare import compare


def copies(size: int) -> None:
    compare({"replicate": size})


def copies_in_parts(size: int) -> None:
    compare({"replicate": size}, "moe", rows=8, accumulate=2)


def shares(size: int) -> None:
    compare({"fsdp": size})


CASES = {
    "copies": (2, copies),
    "copies in parts": (2, copies_in_parts),
    "shares": (2, shares),
}
