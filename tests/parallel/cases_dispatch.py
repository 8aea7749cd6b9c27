"""Experts dealt out over processes, and routers that see some of a row's tokens."""

from functools import partial

from tests.parallel.compare import compare


def dealt(kind: str, size: int, **more: object) -> None:
    compare({"fsdp": size, "ep": size}, kind, **more)


CASES = {f"ep of {kind}": (2, partial(dealt, kind)) for kind in ("moe", "latent", "qwen")}
CASES |= {
    "cp of routers": (2, lambda size: compare({"cp": size}, "everything")),
    "tp of routers": (2, lambda size: compare({"tp": size}, "everything")),
}
