"""Saved in one layout, read back in another, by one process and for the hub: the same bits every time."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.compare import apart, begin, whole
from trimaran.model import hub
from trimaran.model.hybrid import HybridModel
from trimaran.parallel.places import local
from trimaran.parallel.settings import ParallelSettings
from trimaran.parallel.world import World, join
from trimaran.text.tokenizer import Tokenizer
from trimaran.train import checkpoint, sharded
from trimaran.train.loop import Run, train_step
from trimaran.train.merge import merge
from trimaran.train.recipe import TrainSettings

TRAIN = TrainSettings(steps=9, batch_size=4, lr=1e-3, eps=1e-5, aux_loss=1e-2, router_bias_rate=1e-2)
Sizes = Mapping[str, int]


def shared_folder() -> Path:
    """A new folder that all ranks know."""
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)
    return Path(str(name[0]))


def begun(sizes: Sizes, kind: str = "everything", *, blank: bool = False) -> Run:
    """A run in a layout; {} is one process. blank: all weights and buffers are 9."""
    world = join(ParallelSettings(**sizes), torch.device("cpu")) if sizes else World()
    run = begin(kind, TRAIN, world, {"vocab_size": 64})
    for tensor in run.model.state_dict().values() if blank else ():
        local(tensor).fill_(9.0)
    return run


def steps(run: Run, count: int) -> None:
    for _ in range(count):
        train_step(run, next(run.loader), run.settings.lr)
        run.step += 1


def state(run: Run) -> dict[str, Tensor]:
    """Weights, buffers and the optimizer's entries, whole; counts apart."""
    found = whole(dict(run.model.state_dict()), run)
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    entries: dict[str, dict[str, Tensor]] = {}
    for parameter, values in run.optimizer.state.items():
        for entry, value in values.items():
            entries.setdefault(entry, {})[names[parameter]] = value
    for entry, tensors in entries.items():
        if entry == "step":
            everybodys: list = [{name: float(value) for name, value in tensors.items()}]
            if not run.world.alone:  # a pipeline's stages count for themselves
                everybodys *= dist.get_world_size()
                dist.all_gather_object(everybodys, everybodys[0])
            found |= {f"step of {name}": torch.tensor(count) for one in everybodys for name, count in one.items()}
        else:
            found |= {f"{entry} of {name}": value for name, value in whole(tensors, run).items()}
    return found


