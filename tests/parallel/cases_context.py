"""Rows cut in pieces: what crosses the cuts, in outputs and gradients, against the same row in one process."""

from functools import partial

from tests.parallel.compare import compare


def pieces(kind: str, size: int, **more: object) -> None:
    compare({"cp": size}, kind, **more)


CASES = {f"cp of {kind}": (2, partial(pieces, kind)) for kind in ("mamba", "attention", "window", "dense", "llama")}
CASES |= {f"cp 4 of {kind}": (4, partial(pieces, kind)) for kind in ("mamba", "rope", "window", "ngpt")}
