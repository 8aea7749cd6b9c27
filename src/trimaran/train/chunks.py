"""How the checkpoint of many processes lies on disk: boxes of tensors in safetensors, and a page that says where.

    shard-00003.safetensors    what process 3 wrote, each box under NAME@OFFSETS
    tensors.json               of each tensor the whole shape, the dtype and its boxes: offsets, sizes, file, key

A box is a part of a tensor in coordinates of the whole one, as a single process has it, so any layout reads what any
other wrote. torch's DCP plans: which process writes what several hold, whether the boxes of all fill every tensor,
which saved boxes a wanted one meets; and what goes wrong on one process it tells to all. The storage is ours: DCP's own
keeps the plan in a pickle, and a checkpoint must not be able to run code; torch's safetensors storage has no pickle,
but has room for one box per tensor and process, and a part of Mamba's in_proj is five.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from trimaran.data.shards import checksum
from trimaran.disk import sync
from trimaran.errors import Refusal, writing
from trimaran.model import hub
from trimaran.parallel.places import Box
from trimaran.train.checkpoint import save_tensors

TENSORS = "tensors.json"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Held:
    """What this process holds of a tensor of `shape`."""

    shape: Shape
    boxes: tuple[Box, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> "Held":
        return cls(tuple(tensor.shape), (Box((0,) * tensor.ndim, tensor.detach()),))

    def copied(self) -> "Held":
        """The same on the CPU, in memory of its own."""
        boxes = (
            Box(box.offsets, box.view.detach().to("cpu", copy=True, memory_format=torch.contiguous_format))
            for box in self.boxes
        )
        return Held(self.shape, tuple(boxes))


# writing


class BoxPlanner(DefaultSavePlanner):
    """DCP's planner over a table name -> `Held`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """All boxes here; of those that others hold too, DCP drops all but one."""
        found = [(name, held, box) for name, held in self.state_dict.items() for box in held.boxes]
        self.plan = SavePlan([write_item(name, held, box) for name, held, box in found if box.view.numel()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        wanted = tuple(index.offset or ())
        view: Tensor = next(box.view for box in self.state_dict[index.fqn].boxes if box.offsets == wanted)
        return view


def write_item(name: str, held: Held, box: Box) -> WriteItem:
    offsets = torch.Size(box.offsets)
    chunk = ChunkStorageMetadata(offsets, box.view.shape)
    data = TensorWriteData(chunk, TensorProperties(box.view.dtype), torch.Size(held.shape))
    return WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)


@dataclass(frozen=True)
class Written:
    """A file of a checkpoint."""

    name: str
    size: int
    checksum: int


class ChunkWriter(StorageWriter):
    """Writes the boxes of each process into a file of its own in the new folder `stage`; one writer per save.

    commit: called by the first process once all have written, with the files. What it does makes the folder a
    checkpoint; until then there is none.
    """

    def __init__(self, stage: Path, commit: Callable[[list[Written]], None]):
        self.stage, self.commit = stage, commit

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """DCP's interface has it; nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """As `reset`."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first process: the folder, and the name of a file in it for each."""
        with writing(self.stage):
            shutil.rmtree(self.stage, ignore_errors=True)
            self.stage.mkdir(parents=True)
        return [replace(plan, storage_data=f"shard-{rank:05}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One file, synced; none where others write all that is held here."""
        results = []
        if plan.items:
            path = self.stage / str(plan.storage_data)
            with writing(path):
                save_tensors({key(item.index): values(planner, item) for item in plan.items}, path)
                path.chmod(0o644)  # the library writes 0600
                sync(path)
                written = Written(path.name, path.stat().st_size, checksum(path))
            results = [WriteResult(item.index, written.size, written) for item in plan.items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first process, once all have written."""
        files: dict[MetadataIndex, Written] = {one.index: one.storage_data for some in results for one in some}
        table = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)  # nothing else is planned
            indices = [MetadataIndex(name, chunk.offsets) for chunk in entry.chunks]
            boxes = [
                [[*chunk.offsets], [*chunk.sizes], files[index].name, key(index)]
                for chunk, index in zip(entry.chunks, indices)
            ]
            table[name] = {"shape": [*entry.size], "dtype": dtype_name(entry.properties.dtype), "boxes": boxes}
        page = self.stage / TENSORS
        with writing(page):
            page.write_text(json.dumps(table), encoding="utf-8")
            self.commit(list(dict.fromkeys(files.values())))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def key(index: MetadataIndex) -> str:
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


def values(planner: SavePlanner, item: WriteItem) -> Tensor:
    found = planner.resolve_data(item)
    assert isinstance(found, Tensor)
    return found


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# reading


@dataclass(frozen=True)
class Chunk:
    """A box on disk: `key` of `file` holds it, maybe without leading dimensions of size 1, which the hub leaves out."""

    offsets: Shape
    sizes: Shape
    file: str
    key: str


@dataclass(frozen=True)
class Stored:
    """A tensor on disk."""

    shape: Shape
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    def described(self) -> TensorStorageMetadata:
        """The same in DCP's words."""
        chunks = [ChunkStorageMetadata(torch.Size(one.offsets), torch.Size(one.sizes)) for one in self.chunks]
        return TensorStorageMetadata(TensorProperties(self.dtype), torch.Size(self.shape), chunks)


def read_table(folder: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint that many processes wrote."""
    table = json.loads((folder / TENSORS).read_text(encoding="utf-8"))
    found = {}
    for name, entry in table.items():
        chunks = (Chunk(tuple(offsets), tuple(sizes), file, key) for offsets, sizes, file, key in entry["boxes"])
        found[name] = Stored(tuple(entry["shape"]), getattr(torch, entry["dtype"]), tuple(chunks))
    return found


class Shards:
    """The tensors of a checkpoint's folder, whatever their boxes; files are opened once and mapped, not read."""

    def __init__(self, folder: Path, stored: Mapping[str, Stored]):
        self.folder, self.stored = folder, stored
        self.opened: dict[str, safe_open] = {}

    @torch.no_grad()
    def fill(self, name: str, held: Held) -> None:
        """Copies the stored values into the boxes. Raises Refusal where the tensor is missing or of another shape."""
        stored = self.stored.get(name)
        if stored is None or stored.shape != held.shape:
            found = f"{self.folder} has {name} in shape {[*stored.shape]}" if stored else f"{self.folder} lacks {name}"
            raise Refusal(found, f"shape {[*held.shape]}", "resume with the recipe and the version that wrote it")
        metadata = stored.described()
        for box in held.boxes:
            wanted = ChunkStorageMetadata(torch.Size(box.offsets), box.view.shape)
            items = create_read_items_for_chunk_list(name, metadata, [wanted])
            if sum(prod(item.lengths) for item in items) != box.view.numel():
                found = f"{self.folder} has only a part of {name}"
                raise Refusal(found, "the whole tensor", "remove this checkpoint; the one before it is taken then")
            for item in items:
                target = box.view
                for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths)):
                    target = target.narrow(dim, start, length)
                chunk = stored.chunks[item.storage_index.index or 0]
                target.copy_(self.cut(chunk, item.storage_offsets, item.lengths))

    def read(self, name: str, offsets: Shape | None = None, sizes: Shape | None = None) -> Tensor:
        """A tensor or a part of it, put together on the CPU."""
        stored = self.stored[name]
        part = torch.empty(stored.shape if sizes is None else sizes, dtype=stored.dtype)
        self.fill(name, Held(stored.shape, (Box(offsets or (0,) * len(stored.shape), part),)))
        return part

    def cut(self, chunk: Chunk, starts: Shape, lengths: Shape) -> Tensor:
        """A part of a box."""
        if chunk.file not in self.opened:
            self.opened[chunk.file] = hub.opened(self.folder / chunk.file)
        shard = self.opened[chunk.file]
        if not chunk.sizes:
            return shard.get_tensor(chunk.key)
        rows = shard.get_slice(chunk.key)
        left_out = len(chunk.sizes) - len(rows.get_shape())
        ranges = [slice(start, start + length) for start, length in zip(starts, lengths)][left_out:]
        found: Tensor = rows[tuple(ranges)]
        return found.reshape(lengths)
