"""Bytes of one device under a layout, by part; the fullest stage of the pipeline counts.

Weights, gradients and optimizer state: bytes per parameter over the ranks that share it. Activations: what each layer
keeps for its backward pass, times the micro-batches that are under way in a stage: min(m, pp - i + (pp - 1)/v) for 1F1B
with v chunks per device (arXiv 2205.05198; v = 1: pp - i). A recomputed layer keeps its input alone; the rest of one
layer at a time is there while its gradient is taken. Gradients that are summed over several micro-batches before they
travel lie whole. With several micro-batches the total grows with their size, and it shrinks with recomputation; the
search relies on both.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil

from trimaran.plan.blocks import HEAD, Block
from trimaran.plan.costs import TABLE, Costs, spread
from trimaran.plan.layout import Layout
from trimaran.plan.stages import Stage

ROOTS = (HEAD, TABLE)  # their weights stay gathered


@dataclass
class Bytes:
    """Bytes of one device by part."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    gathered: int = 0
    activations: int = 0
    logits: int = 0
    dispatch: int = 0

    @property
    def total(self) -> int:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.gathered
            + self.activations
            + self.logits
            + self.dispatch
        )


@dataclass
class Room:
    """Memory of layouts for one job. Layers are remembered by what they depend on."""

    costs: Costs
    _held: dict[tuple[object, ...], tuple[int, int, int, int]] = field(default_factory=dict)
    _kept: dict[tuple[object, ...], tuple[int, int]] = field(default_factory=dict)

    def needed(self, layout: Layout) -> Bytes:
        """The parts of the fullest stage."""
        return max(self.by_stage(layout), key=lambda parts: parts.total)

    def fits(self, layout: Layout, usable: float) -> bool:
        """Whether no stage needs more, found without looking at stages behind one that does."""
        return all(parts.total <= usable for parts in self.by_stage(layout))

    def by_stage(self, layout: Layout) -> Iterator[Bytes]:
        """The parts of each stage that differs from those before it; the first is often the fullest."""
        count = self.costs.job.rows // layout.rows // layout.micro_batch
        seen = set()
        for place, stage in enumerate(self.costs.stages(layout)):
            waiting = layout.pp - place + ((layout.pp - 1) / layout.virtual if layout.virtual > 1 else 0)
            under_way = min(count, waiting)
            if (stage, under_way) not in seen:
                seen.add((stage, under_way))
                yield self.of_stage(stage, layout, under_way, count > 1)

    def of_stage(self, stage: Stage, layout: Layout, under_way: float, several: bool) -> Bytes:
        """One stage with so many micro-batches under way (a share of one, with virtual stages), of several or one."""
        practice, parts = self.costs.job.practice, Bytes()
        widest = again = 0
        for part, passes, copies in self.costs.content(stage):
            mine, shard, whole, out = self.held(part, layout)
            parts.weights += copies * mine * practice.weight
            summing = whole if several and practice.sums_last else mine
            parts.gradients += copies * summing * practice.gradient
            parts.optimizer += copies * shard * practice.optimizer
            if part.letter in ROOTS:
                parts.gathered += out
                continue
            widest = max(widest, out)
            full, sent = self.kept(part, layout)
            if part.letter in layout.recompute:
                held = part.width * self.costs.job.setting.local_tokens(layout) * practice.stream
                again = max(again, full + sent - held)
                full, sent = held, 0
            parts.activations += ceil(under_way * passes * full)
            parts.dispatch += ceil(under_way * passes * sent)
        parts.gathered += 2 * widest + widest // practice.message * practice.summed
        parts.activations += again
        if stage.last:
            parts.logits = self.logits(layout)
        return parts

    def held(self, part: Block, layout: Layout) -> tuple[int, int, int, int]:
        """Of one layer: parameters a device stores, updates, works with; bytes when its weights are gathered."""
        key = (part, layout.fsdp, layout.cp, layout.tp, layout.ep)
        if key not in self._held:
            practice, found = self.costs.job.practice, list(spread(part, layout))
            shard = ceil(sum(weights / members for weights, members, _ in found))
            whole = ceil(sum(weights for weights, _, _ in found))
            out = ceil(sum(weights for weights, members, _ in found if members > 1)) * practice.message
            shards = practice.shards_weights
            self._held[key] = (shard if shards else whole), shard, whole, (out if shards else 0)
        return self._held[key]

    def kept(self, part: Block, layout: Layout) -> tuple[int, int]:
        """Bytes that one layer keeps of a micro-batch: activations, and the tokens exchanged among experts."""
        key = (part, layout.micro_batch, layout.cp, layout.tp)
        if key not in self._kept:
            job, practice = self.costs.job, self.costs.job.practice
            tokens, local, value = (
                self.costs.job.setting.row_tokens(layout),
                self.costs.job.setting.local_tokens(layout),
                job.value,
            )
            found = value * (part.kept_cut * tokens // layout.tp + (part.kept_whole - part.width) * local)
            found += part.width * local * practice.stream
            if practice.keeps_gathered and part.tensor and layout.tp > 1:
                found += value * part.width * tokens
            if part.key_flops and not practice.fused_attention:
                found += 5 * part.heads * tokens // layout.tp * job.sequence * value // 2
            sent = 2 * local * part.chosen * value * part.dispatched
            self._kept[key] = found + local * part.chosen * value * part.kept_experts, sent
        return self._kept[key]

    def logits(self, layout: Layout) -> int:
        """One chunk of logits in fp32, their gradient and a copy; the hidden gradient; the head's gradient in fp32."""
        job, tokens = self.costs.job, self.costs.job.setting.row_tokens(layout)
        vocabulary = job.config.vocab_size // layout.tp
        chunk = min(tokens, job.practice.loss_chunk or tokens)
        once = chunk * vocabulary * (8 + job.value)
        return once + tokens * job.config.hidden_size * job.value + 4 * vocabulary * job.config.hidden_size
