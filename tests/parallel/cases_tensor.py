"""Layers cut along heads, widths and vocabulary; the residual stream along the tokens."""

from functools import partial

from tests.parallel.compare import compare


def cut(kind: str, size: int, **changes: object) -> None:
    compare({"tp": size}, kind, changes=changes, rows=2)


CASES = {
    f"tp of {kind}": (2, partial(cut, kind)) for kind in ("mamba", "attention", "window", "dense", "llama", "ngpt")
}
CASES |= {
    "tp 4 with two key-value heads": (4, partial(cut, "rope")),
    "tp of a vocabulary that does not divide": (2, partial(cut, "dense", vocab_size=63)),
}
