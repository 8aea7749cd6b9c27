"""Which twins of the operations may run: one setting, `ops.backend`.

Every operation has a readable reference and twins of it in families, each tested against it:

    torch    fast forms in plain torch: chunked scan, written gradients, fused attention, grouped products
    native   C++ kernels for a CPU, built with the wheel (ops/kernels); native.amx: on its matrix unit, where it has one
    triton   kernels for a GPU (ops/triton_*.py)

A twin is named `family.operation`. The setting is a comma list of words:

    auto            every twin, where it knows the device, the dtype and the shape (the default)
    reference       no twin at all: the formulas as they stand
    -NAME           not this family, or not this twin
    NAME            this family or twin must be able to run on this machine; refused at once where it cannot

The choice is the process's, as torch's number of threads is: programs make it (`choose`), the library never does.
"""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from trimaran.config import Settings
from trimaran.errors import Refusal
from trimaran.ops.memory import keep_freed_memory

TWINS = {
    "torch": ("attention", "conv", "experts", "loss", "norm", "relu2", "ssd"),
    "native": (
        "amx",
        "attention",
        "blocks",
        "conv",
        "experts",
        "gated_norm",
        "linear",
        "loss",
        "mamba",
        "norm",
        "relu2",
        "router",
        "scan",
    ),
    "triton": ("conv", "experts", "norm", "paged", "relu2", "router", "ssd", "step"),
}
MODULES = {"native": "trimaran.ops.native", "triton": "trimaran.ops.triton_backend"}  # each has missing() -> str | None


class OpsSettings(Settings):
    """Which fast forms of the operations may run."""

    backend: str = Field(
        "auto", description="auto, reference, or a comma list of twins to force (native) or forbid (-native.linear)."
    )


class Choice:
    """The words of the setting, and what they forbid."""

    def __init__(self, setting: str):
        self.setting = setting
        self.forbidden: frozenset[str] = frozenset()
        self.forced: list[str] = []
        for word in filter(None, (word.strip() for word in setting.split(","))):
            if word == "reference":
                self.forbidden |= every()
            elif word.startswith("-"):
                self.forbidden |= expand(word[1:], setting)
            elif word != "auto":
                self.forbidden -= expand(word, setting)
                self.forced.append(word)


def every() -> frozenset[str]:
    """All twins by name."""
    return frozenset(f"{family}.{twin}" for family, twins in TWINS.items() for twin in twins)


def expand(name: str, setting: str) -> frozenset[str]:
    """The twins that a word means."""
    found = frozenset(twin for twin in every() if name in (twin, twin.partition(".")[0]))
    if not found:
        allowed = ", ".join(["auto", "reference", *TWINS, *sorted(every())])
        raise Refusal(f"ops.backend = {setting!r}: {name!r}", f"{allowed}, or - before a twin", "correct the word")
    return found


_chosen = Choice("auto")


def allowed(twin: str) -> bool:
    """Whether the setting lets `twin` (family.operation) run; whether it can is the twin's own question."""
    return twin not in _chosen.forbidden


def forced(twin: str) -> bool:
    """Whether the setting names the twin or its family."""
    return twin in _chosen.forced or twin.partition(".")[0] in _chosen.forced


def choose(setting: str) -> None:
    """Makes the process's choice. Raises `Refusal` for an unknown word, and for a forced twin that cannot run."""
    global _chosen
    choice = Choice(setting)
    for word in choice.forced:
        reason = missing(word)
        if reason is not None:
            raise Refusal(f"ops.backend = {setting!r}, and here {reason}", "twins that can run", f"leave out {word!r}")
    _chosen = choice


def own_process(settings: OpsSettings) -> None:
    """What a verb does that has the process to itself: makes the choice, and keeps freed memory (ops.memory), which is
    worth a tenth of a small model's step."""
    choose(settings.backend)
    keep_freed_memory()


@contextlib.contextmanager
def using(setting: str) -> Iterator[None]:
    """The choice for a while; for tests and comparisons."""
    before = _chosen.setting
    choose(setting)
    try:
        yield
    finally:
        choose(before)


def missing(word: str) -> str | None:
    """Why nothing of a family, or not this twin, can run on this machine; None where it can."""
    family = word.partition(".")[0]
    if family not in MODULES or not TWINS[family]:
        return None
    module = importlib.import_module(MODULES[family])
    return module.missing() or (module.missing_unit() if word == "native.amx" else None)


def record() -> dict[str, Any]:
    """What stands in a run folder: the setting, what it forbids, and of each family whether it can run here, the native
    one with its instruction set."""
    families = {family: missing(family) or "here" for family, twins in TWINS.items() if twins}
    if families["native"] == "here":
        families["native"] = importlib.import_module(MODULES["native"]).instruction_set()
    return {"backend": _chosen.setting, "forbidden": sorted(_chosen.forbidden), **families}
