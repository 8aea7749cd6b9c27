"""Where the pieces of a parameter lie that one process holds.

tp and ep leave a process some stretches of one dimension of a tensor (`Cut`); fsdp leaves it some rows of those. Both
together are boxes in the whole tensor, as one process has it: checkpoints are written and read in those coordinates, so
that any layout reads any other's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """What tp or ep leaves of one parameter: `spans` [start, stop) of dimension `dim`, one behind the other.

    whole: the parameter's shape in one process.
    """

    whole: Shape
    dim: int
    spans: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> Shape:
        """What is left, before fsdp."""
        kept = sum(stop - start for start, stop in self.spans)
        return (*self.whole[: self.dim], kept, *self.whole[self.dim + 1 :])


def uncut(shape: Shape) -> Cut:
    """All of a parameter."""
    return Cut(shape, 0, ((0, shape[0]),))


@dataclass(frozen=True)
class Box:
    """A block of a whole tensor at `offsets`, and the view of it in a local one."""

    offsets: Shape
    view: Tensor

    @property
    def sizes(self) -> Shape:
        return tuple(self.view.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Of the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.sizes))


@dataclass(frozen=True)
class Place:
    """Where a parameter's local part lies: rows [first, first + rows) of what `cut` leaves."""

    cut: Cut
    first: int
    rows: int

    @property
    def whole(self) -> Shape:
        return self.cut.whole

    def boxes(self, part: Tensor) -> list[Box]:
        """The boxes of a tensor shaped as the local part: the parameter itself, its gradient, an optimizer's state."""
        wanted = (self.rows, *self.cut.shape[1:])
        if part.shape != wanted:
            raise ValueError(f"a local part of shape {tuple(part.shape)}, where {wanted} lies")
        found, before, dim = [], 0, self.cut.dim
        first, last = (self.first, self.first + self.rows) if dim == 0 else (0, self.cut.shape[dim])
        for start, stop in self.cut.spans:
            low, high = max(before, first), min(before + stop - start, last)
            if low < high and self.rows:
                offsets = [0] * len(self.whole)
                offsets[0] = self.first
                offsets[dim] = start + low - before
                found.append(Box(tuple(offsets), part.narrow(dim, low - first, high - low)))
            before += stop - start
        return found


def places(model: nn.Module, cuts: Mapping[str, Cut]) -> dict[str, Place]:
    """The place of every parameter and buffer of the model's state_dict. cuts: what `parallelize` returned.

    Weights that a pass has gathered are given back first, so that the model's parameters are the local parts.
    """
    gather_no_more(model)
    return {name: place(tensor, cuts.get(name)) for name, tensor in model.state_dict(keep_vars=True).items()}


def place(parameter: Tensor, cut: Cut | None = None) -> Place:
    """cut: None where tp and ep leave it whole."""
    cut = cut or uncut(tuple(parameter.shape))
    if tuple(parameter.shape) != cut.shape:
        raise ValueError(f"a parameter of shape {tuple(parameter.shape)}, where {cut.shape} was cut")
    for axis, placement in enumerate(getattr(parameter, "placements", ())):  # of a DTensor
        if placement.is_shard():  # as torch.chunk cuts: equal rows but for the last ranks
            mesh: DeviceMesh = parameter.device_mesh  # type: ignore[attr-defined]
            each = -(-cut.shape[0] // mesh.size(axis))
            first = min(each * mesh.get_local_rank(axis), cut.shape[0])
            return Place(cut, first, min(each, cut.shape[0] - first))
    return Place(cut, 0, cut.shape[0])


def gather_no_more(model: nn.Module) -> None:
    """Gives back the weights that fsdp gathered for a pass without backward, such as an evaluation."""
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a parameter, gradient or optimizer state: a view, not a copy."""
    # Asked by its method: importing DTensor takes a second, which a run on one process need not wait for.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
