"""One process against ranks: the same model, the same three steps, and what may differ (nothing but rounding).

Every rank computes the truth for itself: a whole model from the seed, trained by the same loop on whole steps. Cases
that ask for the same truth share it.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tests.models import tiny
from tests.parallel.ranks import PATIENCE
from trimaran.data.batch import Batch
from trimaran.parallel.parallelize import parallelize
from trimaran.parallel.places import Cut, local, places
from trimaran.parallel.settings import ParallelSettings
from trimaran.parallel.world import World, join
from trimaran.train.loop import Run, train_step
from trimaran.train.prepare import objective_of, optimizer_of
from trimaran.train.recipe import TrainSettings

TOLERANCE = 1e-5  # of a relative norm in fp32


@dataclass(frozen=True)
class Seen:
    """What a run showed: `values` of each step, whole gradients of the first, whole weights after the last."""

    values: list[dict[str, float]]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


class Batches:
    """The source of the steps: the same whole steps on every rank."""

    def __init__(self, vocab: int, rows: int, length: int):
        self.vocab, self.shape, self.step = vocab, (rows, length), 0

    def __next__(self) -> Batch:
        self.step += 1
        return packed(self.vocab, *self.shape, seed=self.step)

    def observed(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.step = state["step"]


def packed(vocab: int, rows: int, length: int, seed: int) -> Batch:
    """Rows of packed documents of all lengths, so that they cross any border; every third row ends with padding."""
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(vocab, (rows, length + 1), generator=generator)
    doc_ids = (torch.rand(rows, length, generator=generator) < 0.1).cumsum(1)
    doc_ids[::3, length - 3 :] = -1
    goes_on = torch.zeros(rows, length, dtype=torch.bool)
    goes_on[:, :-1] = (doc_ids[:, 1:] == doc_ids[:, :-1]) & (doc_ids[:, 1:] >= 0)
    weights = torch.where(goes_on, torch.rand(rows, length, generator=generator), 0.0)
    return Batch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), doc_ids.to(torch.int32), weights)


@functools.cache
def world_of(settings: ParallelSettings) -> World:
    """One for all cases of a layout: groups have threads."""
    return join(settings.replace(timeout=PATIENCE), torch.device("cpu"))


def begin(kind: str, train: TrainSettings, world: World, changes: Mapping[str, object]) -> Run:
    """A run of a tiny model at its first step; spread over `world` unless that is one process."""
    model = tiny(kind, torch.float32, **changes).train()
    cuts: Mapping[str, Cut] = {} if world.alone else parallelize(model, world)
    objective, optimizer = objective_of(train, model, world), optimizer_of(train, model)
    source = Batches(model.config.vocab_size, train.batch_size, 24)
    return Run(Path("/nowhere"), train, model, objective, optimizer, source, world=world, cuts=cuts)


def trained(run: Run, steps: int) -> Seen:
    """Takes the steps. Every rank gets the whole tensors."""
    values, gradients = [], {}
    for step in range(steps):
        values.append(train_step(run, next(run.loader), run.settings.lr))
        if step == 0:
            gradients = whole({name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}, run)
    return Seen(values, gradients, whole(dict(run.model.state_dict()), run))


def whole(tensors: Mapping[str, Tensor], run: Run) -> dict[str, Tensor]:
    """Tensors as one process has them, put together from the local parts of all ranks; each element has to come."""
    if run.world.alone:
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}
    where = places(run.model, run.cuts)
    mine = {}
    for name, tensor in tensors.items():
        boxes = where[name].boxes(local(tensor.detach()))
        mine[name] = where[name].whole, [(box.offsets, box.view.clone()) for box in boxes]
    everybodys: list = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, mine)
    found: dict[str, Tensor] = {}
    for held in everybodys:
        for name, (shape, boxes) in held.items():
            target = found.setdefault(name, torch.full(shape, torch.nan))
            for offsets, view in boxes:
                target[tuple(slice(o, o + n) for o, n in zip(offsets, view.shape))] = view
    for name, tensor in found.items():
        assert not tensor.isnan().any(), f"no rank holds all of {name}"
    return found


def apart(found: Tensor, truth: Tensor, least: float = 1e-30) -> float:
    """The norm of the difference, relative to the truth's or to `least` where that is larger."""
    return float((found.double() - truth.double()).norm() / truth.double().norm().clamp(min=least))


