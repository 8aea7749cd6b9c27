"""Settings of low-precision training: how numbers are rounded, and which layers stay in bf16."""

from typing import Literal

from pydantic import Field

from trimaran.config import Settings
from trimaran.errors import Refusal, nearest_first
from trimaran.model.kept import KEPT, Kept
from trimaran.quant.formats import NVFP4, Formats, FP8Blocks, FP8Tensor, Operand

Low = Literal["fp8", "nvfp4"]
BY_CHANCE = {
    "gradients": (Operand.GRADIENT, Operand.GRADIENT_TURNED),
    "none": (),
    "all": tuple(Operand),
}
END = 0.15  # share of the blocks, the last ones, that nvfp4 leaves in bf16 where no preset says more (arXiv 2509.25149)


class FormatSettings(Settings):
    """The table `[train.formats]`. What is left out is the published choice.

    like: a preset ("super-3") whose choice of layers is taken, its first and last blocks as shares of this depth.
    first, last: whole blocks that stay in bf16. high, mxfp8: kinds of maps ("attention", "mamba", "feedforward",
    "latent", "experts", "shared", "draft", "mtp"), or globs over names ("out_proj", "backbone.layers.3.*").
    scaling, wide_gradients (E5M2): of fp8. hadamard, by_chance, square_weights: of nvfp4, its ablations.
    """

    like: str | None = None
    first: int | None = Field(None, ge=0)
    last: int | None = Field(None, ge=0)
    high: tuple[str, ...] | None = None
    mxfp8: tuple[str, ...] | None = None
    scaling: Literal["tensor", "blocks"] | None = None
    wide_gradients: bool = True
    hadamard: bool = True
    by_chance: Literal["gradients", "none", "all"] = "gradients"
    square_weights: bool = True

    def formats(self, precision: Low) -> Formats:
        """How operands are rounded."""
        if precision == "nvfp4":
            return NVFP4(self.hadamard, BY_CHANCE[self.by_chance], self.square_weights)
        scaling = self.scaling or published(self.like, precision).scaling
        return FP8Blocks() if scaling == "blocks" else FP8Tensor(self.wide_gradients)

    def kept(self, precision: Low, blocks: int) -> Kept:
        """What stays high in a model of so many blocks. Raises Refusal where nothing else would be left."""
        base = published(self.like, precision)
        ends = [-(-count * blocks // base.blocks) for count in (base.first, base.last)]
        first = ends[0] if self.first is None else self.first
        last = ends[1] if self.last is None else self.last
        if first + last >= blocks:
            found = f"first = {first} and last = {last} of {blocks} blocks"
            raise Refusal(found, f"at most {blocks - 1} together", "lower one of them")
        high = base.high if self.high is None else self.high
        return Kept(precision, blocks, first, last, high, base.mxfp8 if self.mxfp8 is None else self.mxfp8)


def published(like: str | None, precision: Low) -> Kept:
    """The choice of a preset; without one the rule of the paper: fp8 everywhere, nvfp4 but for the last blocks."""
    if like is None:
        return Kept(precision, 100, 0, round(100 * END) if precision == "nvfp4" else 0)
    known = {name: one for name, kept in KEPT.items() for one in kept if one.precision == precision}
    if like not in known:
        near = nearest_first(like, known)
        found = f"formats.like = {like!r}, of which no training in {precision} is known"
        raise Refusal(found, ", ".join(near), f"did you mean {near[0]!r}?")
    return known[like]
