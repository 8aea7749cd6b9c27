"""Where a stack of unequal layers is cut into the stages of a pipeline: the slowest stage sets the pace.

Costs are forward FLOPs per token from `model.size`: a Mamba block, an attention block over a long context and an expert
block differ several times over, and the head with the draft block (MTP) weighs as much as some blocks together. They
stand behind the last layer, so the last stage gets fewer of those.

`cut_stage` leaves a process its stage; `pipeline.py` runs it.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from torch import Tensor, nn

from trimaran.errors import Refusal
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import HybridModel
from trimaran.model.size import count
from trimaran.parallel.world import World


def stages(config: ModelConfig, number: int, context: int = 0) -> tuple[range, ...]:
    """The layers of each of `number` stages; context: keys that a query sees on average.

    Raises Refusal for more stages than layers.
    """
    layers = len(config.pattern)
    if number > layers:
        raise Refusal(f"parallel.pp = {number} for {layers} layers", f"at most {layers} stages", "lower parallel.pp")
    blocks, end = costs(config, context)
    borders = balanced([*blocks[:-1], blocks[-1] + end], number)
    return tuple(range(start, stop) for start, stop in pairwise(borders))


def costs(config: ModelConfig, context: int) -> tuple[list[int], int]:
    """Forward FLOPs per token: of each layer, and of what follows the last: the head, and the draft block's depths."""

    def flops(pattern: str) -> int:
        # model_copy validates nothing, so that a stack without layers can be counted
        alone = config.model_copy(update={"pattern": pattern, "mtp_pattern": ""})
        return count(alone).flops_per_token(context)

    head = flops("")
    letters = {letter: flops(letter) - head for letter in set(config.pattern + config.mtp_pattern)}
    depth = 0
    if config.mtp_pattern:
        joining = 2 * 2 * config.hidden_size**2  # from embedding and hidden vector to one
        depth = sum(letters[letter] for letter in config.mtp_pattern) + joining + head
    return [letters[letter] for letter in config.pattern], head + config.mtp_depth * depth


def balanced(costs: Sequence[int], number: int) -> list[int]:
    """Borders 0 = b_0 < ... < b_number = len(costs) of contiguous parts, none empty.

    The largest sum of a part is as small as can be; among such cuts the sum of squares is, so that the rest is even.
    """
    before = [0, *accumulate(costs)]
    limit = smallest_limit(costs, number)
    # ways[end]: (sum of squares, borders) of the best cut of the first `end` layers into as many parts as rounds so far
    ways: dict[int, tuple[int, list[int]]] = {0: (0, [0])}
    for _ in range(number):
        longer: dict[int, tuple[int, list[int]]] = {}
        for start, (squares, borders) in ways.items():
            for stop in range(start + 1, len(before)):
                part = before[stop] - before[start]
                if part > limit:
                    break
                if stop not in longer or squares + part**2 < longer[stop][0]:
                    longer[stop] = squares + part**2, [*borders, stop]
        ways = longer
    return ways[len(costs)][1]


def smallest_limit(costs: Sequence[int], number: int) -> int:
    """The smallest sum that no part has to exceed, found by bisection; parts are filled from the left."""
    low, high = max(costs), sum(costs)
    while low < high:
        limit = (low + high) // 2
        parts, room = 1, limit
        for cost in costs:
            if cost > room:
                parts, room = parts + 1, limit
            room -= cost
        low, high = (low, limit) if parts <= number else (limit + 1, high)
    return low


class Elsewhere(nn.Module):
    """Stands for a layer of another stage, so that the names of those here stay; passes on what it is given.

    weight: empty, of the dtype and on the device of what stood here.
    """

    weight: Tensor

    def __init__(self, module: nn.Module):
        super().__init__()
        self.register_buffer("weight", next(module.parameters()).detach().new_empty(0), persistent=False)

    def forward(self, x: Tensor, *given: object) -> Tensor:
        return x


def cut_stage(model: HybridModel, world: World, context: int = 0) -> range:
    """Leaves this process its stage of `model`, in place; returns its layers.

    context: keys that a query sees on average, for the balance. Raises Refusal for more stages than layers.
    """
    stage, backbone = world.place["pp"], model.backbone
    own = stages(model.config, world.settings.pp, context)[stage]
    for index, block in enumerate(backbone.layers):
        if index not in own:
            backbone.layers[index] = Elsewhere(block)
    first, last = stage == 0, stage == world.settings.pp - 1
    if not first and not (last and read_at_the_end(model)):
        backbone.embeddings = Elsewhere(backbone.embeddings)  # type: ignore[assignment]
    if not last:
        model.ends, model.mtp = False, None
        if next(backbone.norm_f.parameters(), None) is not None:
            backbone.norm_f = Elsewhere(backbone.norm_f)  # type: ignore[assignment]
        if not model.config.tie_embeddings:
            del model.lm_head
    return own


def read_at_the_end(model: HybridModel) -> bool:
    """Whether the last stage reads the embedding."""
    return model.config.tie_embeddings or bool(model.config.mtp_pattern)