def check_equal(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    assert found.keys() == truth.keys(), sorted(found.keys() ^ truth.keys())
    wrong = [name for name in truth if not torch.equal(found[name], truth[name])]
    assert not wrong, wrong


def check_near(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    wrong = {name: apart(found[name], truth[name]) for name in truth}
    assert max(wrong.values()) <= 1e-5, max(wrong.items(), key=lambda one: one[1])


def keeper_of(run: Run, folder: Path) -> sharded.Keeper:
    return sharded.Keeper(folder, run.world, keep=2)


def resumed(run: Run, folder: Path) -> Run:
    with keeper_of(run, folder) as keeper:
        saved = keeper.restore(run.model, run.optimizer, run.cuts, print)
    assert saved is not None
    run.step = saved.step
    run.loader.load_state_dict(saved.position)
    return run


def round_trip(written: Sizes, *read: Sizes, kind: str = "everything") -> None:
    """Saved in the layout `written` while the next step is taken; read in each of `read` and by one process."""
    folder, run = shared_folder(), begun(written, kind)
    steps(run, 2)
    torch.manual_seed(100 + dist.get_rank())
    drawn = torch.get_rng_state()
    at_two = state(run)
    with keeper_of(run, folder) as keeper:
        keeper.save(run.step, run.model, run.optimizer, run.cuts, run.loader.state_dict())
        steps(run, 1)  # not what is saved
    at_three = state(run)
    for sizes in (written, *read):
        torch.manual_seed(7)
        other = resumed(begun(sizes, kind, blank=True), folder)
        assert other.step == 2 and torch.equal(torch.get_rng_state(), drawn)
        check_equal(state(other), at_two)
        steps(other, 1)
        (check_equal if sizes == written else check_near)(state(other), at_three)
    if dist.get_rank() == 0:
        one = begun({}, kind, blank=True)
        saved = checkpoint.restore(folder, one.model, one.optimizer, print)
        assert saved is not None and saved.step == 2
        check_equal(state(one), at_two)
        assert torch.equal(torch.get_rng_state(), drawn)
        export(folder / "step-2", folder / "hub", one.model)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


def export(path: Path, out: Path, model: HybridModel) -> None:
    """The hub folder holds what `model` does."""
    sharded.export(path, model.config, out)
    check_equal(dict(hub.load(out).state_dict()), dict(model.state_dict()))


def from_one(*read: Sizes) -> None:
    """What one process saved, read in layouts of several."""
    folder, one = shared_folder(), begun({})
    steps(one, 2)
    at_two = state(one)
    if dist.get_rank() == 0:
        checkpoint.save(folder, 2, one.model, one.optimizer, one.loader.state_dict(), keep=2)
    dist.barrier()
    steps(one, 1)
    for sizes in read:
        other = resumed(begun(sizes, blank=True), folder)
        check_equal(state(other), at_two)
        steps(other, 1)
        check_near(state(other), state(one))


def damage(size: int) -> None:
    """A file that is not what its checksum says, noticed by whichever rank reads it: all go back one checkpoint."""
    folder, run = shared_folder(), begun({"fsdp": size})
    with keeper_of(run, folder) as keeper:
        for _ in range(2):
            steps(run, 1)
            keeper.save(run.step, run.model, run.optimizer, run.cuts, {"step": run.step})
            if run.step == 1:
                before = state(run)
        keeper.wait()
        path = folder / "step-2" / f"shard-{size - 1:05}.safetensors"
        if dist.get_rank() == 0:
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        dist.barrier()
        told: list[str] = []
        saved = keeper.restore(run.model, run.optimizer, run.cuts, told.append)
    assert saved is not None and saved.step == 1
    assert len(told) == 1 and f"{path.name} does not match its checksum" in told[0]
    check_equal(state(run), before)


def merged(sizes: Sizes) -> None:
    """The mean of two sharded checkpoints, made by one process."""
    folder, run = shared_folder(), begun(sizes, "latent")
    tokenizer = Tokenizer.train(["sail rope mast"] * 3, 300)
    held: list[dict[str, Tensor]] = []
    with sharded.Keeper(folder, run.world, keep=2, tokenizer=tokenizer) as keeper:
        for _ in range(2):
            steps(run, 1)
            keeper.save(run.step, run.model, run.optimizer, run.cuts, run.loader.state_dict())
            held.append(whole(dict(run.model.state_dict()), run))
    if dist.get_rank() == 0:
        merge([folder / "step-1", folder / "step-2"], folder / "merged", "uniform")
        found = hub.load(folder / "merged").state_dict()
        check_equal(found, {name: ((held[0][name].double() + held[1][name]) / 2).float() for name in found})
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


FSDP_TP = {"fsdp": 2, "tp": 2}
CASES = {
    "checkpoint of fsdp": (2, lambda size: round_trip({"fsdp": 2}, {"replicate": 2})),
    "checkpoint of tp": (2, lambda size: round_trip({"tp": 2}, {"fsdp": 2})),
    "checkpoint of pp": (2, lambda size: round_trip({"pp": 2}, {"tp": 2})),
    "checkpoint of ties under pp": (2, lambda size: round_trip({"pp": 2}, {"fsdp": 2}, kind="llama")),
    "checkpoint of one process": (2, lambda size: from_one({"fsdp": 2}, {"tp": 2})),
    "checkpoint of fsdp x tp": (4, lambda size: round_trip(FSDP_TP, {"replicate": 2, "fsdp": 2})),
    "checkpoint of fsdp x ep": (4, lambda size: round_trip({"fsdp": 4, "ep": 2}, {"cp": 2, "tp": 2, "ep": 4})),
    "checkpoint damaged": (4, damage),
}
