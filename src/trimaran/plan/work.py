"""How much one layer computes for a micro-batch, as a vector of counts, and how long a machine takes for them.

Time is linear in the counts: seconds = work . rates. So the rates of a machine can be fitted to measured steps by least
squares (measure.py), and the same rates hold for every model.

    matmul      FLOPs of matrix products, in the precision of the job
    wide        FLOPs of matrix products that stay in bf16 or fp32 (the head)
    attention   FLOPs of fused attention
    scan        FLOPs of the chunked scan
    traffic     bytes that products, norms, activations, gates, convolution and permutation read and write
    launches    operations started
"""

from dataclasses import dataclass, fields

from trimaran.model.config import ModelConfig
from trimaran.plan.blocks import HEAD, Block, Product
from trimaran.plan.hardware import Hardware, Precision
from trimaran.plan.layout import Layout
from trimaran.plan.practice import Practice

BACKWARD, FUSED_BACKWARD = 2.0, 2.5
SCORE_BYTES = (13, 18)  # passes over unfused scores forward and backward: scale, softmax, dropout and its mask
# Operations of a forward pass besides the loop over the scan's chunks, as counted in this library's layers.
OPERATIONS = {"M": 60, "*": 40, "R": 56, "W": 60, "E": 80, "-": 24}
OTHERS = 20


@dataclass(frozen=True)
class Work:
    """Counts of one pass; see the module."""

    matmul: float = 0.0
    wide: float = 0.0
    attention: float = 0.0
    scan: float = 0.0
    traffic: float = 0.0
    launches: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self.values, other.values)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(times * a for a in self.values))

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(getattr(self, one.name) for one in fields(self))


@dataclass(frozen=True)
class Setting:
    """What the work of a layer depends on besides the layer and the layout."""

    config: ModelConfig
    sequence: int
    precision: Precision
    practice: Practice
    hardware: Hardware

    @property
    def value(self) -> int:
        """Bytes of an activation."""
        return 4 if self.precision == "fp32" else 2

    def row_tokens(self, layout: Layout) -> int:
        """Tokens of a micro-batch that one cp part holds."""
        return layout.micro_batch * self.sequence // layout.cp

    def local_tokens(self, layout: Layout) -> int:
        """Tokens of the residual stream that one device holds."""
        rows = self.row_tokens(layout)
        return rows // layout.tp if self.practice.sequence_parallel else rows

    def work(self, part: Block, layout: Layout) -> tuple[Work, Work]:
        """A layer's forward and backward pass over one micro-batch."""
        both = self.products(part, layout)
        forward, backward = self.mixing(part, layout)
        return both + forward, both * BACKWARD + backward

    def products(self, part: Block, layout: Layout) -> Work:
        """Matrix products, what passes between them, and the operations that all of it starts."""
        tokens, local, tp = self.row_tokens(layout), self.local_tokens(layout), layout.tp
        flops = traffic = 0.0
        for one in part.products:
            times, slim = (tokens, tp) if one.cut else (local, 1)
            flops += 2 * times * one.inputs * one.outputs / slim
            traffic += self.product_bytes(one, times, slim)
        if part.experts:
            held, rows = part.experts / layout.ep, local * part.chosen
            padded = rows + held * self.hardware.reach.tile / 2
            for one in part.expert_products:
                flops += 2 * padded * one.inputs * one.outputs
                traffic += self.value * (rows * (one.inputs + one.outputs) + held * one.inputs * one.outputs)
            traffic += 4 * self.value * rows * part.dispatched  # out to the experts' order and back
        traffic += self.value * (part.passed_cut * tokens / tp + part.passed_whole * local)
        started = OPERATIONS.get(part.letter, OTHERS)
        if part.letter == HEAD:
            return Work(wide=flops, traffic=traffic, launches=started)
        return Work(matmul=flops, traffic=traffic, launches=started)

    def product_bytes(self, one: Product, tokens: int, slim: int) -> float:
        inputs = one.inputs / slim if one.cut == "in" else one.inputs
        outputs = one.outputs / slim if one.cut == "out" else one.outputs
        return self.value * (tokens * (inputs + outputs) + one.inputs * one.outputs / slim)

    def mixing(self, part: Block, layout: Layout) -> tuple[Work, Work]:
        """Attention's scores and the scan: what grows with the row, forward and backward."""
        tokens = self.row_tokens(layout)
        if part.scan_flops:
            twice = 1.5 if layout.cp > 1 and self.practice.scan_by_state else 1.0
            chunks = self.sequence / layout.cp / self.config.chunk_size
            once = Work(scan=tokens * part.scan_flops / layout.tp, launches=chunks * self.hardware.chunk_operations)
            return once * twice, once * FUSED_BACKWARD
        if not part.key_flops:
            return Work(), Work()
        if self.practice.fused_attention:
            uneven = 1.0 if self.practice.balanced_context else 2 - 1 / layout.cp
            once = Work(attention=tokens * part.key_flops * part.keys(self.sequence) * uneven / layout.tp)
            return once, once * FUSED_BACKWARD
        flops = tokens * part.key_flops * self.sequence / layout.tp
        scores = tokens * part.heads * self.sequence / layout.tp * self.value / 2
        there, back = SCORE_BYTES
        return Work(matmul=flops, traffic=there * scores), Work(matmul=BACKWARD * flops, traffic=back * scores)


def rates(hardware: Hardware, precision: Precision) -> Work:
    """Seconds per count on a machine."""
    reach = hardware.reach
    wide = hardware.flops("fp32" if precision == "fp32" else "bf16")
    return Work(
        matmul=1 / (hardware.flops(precision) * reach.matmul),
        wide=1 / (wide * reach.matmul),
        attention=1 / (wide * reach.attention),
        scan=1 / (wide * reach.scan),
        traffic=1 / (hardware.bandwidth * reach.memory),
        launches=reach.launch,
    )


def seconds_of(work: Work, rate: Work) -> float:
    """The inner product."""
    return sum(a * b for a, b in zip(work.values, rate.values))
