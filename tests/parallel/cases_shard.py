"""Shares of weights, alone and together with other axes."""

from functools import partial

from tests.parallel.compare import compare


def case(sizes: dict[str, int], kind: str, size: int, **more: object) -> None:
    compare(sizes, kind, **more)


BOTH = {"pattern": "M*W-RM", "mtp_pattern": "*"}  # no experts
CASES = {
    "fsdp on the sphere": (2, partial(case, {"fsdp": 2}, "ngpt")),
    "fsdp of three kinds": (2, partial(case, {"fsdp": 2}, "qwen", accumulate=2)),
    "muon over fsdp": (2, partial(case, {"fsdp": 2}, "everything", train={"optimizer": "muon"})),
    "fsdp x tp": (4, partial(case, {"fsdp": 2, "tp": 2}, "everything", changes=BOTH)),
    "fsdp x tp on the sphere": (4, partial(case, {"fsdp": 2, "tp": 2}, "ngpt")),
    "replicate x tp, tied": (4, partial(case, {"replicate": 2, "tp": 2}, "llama", accumulate=2)),
    "replicate x fsdp": (4, partial(case, {"replicate": 2, "fsdp": 2}, "everything", rows=8, accumulate=2)),
}
