"""A layout: how many devices along which axis, how many rows at once, what is recomputed; and which layouts are legal.

world = pp x replicate x fsdp x cp x tp with tp innermost, as in `parallel/world.py`; ep divides fsdp x cp x tp.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from trimaran.errors import Refusal, nearest_first
from trimaran.model.config import ATTENTION, ModelConfig

AXES = ("replicate", "fsdp", "cp", "tp", "pp")
NODE = 8  # devices that tp may span at most, on machines whose fast links join more


@dataclass(frozen=True, order=True)
class Layout:
    """Sizes of the axes, rows per micro-batch, chunks of layers per pipeline stage, letters that are recomputed."""

    replicate: int = 1
    fsdp: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    micro_batch: int = 1
    virtual: int = 1
    recompute: str = ""

    @property
    def shards(self) -> int:
        return self.fsdp * self.cp * self.tp

    @property
    def world(self) -> int:
        return self.pp * self.replicate * self.shards

    @property
    def rows(self) -> int:
        """Parts in which a step's rows are dealt out."""
        return self.replicate * self.fsdp

    @property
    def axes(self) -> tuple[int, ...]:
        """What the search tells apart: all but micro-batch and recomputation, which follow."""
        return (self.replicate, self.fsdp, self.cp, self.tp, self.pp, self.ep, self.virtual)

    def words(self) -> str:
        """ "fsdp 8 · ep 8 · micro-batch 4 · recompute ME": sizes above 1."""
        sizes = [f"{name} {getattr(self, name)}" for name in (*AXES, "ep", "virtual") if getattr(self, name) > 1]
        again = [f"recompute {self.recompute}"] if self.recompute else []
        return " · ".join([*(sizes or ["one device"]), f"micro-batch {self.micro_batch}", *again])

    def table(self) -> dict[str, int | str]:
        return asdict(self)


def given(text: str, pattern: str) -> Layout:
    """A layout from words such as "tp=1,pp=1,ep=8,fsdp=8,micro_batch=4,recompute=ME"; sizes not named are 1.

    recompute: letters of the pattern, "none" or "full".
    """
    fields: dict[str, int | str] = {}
    known = list(Layout.__dataclass_fields__)
    for word in filter(None, re.split(r"[,\s]+", text)):
        name, sign, value = word.partition("=")
        if name not in known or not sign:
            near = nearest_first(name, known)
            raise Refusal(f"{word!r} in --given", f"name=value with {', '.join(near)}", f"did you mean {near[0]}=…?")
        if name == "recompute":
            fields[name] = letters(value, pattern)
        elif not value.isdecimal() or int(value) < 1:
            raise Refusal(f"{word!r} in --given", "a number from 1 on", f"write {name}=1")
        else:
            fields[name] = int(value)
    return Layout(**fields)  # type: ignore[arg-type]


def letters(value: str, pattern: str) -> str:
    """Letters whose layers are computed again, in the order of the pattern."""
    kinds = "".join(dict.fromkeys(pattern))
    chosen = {"none": "", "full": kinds}.get(value, value)
    strangers = [letter for letter in chosen if letter not in kinds]
    if strangers:
        raise Refusal(f"recompute={value}", f"none, full, or letters among {kinds}", f"leave {strangers[0]!r} out")
    return "".join(letter for letter in kinds if letter in chosen)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def factorings(world: int) -> Iterator[dict[str, int]]:
    """Every way to write the world as a product of the five axes."""

    def split(rest: int, names: tuple[str, ...]) -> Iterator[dict[str, int]]:
        if len(names) == 1:
            yield {names[0]: rest}
            return
        for size in divisors(rest):
            for others in split(rest // size, names[1:]):
                yield {names[0]: size, **others}

    return split(world, ("pp", "tp", "cp", "fsdp", "replicate"))


def fault(config: ModelConfig, layout: Layout, rows: int, sequence: int, domain: int) -> str:
    """Why a layout is illegal, in words; "" if it is legal. The first reason is that of the outermost axis."""
    kinds = set(config.pattern + config.mtp_pattern)
    checks = (
        (layout.pp * layout.virtual > len(config.pattern), "pp has more stages than there are layers"),
        (layout.tp > min(domain, NODE), "tp leaves the node"),
        *((bool(number % layout.tp), f"tp does not divide {what}") for what, number in cuts(config, kinds)),
        (bool(set(ATTENTION) & kinds) and bool(uneven(config.num_key_value_heads, layout.tp)), "tp and kv heads"),
        (bool(sequence % (layout.cp * layout.tp)), "cp x tp does not divide the sequence"),
        (bool(layout.ep > 1 and "E" not in kinds), "ep without experts"),
        (bool("E" in kinds and config.n_routed_experts % layout.ep), "ep does not divide the experts"),
        (bool(layout.shards % layout.ep), "ep does not divide fsdp x cp x tp"),
        (bool(rows % layout.rows), "replicate x fsdp does not divide the rows of a step"),
        (bool(rows // layout.rows % layout.micro_batch), "micro-batch does not divide a device's rows"),
        (layout.virtual > 1 and layout.pp == 1, "virtual stages without a pipeline"),
    )
    return next((words for wrong, words in checks if wrong), "")


def uneven(heads: int, tp: int) -> int:
    """Remainder of heads over tp, where fewer heads than parts are repeated."""
    return heads % tp if heads >= tp else tp % heads


def cuts(config: ModelConfig, kinds: set[str]) -> list[tuple[str, int]]:
    """What tp has to divide."""
    found = [("the vocabulary", config.vocab_size)]
    if kinds & set(ATTENTION):
        found.append(("the attention heads", config.num_attention_heads))
    if "M" in kinds:
        found += [("the Mamba heads", config.mamba_num_heads), ("the Mamba groups", config.n_groups)]
    if "-" in kinds:
        found.append(("the feed-forward's width", config.intermediate_size))
    if "E" in kinds and config.moe_shared_expert_intermediate_size:
        found.append(("the shared expert's width", config.moe_shared_expert_intermediate_size))
    return found


def check(config: ModelConfig, layout: Layout, rows: int, sequence: int, gpus: int, domain: int) -> None:
    """Refuses a layout that is illegal, or made for another number of devices."""
    if layout.world != gpus:
        sizes = " x ".join(f"{name} {getattr(layout, name)}" for name in AXES)
        found = f"{sizes} = {layout.world} devices"
        raise Refusal(found, f"a product of --gpus {gpus}", f"change a size, or --gpus {layout.world}")
    if wrong := fault(config, layout, rows, sequence, domain):
        found = f"{layout.words()}: {wrong}"
        facts = (
            f"rows {rows}, sequence {sequence}, {', '.join(f'{w} {n}' for w, n in cuts(config, set(config.pattern)))}"
        )
        raise Refusal(found, f"sizes that divide ({facts})", "change that size, the batch or the sequence")
