"""Checkpoints of a run on several processes: saved beside the training, read back into any layout.

    checkpoints/step-200/   shard-00000.safetensors …, tensors.json    as `chunks` has it: weights under the model's
                            names, optimizer.<parameter>.<entry>, rng.<device> (of the first), rng.<device>.<rank>
                            config.json, tokenizer, checkpoint.json    as in the checkpoint of one process

A save copies what this process holds to the CPU and returns; a thread writes the copy through DCP while training goes
on, so what is saved is the step at which it was asked for. One save is under way at most: the next waits for it. The
first process commits once all have written, by a rename as a run on one process does.

Restoring reads what the boxes of this process need, from a checkpoint of any layout or of one process. The state of the
random generators is a process's own where a process of its rank wrote one, else the first process's.

The weights for the hub are read out of the last checkpoint, a file's worth at a time: no process ever holds the model.
"""

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from trimaran.disk import sync
from trimaran.errors import Refusal
from trimaran.model import adapter, hub
from trimaran.model.config import ModelConfig
from trimaran.model.dialects import dump_json
from trimaran.model.hybrid import HybridModel, build
from trimaran.model.lora import adapted
from trimaran.model.names import Piece
from trimaran.parallel.places import Cut, Place, local, places
from trimaran.parallel.world import World
from trimaran.text.tokenizer import Tokenizer
from trimaran.train import checkpoint
from trimaran.train.checkpoint import MANIFEST, SHARDED, STAGING, TRAINING, Saved
from trimaran.train.chunks import BoxPlanner, Chunk, ChunkWriter, Held, Shards, Stored, Written, read_table

PATIENCE = timedelta(hours=6)  # processes wait for the slowest disk; one that dies is noticed at once
Cuts = Mapping[str, Cut]
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {**FLOATS, "I64": torch.int64, "U8": torch.uint8}  # as safetensors call what a run on one process writes


