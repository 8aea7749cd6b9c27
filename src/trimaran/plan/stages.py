"""Which layers stand in which stage of a pipeline, as numbers of layers per letter.

The cut is the pipeline's own (`parallel/stages.py`: layers balanced by their forward FLOPs). A device with several
virtual stages has every pp-th chunk.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from trimaran.model.config import ModelConfig
from trimaran.parallel.stages import balanced
from trimaran.parallel.stages import stages as cut


@dataclass(frozen=True)
class Stage:
    """Layers of one device. first, last: it has the embedding; the head, the loss and the draft block."""

    layers: tuple[tuple[str, int], ...]
    first: bool
    last: bool


def stages(config: ModelConfig, sequence: int, pp: int, virtual: int, even: bool) -> tuple[Stage, ...]:
    """One entry per device along pp. even: as many layers each, whatever they cost."""
    if even:
        borders = balanced([1] * len(config.pattern), pp * virtual)
        parts = [range(start, stop) for start, stop in pairwise(borders)]
    else:
        parts = list(cut(config, pp * virtual, sequence // 2))
    found = []
    for place in range(pp):
        mine = Counter(config.pattern[layer] for part in parts[place::pp] for layer in part)
        found.append(Stage(tuple(sorted(mine.items())), place == 0, place == pp - 1))
    return tuple(found)
