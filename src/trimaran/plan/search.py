"""The fastest layouts that fit, found by looking at few of them, and why the others fell out.

The space: every factoring of the devices into replicate x fsdp x cp x tp x pp, every ep that divides fsdp x cp x tp,
every micro-batch that divides a device's rows, every set of layer kinds to recompute. Layouts that differ in
micro-batch and recomputation alone count as one, whose best variant stands for it.

Nothing that could win is left out, because (each is a property of costs.py and memory.py, and a test compares with
trying everything):

    memory     grows with the micro-batch (but for the last step, from two micro-batches to one) and shrinks with
               recomputation: where full recomputation does not fit, no larger micro-batch is tried but the largest
    dominated  recomputing more only takes longer: with a set of letters that fits, its supersets are not tried
    bound      what must be computed and said, without any bubble, already takes longer than the best few found
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import inf

from trimaran.errors import Refusal
from trimaran.plan.costs import Costs, Job, Times
from trimaran.plan.layout import AXES, Layout, divisors, factorings, fault
from trimaran.plan.memory import Bytes, Room

NEED, SLOW, DOMINATED = "does not fit in memory", "slower even without waiting", "more recomputation than needed"
SURE = 1 - 1e-9  # what rounding may add to a bound


@dataclass(frozen=True)
class Plan:
    """One layout with its time and memory."""

    layout: Layout
    times: Times
    memory: Bytes
    seconds: float

    @property
    def key(self) -> tuple[float, Layout]:
        """Order of plans: quickest first; of equals (but for rounding) the smaller sizes and less recomputation."""
        return float(f"{self.seconds:.10g}"), self.layout


@dataclass
class Found:
    """The best plans, quickest first; how many layouts fell out for which reason, with an example each."""

    plans: list[Plan] = field(default_factory=list)
    fell: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Layout] = field(default_factory=dict)
    looked_at: int = 0

    def drop(self, reason: str, layout: Layout, number: int = 1) -> None:
        """Counts variants of a layout that fell out."""
        self.fell[reason] += number
        self.examples.setdefault(reason, layout)


def plan_of(room: Room, layout: Layout) -> Plan:
    """A layout's time and memory."""
    times = room.costs.step(layout)
    return Plan(layout, times, room.needed(layout), times.total)


def recomputations(pattern: str) -> list[str]:
    """Every set of the pattern's letters, small sets first."""
    kinds = "".join(dict.fromkeys(pattern))
    return ["".join(chosen) for size in range(len(kinds) + 1) for chosen in combinations(kinds, size)]


def spaces(job: Job, gpus: int, found: Found) -> Iterator[tuple[Layout, list[int]]]:
    """Every legal choice of axes with the micro-batches it may have; the illegal ones are counted."""
    config = job.config
    for sizes in factorings(gpus):
        shards = sizes["fsdp"] * sizes["cp"] * sizes["tp"]
        eps = divisors(shards) if "E" in config.pattern + config.mtp_pattern else [1]
        for ep in eps:
            layout = replace(Layout(ep=ep), **sizes)  # type: ignore[arg-type]
            if wrong := fault(config, layout, job.rows, job.sequence, job.hardware.domain):
                found.drop(wrong, layout)
            else:
                yield layout, divisors(job.rows // layout.rows)


def search(job: Job, gpus: int, keep: int = 5) -> Found:
    """The `keep` best layouts. Raises Refusal when none is legal or none fits."""
    room, found = Room(Costs(job)), Found()
    sets = recomputations(job.config.pattern)
    waiting = [(room.costs.computing(layout), layout, batches) for layout, batches in spaces(job, gpus, found)]
    for bound, layout, batches in sorted(waiting, key=lambda one: one[:2]):
        limit = found.plans[-1].seconds if len(found.plans) == keep else inf
        if bound * SURE > limit:
            found.drop(SLOW, layout, len(batches) * len(sets))
            continue
        best = of_axes(room, layout, batches, sets, limit, found)
        if best is not None:
            found.plans = sorted([*found.plans, best], key=lambda plan: plan.key)[:keep]
    if not found.plans:
        raise nothing(job, gpus, found)
    return found


def of_axes(room: Room, axes: Layout, batches: list[int], sets: list[str], limit: float, found: Found) -> Plan | None:
    """The best micro-batch and recomputation for some sizes of the axes, if it is quicker than `limit`."""
    usable = room.costs.job.hardware.usable
    best: Plan | None = None
    full = False
    for batch in batches:
        one_alone = batch == batches[-1]  # whose gradients need not lie whole, so memory may fall once more
        least = replace(axes, micro_batch=batch, recompute=sets[-1])
        if full and not one_alone:
            found.drop(NEED, least, len(sets))
            continue
        if not room.fits(least, usable):
            found.drop(NEED, least, len(sets))
            full = True
            continue
        fitting: list[set[str]] = []
        for number, letters in enumerate(sets):
            layout = replace(axes, micro_batch=batch, recompute=letters)
            slow = room.costs.bound(layout) * SURE > min(limit, best.seconds if best else inf)
            if slow and not letters:
                found.drop(SLOW, layout, len(sets) - number)
                break
            if any(smaller <= set(letters) for smaller in fitting):
                found.drop(DOMINATED, layout)
            elif slow:
                found.drop(SLOW, layout)
            elif not room.fits(layout, usable):
                found.drop(NEED, layout)
            else:
                fitting.append(set(letters))
                found.looked_at += 1
                plan = plan_of(room, layout)
                best = plan if best is None or plan.key < best.key else best
    return best


def nothing(job: Job, gpus: int, found: Found) -> Refusal:
    """What to say when no layout is left."""
    name = job.hardware.name
    sets, room = recomputations(job.config.pattern), Room(Costs(job))
    least = [replace(layout, recompute=sets[-1]) for layout, _ in spaces(job, gpus, Found())]
    if not least:
        reasons = "; ".join(f"{reason} ({number})" for reason, number in found.fell.most_common(3))
        step = f"choose other numbers of rows or devices: {job.rows} rows of {job.sequence} on {gpus}"
        return Refusal(f"no legal layout for {gpus} devices: {reasons}", f"a product of {', '.join(AXES)}", step)
    size, layout = min((room.needed(one).total, one) for one in least)
    short = size - job.hardware.usable
    return Refusal(
        f"no layout fits on {gpus} x {name}: the closest, {layout.words()}, is {short / 1e9:.1f} GB a device too large",
        f"{job.hardware.usable / 1e9:.0f} GB a device",
        "more devices (--gpus), devices with more memory (--hardware), shorter rows (--seq) or a smaller model",
    )


def everything(job: Job, gpus: int, keep: int = 5) -> list[Plan]:
    """The same best layouts by trying every variant: what `search` is tested against."""
    room = Room(Costs(job))
    best: list[Plan] = []
    for layout, batches in spaces(job, gpus, Found()):
        variants = [
            plan_of(room, replace(layout, micro_batch=batch, recompute=letters))
            for batch in batches
            for letters in recomputations(job.config.pattern)
        ]
        fitting = [plan for plan in variants if plan.memory.total <= job.hardware.usable]
        if fitting:
            best.append(min(fitting, key=lambda plan: plan.key))
    return sorted(best, key=lambda plan: plan.key)[:keep]