class Keeper:
    """Saves and restores one run, from every process of its world alike; leaving waits for the save under way."""

    def __init__(self, folder: Path, world: World, *, keep: int, tokenizer: Tokenizer | None = None):
        self.folder, self.world, self.keep, self.tokenizer = folder, world, keep, tokenizer
        # A group of its own: the thread's messages must not get between those of the training.
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, problem: BaseException | None, trace: Any) -> None:
        try:
            if problem is None:
                self.wait()
        finally:
            # What stops all processes alike, such as a loss that is not finite, stops no save. A lost process does.
            self.thread.shutdown(wait=problem is None or isinstance(problem, Refusal))

    def save(
        self, step: int, model: HybridModel, optimizer: torch.optim.Optimizer, cuts: Cuts, position: Mapping[str, Any]
    ) -> None:
        """Begins to save; what was under way before is waited for. Raises what went wrong with that on any process."""
        self.wait()
        held = {**weights(model, cuts), **optimizer_state(model, optimizer, cuts)}
        held |= {name: Held.whole(state) for name, state in generators(model, self.world.rank).items()}
        snapshot = {name: one.copied() for name, one in held.items()}
        config, dtype = model.config, str(model.dtype).removeprefix("torch.")
        self.pending = self.thread.submit(self.write, step, snapshot, config, dtype, dict(position))

    def wait(self) -> None:
        """Until no save is under way."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def write(
        self, step: int, snapshot: dict[str, Held], config: ModelConfig, dtype: str, position: dict[str, Any]
    ) -> None:
        """Writes a snapshot and makes it the newest checkpoint."""
        stage, target = self.folder / f"{STAGING}step-{step}", self.folder / f"step-{step}"

        def commit(shards: list[Written]) -> None:
            (stage / hub.CONFIG).write_text(dump_json(hub.write_config(config, dtype)), encoding="utf-8")
            if self.tokenizer is not None:
                self.tokenizer.save(stage)
            ours = {shard.name: [shard.size, shard.checksum] for shard in shards}
            beside = {path.name: path for path in stage.iterdir() if path.name not in ours}
            files = {**ours, **checkpoint.measured(beside.values())}
            checkpoint.write_manifest(stage, SHARDED, step, config, position, files)
            for path in (*beside.values(), stage / MANIFEST):
                sync(path)
            checkpoint.commit(stage, target, keep=self.keep)

        try:
            dcp.save(
                snapshot, storage_writer=ChunkWriter(stage, commit), planner=BoxPlanner(), process_group=self.group
            )
        except CheckpointException as problem:  # DCP's bundle: what went wrong, by process
            if self.world.first:
                shutil.rmtree(stage, ignore_errors=True)
            rank, (cause, _) = next(iter(problem.failures.items()))
            cause.add_note(f"while process {rank} saved step {step}")
            raise cause from problem

    def restore(
        self, model: HybridModel, optimizer: torch.optim.Optimizer, cuts: Cuts, tell: Callable[[str], None]
    ) -> Saved | None:
        """As `checkpoint.restore`; the processes share the reading of what is checked."""
        damaged: list[str] = []
        for step in self.told(self.steps() if self.world.first else []):
            path = self.folder / f"step-{step}"
            manifest, problem = checkpoint.check(path, self.world.rank, self.world.settings.world)
            found: list[str] = [""] * self.world.settings.world
            dist.all_gather_object(found, problem, group=self.group)
            if manifest is None or any(found):
                damaged.append(f"{path} is damaged: {next(filter(None, found))}")
                tell(f"{damaged[-1]}; going back to the checkpoint before it")
                continue
            checkpoint.check_model(path, manifest["model"], model.config)
            load(path, manifest, model, optimizer, self.world, cuts)
            return Saved(manifest["step"], manifest["position"])
        if damaged:
            raise checkpoint.unusable(self.folder, damaged)
        return None

    def steps(self) -> list[int]:
        """Of the checkpoints to try, newest first."""
        if not self.folder.is_dir():
            return []
        checkpoint.tidy(self.folder)
        return checkpoint.candidates(self.folder)

    def told(self, steps: list[int]) -> list[int]:
        """What the first process says."""
        found: list[list[int] | None] = [steps]
        dist.broadcast_object_list(found, src=0, group=self.group)
        return found[0] or []


# what a process holds, by name


def held(place: Place, tensor: Tensor) -> Held:
    return Held(place.whole, tuple(place.boxes(local(tensor.detach()))))


def weights(model: nn.Module, cuts: Cuts) -> dict[str, Held]:
    """Parameters and buffers. Raises Refusal for a model with adapters."""
    if adapted(model):
        step = "train them on one process: set all sizes under [parallel] to 1"
        raise Refusal("adapters on several processes", "whole models", step)
    where = places(model, cuts)
    return {name: held(where[name], tensor) for name, tensor in model.state_dict(keep_vars=True).items()}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, cuts: Cuts) -> dict[str, Held]:
    """optimizer.<parameter>.<entry>; counts are held whole by everybody."""
    where = places(model, cuts)
    return {
        f"optimizer.{name}.{entry}": held(where[name], value) if value.ndim else Held.whole(value)
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def generators(model: HybridModel, rank: int) -> dict[str, Tensor]:
    """States of the random generators of this process."""
    suffix = f".{rank}" if rank else ""
    found = {f"rng.cpu{suffix}": torch.get_rng_state()}
    if model.device.type == "cuda":
        found[f"rng.cuda{suffix}"] = torch.cuda.get_rng_state(model.device)
    return found


# back again


def load(
    path: Path,
    manifest: Mapping[str, Any],
    model: HybridModel,
    optimizer: torch.optim.Optimizer,
    world: World,
    cuts: Cuts,
) -> None:
    """Reads this process's part of the checkpoint at `path` into model, optimizer and random generators."""
    shards = Shards(path, stored_in(path, manifest, model.config))
    for name, one in weights(model, cuts).items():
        shards.fill(name, one)
    model.version += 1
    load_optimizer(shards, model, optimizer, cuts)
    for name in generators(model, 0):
        own = f"{name}.{world.rank}"
        state = shards.read(own if own in shards.stored else name) if name in shards.stored else None
        if state is not None and name == "rng.cpu":
            torch.set_rng_state(state)
        elif state is not None:
            torch.cuda.set_rng_state(state, model.device)


