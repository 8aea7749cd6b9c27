"""Cutting elementwise work into pieces that stay in a CPU core's cache.

A chain of elementwise steps over a large tensor reads and writes memory at every step, and each large temporary costs
fresh pages from the operating system; the same chain over pieces does neither. On an accelerator one piece is best.
"""

from collections.abc import Iterator

import torch

ELEMENTS = 1 << 19  # of a piece's temporaries: 2 MiB in fp32


def blocks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover range(rows), each of at most ELEMENTS elements when a row has `width`."""
    step = rows if device.type != "cpu" else min(rows, max(1, ELEMENTS // max(1, width)))
    for start in range(0, rows, max(1, step)):
        yield slice(start, min(start + step, rows))
