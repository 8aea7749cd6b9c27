"""What published models kept in bf16 while they trained in narrow numbers; a part of each preset.

`high` and `mxfp8` name kinds of linear maps (see quant.rewrite) or globs over their names. Always high, and named
nowhere: embedding, head, norms, routers, convolutions, the scan, attention's own products. (S): NVIDIA's own summary of
the report, (P): the paper, (?): not confirmed. Nano 3 trained in bf16 and has no entry.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Kept:
    """`first` and `last` blocks of `blocks`, whole, and maps of the kinds in `high` stay in bf16."""

    precision: Literal["fp8", "nvfp4"]
    blocks: int
    first: int = 0
    last: int = 0
    high: tuple[str, ...] = ()
    mxfp8: tuple[str, ...] = ()
    scaling: Literal["tensor", "blocks"] = "tensor"  # of fp8


LIKE_SUPER = ("attention", "latent", "mtp")

KEPT: dict[str, tuple[Kept, ...]] = {
    # (P) arXiv 2504.03624: per tensor, first and last four layers; Megatron-Bridge's own preset keeps two and two
    "nemotron-h-8b": (Kept("fp8", 52, 4, 4),),
    "nemotron-h-47b": (Kept("fp8", 98, 4, 4),),  # (?) distilled in fp8; the layers as the parent's
    "nemotron-h-56b": (Kept("fp8", 118, 4, 4),),
    "nano-12b-v2": (
        Kept("fp8", 62, scaling="blocks"),  # (P) arXiv 2508.14444: 128 x 128 and 1 x 128; (?) which layers stay high
        Kept("nvfp4", 62, 2, 8),  # (P) arXiv 2509.25149: the same shape, first 2 and last 8 blocks
    ),
    # (S) the last 14 of 88; latent projections, MTP, QKV and attention's output; Mamba's output in MXFP8
    "super-3": (Kept("nvfp4", 88, 0, 14, LIKE_SUPER, ("out_proj",)),),
    # (S) the last 16; (?) the rest as Super
    "ultra-3": (Kept("nvfp4", 108, 0, 16, LIKE_SUPER, ("out_proj",)),),
}