def load_optimizer(shards: Shards, model: nn.Module, optimizer: torch.optim.Optimizer, cuts: Cuts) -> None:
    """Makes the entries that were saved, and fills them."""
    entries: dict[str, list[str]] = {}
    for key in shards.stored:
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            name, _, entry = rest.rpartition(".")
            entries.setdefault(name, []).append(entry)
    where, names = places(model, cuts), {parameter: name for name, parameter in model.named_parameters()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(ordered):
        name = names[parameter]
        for entry in entries.get(name, []):
            key = f"optimizer.{name}.{entry}"
            counted = not shards.stored[key].shape
            value = torch.zeros(()) if counted else torch.zeros_like(parameter, requires_grad=False)
            shards.fill(key, Held.whole(value) if counted else held(where[name], value))
            states.setdefault(index, {})[entry] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def stored_in(path: Path, manifest: Mapping[str, Any], config: ModelConfig) -> dict[str, Stored]:
    """All tensors of a checkpoint, of either kind, under the model's own names."""
    if manifest["format"] == SHARDED:
        return read_table(path)
    if (path / adapter.CONFIG).is_file():
        step = "resume it on one process: set all sizes under [parallel] to 1"
        raise Refusal(f"{path} holds adapters alone", "checkpoints of whole models", step)
    plain = build(config, "meta")
    files = hub.read_headers(hub.weight_files(path))
    wanted = {piece.hub_name: piece for piece in hub.all_pieces(plain)}
    hub.check(path, wanted, {name: entry for name, entry in files.items() if name in wanted})
    chunks: dict[str, list[Chunk]] = {}
    for name, piece in wanted.items():
        lead = () if piece.expert is None else (piece.expert,)
        offsets = (*lead, *(0 for _ in piece.shape))
        sizes = (*(1 for _ in lead), *piece.shape)
        chunks.setdefault(piece.name, []).append(Chunk(offsets, sizes, files[name].file.name, name))
    shapes = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    kinds = {piece.name: DTYPES[files[name].kind] for name, piece in wanted.items()}
    found = {name: Stored(shapes[name], kinds[name], tuple(some)) for name, some in chunks.items()}
    for name, entry in hub.read_headers([path / TRAINING]).items():
        whole = Chunk((0,) * len(entry.shape), entry.shape, TRAINING, name)
        found[name] = Stored(entry.shape, DTYPES[entry.kind], (whole,))
    return found


def opened(path: Path, config: ModelConfig) -> Shards:
    """The tensors of the checkpoint at `path`, of either kind. Raises Refusal for one that is not whole."""
    manifest, problem = checkpoint.check(path)
    if manifest is None:
        raise Refusal(f"{path} is damaged: {problem}", "a whole checkpoint", "take the one before it")
    return Shards(path, stored_in(path, manifest, config))


def piece_of(shards: Shards, piece: Piece) -> Tensor:
    """One tensor as the hub has it."""
    if piece.expert is None:
        return shards.read(piece.name)
    return shards.read(piece.name, (piece.expert, *(0 for _ in piece.shape)), (1, *piece.shape))[0]


def export(path: Path, config: ModelConfig, folder: Path, *, shard_bytes: int = 5_000_000_000) -> None:
    """Writes the weights of the checkpoint at `path`, of either kind, as a hub folder; one process calls it."""
    shards = opened(path, config)
    model = build(config, "meta", shards.stored["backbone.embeddings.weight"].dtype)
    hub.save(model, folder, shard_bytes=shard_bytes, read=lambda piece: piece_of(shards, piece))