def compare(
    sizes: Mapping[str, int] | ParallelSettings,
    kind: str = "everything",
    *,
    rows: int = 4,
    accumulate: int = 1,
    steps: int = 3,
    tolerance: float = TOLERANCE,
    changes: Mapping[str, object] | None = None,
    train: Mapping[str, object] | None = None,
) -> None:
    """Asserts that ranks laid out as `sizes` see and do what one process does.

    kind, changes: the model, as in tests/models.py; train: further settings of the run. Compared: losses, gradient norm
    and router statistics of `steps` steps, hidden vectors before the first, all gradients of the first, all weights and
    buffers after the last.
    """
    settings = sizes if isinstance(sizes, ParallelSettings) else ParallelSettings(**sizes)
    given = {"steps": steps, "batch_size": rows, "accumulate": accumulate, "lr": 1e-3, "eps": 1e-5, "clip": 0.5}
    asked = TrainSettings(**{**given, "aux_loss": 1e-2, "router_bias_rate": 1e-2, **(train or {})})
    changes = {"vocab_size": 64, **(changes or {})}
    world = world_of(settings)
    spread = begin(kind, asked, world, changes)
    hidden_BTD, truth = alone(kind, asked, steps, tuple(sorted(changes.items())))
    check_forward(spread, hidden_BTD)
    found = trained(spread, steps)
    for step, (ours, theirs) in enumerate(zip(found.values, truth.values, strict=True), 1):
        assert ours.keys() == theirs.keys(), f"step {step}: {ours.keys()} for {theirs.keys()}"
        for name, value in theirs.items():
            near = abs(ours[name] - value) <= tolerance * max(abs(value), 1.0)
            assert near, f"step {step}, {name}: {ours[name]} for {value}"
    # A gradient a thousandth of the whole is left of sums that cancel: one process alone is up to 2e-5 from fp64 there.
    whole_norm = torch.stack([one.double().norm() for one in truth.gradients.values()]).norm()
    check_tensors("gradient", found.gradients, truth.gradients, tolerance, least=1e-3 * float(whole_norm))
    check_tensors("weight", found.weights, truth.weights, tolerance)


@functools.cache
def alone(kind: str, train: TrainSettings, steps: int, changes: tuple[tuple[str, object], ...]) -> tuple[Tensor, Seen]:
    """One process: the hidden vectors of `first_batch`, and what `steps` steps show."""
    run = begin(kind, train, World(), dict(changes))
    batch = first_batch(run)
    with torch.no_grad():
        hidden_BTD = run.model.hidden(batch.tokens_BT, batch.doc_ids_BT)
    return hidden_BTD, trained(run, steps)


def first_batch(run: Run) -> Batch:
    return packed(run.model.config.vocab_size, run.settings.batch_size, 24, seed=0)


def check_forward(spread: Run, truth_BTD: Tensor) -> None:
    """Hidden vectors of this rank's share are those that one process has there."""
    batch, world = first_batch(spread), spread.world
    share = world.share(batch)
    with torch.no_grad():
        found_BTD = hidden(spread, share)
    number_BT = torch.arange(batch.tokens_BT.numel()).view_as(batch.tokens_BT)
    mine_BT = world.share(Batch(number_BT, number_BT, number_BT, number_BT)).tokens_BT
    assert (found_BTD is None) == (world.place["pp"] < world.settings.pp - 1)
    if found_BTD is not None:
        assert apart(found_BTD, truth_BTD.flatten(0, 1)[mine_BT]) <= TOLERANCE, "hidden vectors differ"


def hidden(run: Run, share: Batch) -> Tensor | None:
    """Hidden vectors of a process's share, where it gets them: in a pipeline at the last stage alone."""
    if run.pipeline is None:
        return run.model.hidden(share.tokens_BT, share.doc_ids_BT)
    return run.pipeline.hidden(share)


def check_tensors(
    what: str, found: Mapping[str, Tensor], truth: Mapping[str, Tensor], tolerance: float, least: float = 1e-30
) -> None:
    """All names, and each within the tolerance."""
    assert found.keys() == truth.keys(), f"{what}s of {sorted(found.keys() ^ truth.keys())} on one side alone"
    wrong = {name: apart(found[name], truth[name], least) for name in truth}
    worst = [f"{name}: {by:.1e}" for name, by in sorted(wrong.items(), key=lambda one: -one[1]) if not by <= tolerance]
    assert not worst, f"{what}s apart by more than {tolerance:.0e}: {', '.join(worst[:12])}"


def equal_on(kinds: Sequence[str], **sizes: int) -> None:
    """`compare` for several kinds of model in one layout."""
    for kind in kinds:
        compare(sizes, kind)
