"""Axes together: everything that a model can have, cut in two ways at once."""

from functools import partial

from tests.parallel.compare import compare


def together(sizes: dict[str, int], size: int, kind: str = "everything", **more: object) -> None:
    compare(sizes, kind, **more)


CASES = {
    "tp x ep": (2, partial(together, {"tp": 2, "ep": 2})),
    "cp x ep": (2, partial(together, {"cp": 2, "ep": 2}, kind="qwen", accumulate=2)),
    "tp x cp": (4, partial(together, {"tp": 2, "cp": 2})),
    "cp x fsdp": (4, partial(together, {"cp": 2, "fsdp": 2})),
    "fsdp x ep": (4, partial(together, {"fsdp": 4, "ep": 2}, accumulate=1)),
    "tp x cp x ep": (4, partial(together, {"tp": 2, "cp": 2, "ep": 4})),
    "fsdp x tp x ep": (4, partial(together, {"fsdp": 2, "tp": 2, "ep": 4}, kind="latent")),
    "replicate x ep": (4, partial(together, {"replicate": 2, "fsdp": 2, "ep": 2}, kind="grouped-moe")),
}
