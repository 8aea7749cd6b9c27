"""Seconds of one optimizer step under a layout: computing, messages, what hides what, and the pipeline's idle time.

An implementation of the idea of arXiv 2501.00254 (computation, communication and their overlap are costed apart and
then put together); its formulas were not published, these are our own:

    layer      t(n) = f0 + f1 n     n tokens at once. A matrix product takes flops / (peak x reach) + bytes / (bandwidth
                                    x reach) + launch: the second term is what makes narrow slices inefficient
    stage      t = together(computing, hidden messages) + exposed messages       per micro-batch
    pipeline   m max(t) + (sum(t) - max(t)) / v                                  m micro-batches, v chunks per device
    step       pipeline + what is left of the last sums + the optimizer's pass over its state

`together` is Galvatron's form with two slow-down coefficients (links.py). Backward is two forwards, 2.5 for fused
attention and the scan, and one more forward where a layer is recomputed.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from trimaran.model.config import ATTENTION, ModelConfig
from trimaran.plan.blocks import Block, block, draft, head, model_flops
from trimaran.plan.hardware import Hardware, Precision
from trimaran.plan.layout import Layout
from trimaran.plan.links import seconds, together
from trimaran.plan.practice import TRIMARAN, Practice
from trimaran.plan.stages import Stage, stages
from trimaran.plan.work import Setting, Work, rates, seconds_of

TABLE = "table"
ADAM_BYTES = 28  # read and written per parameter: weight, gradient, two moments in fp32; 3 are written


@dataclass(frozen=True)
class Job:
    """What is to be trained on what: a model, rows of `sequence` tokens per step, hardware, number format, practice."""

    config: ModelConfig
    sequence: int
    rows: int
    hardware: Hardware
    precision: Precision = "bf16"
    practice: Practice = TRIMARAN

    @property
    def tokens(self) -> int:
        return self.rows * self.sequence

    @cached_property
    def setting(self) -> Setting:
        """What the work of a layer depends on."""
        return Setting(self.config, self.sequence, self.precision, self.practice, self.hardware)

    @cached_property
    def rates(self) -> Work:
        """Seconds per count of work."""
        return rates(self.hardware, self.precision)

    @property
    def value(self) -> int:
        """Bytes of an activation."""
        return self.setting.value

    @cached_property
    def model_flops(self) -> float:
        """Model FLOPs of one step."""
        return model_flops(self.config, self.sequence) * self.tokens


@dataclass(frozen=True)
class Pass:
    """Seconds of one layer and micro-batch: computing forward and backward, messages of three axes."""

    forward: float
    backward: float
    tensor: tuple[float, float]
    context: tuple[float, float]
    expert: tuple[float, float]


@dataclass
class Times:
    """Seconds of a step by part; `total` is their sum, with `overlap` taken off."""

    compute: float = 0.0
    recompute: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0
    data: float = 0.0
    pipeline: float = 0.0
    bubble: float = 0.0
    waiting: float = 0.0
    optimizer: float = 0.0
    other: float = 0.0
    overlap: float = 0.0  # hidden: negative

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass
class Costs:
    """Times of layouts for one job. Layers are remembered by what they depend on."""

    job: Job
    _passes: dict[tuple[object, ...], Pass] = field(default_factory=dict)
    _data: dict[tuple[object, ...], tuple[float, float]] = field(default_factory=dict)
    _tails: dict[tuple[object, ...], tuple[float, float, float]] = field(default_factory=dict)
    _stages: dict[tuple[int, int], tuple[Stage, ...]] = field(default_factory=dict)
    _contents: dict[Stage, list[tuple[Block, int, int]]] = field(default_factory=dict)

    def step(self, layout: Layout) -> Times:
        """The step's time by part. The parts of the slowest stage, times the number of micro-batches."""
        job = self.job
        count = job.rows // layout.rows // layout.micro_batch
        found = self.stages(layout)
        alike = {stage: self.stage(stage, layout) for stage in set(found)}
        each = [alike[stage] for stage in found]
        slowest = max(each, key=lambda times: times.total)
        parts = Times(**{name: count * value for name, value in vars(slowest).items()})
        parts.bubble = (sum(times.total for times in each) - slowest.total) / layout.virtual
        if layout.world > layout.pp:
            parts.waiting = job.hardware.reach.waits * parts.compute
        self.add_tail(parts, set(found), layout)
        return parts

    def stages(self, layout: Layout) -> tuple[Stage, ...]:
        """One entry per device along pp."""
        job, key = self.job, (layout.pp, layout.virtual)
        if key not in self._stages:
            self._stages[key] = stages(job.config, job.sequence, *key, job.practice.even_stages)
        return self._stages[key]

    def stage(self, stage: Stage, layout: Layout) -> Times:
        """One micro-batch through one stage, forward and backward."""
        practice, parts, hidden = self.hides, Times(), 0.0
        for part, number, _ in self.content(stage):
            one, again = self.passed(part, layout), part.letter in layout.recompute
            parts.compute += number * (one.forward + one.backward)
            parts.recompute += number * one.forward * again
            parts.tensor += number * (sum(one.tensor) + one.tensor[0] * again)
            parts.context += number * (sum(one.context) + one.context[0] * again)
            parts.expert += number * (sum(one.expert) + one.expert[0] * again)
            parts.data += number * sum(self.data(part, layout))
        parts.pipeline = self.handed_on(layout)
        hidden += parts.data if practice.hides_data else 0.0
        hidden += parts.tensor if practice.hides_tensor else 0.0
        hidden += parts.expert if practice.hides_experts else 0.0
        hidden += parts.pipeline if practice.hides_pipeline else 0.0
        working, reach = parts.compute + parts.recompute, self.job.hardware.reach
        parts.overlap = together(working, hidden, reach.slowed_compute, reach.slowed_link) - working - hidden
        return parts

    def content(self, stage: Stage) -> list[tuple[Block, int, int]]:
        """The layers of a stage: how often each is passed, and how many of it there are."""
        if stage not in self._contents:
            self._contents[stage] = self.list_content(stage)
        return self._contents[stage]

    def list_content(self, stage: Stage) -> list[tuple[Block, int, int]]:
        config = self.job.config
        found = [(block(config, letter), number, number) for letter, number in stage.layers]
        if stage.last:
            depth = config.mtp_depth if config.mtp_pattern else 0
            found.append((head(config), 1 + depth, 1))
            found += [(part, depth, 1) for part in draft(config)]
        if stage.first or (stage.last and (config.tie_embeddings or config.mtp_pattern)):
            found.append((table(config), 1, 1))
        return found

    def computing(self, layout: Layout) -> float:
        """Computing of a step without recomputation, spread evenly over the stages: less than any step takes.

        Layers cost f0 + f1 n, so one micro-batch of all rows bounds every other from below.
        """
        rows = self.job.rows // layout.rows
        whole = Layout(cp=layout.cp, tp=layout.tp, ep=layout.ep, micro_batch=rows)
        passes = ((self.passed(part, whole), number) for part, number, _ in self.whole)
        return sum(number * (one.forward + one.backward) for one, number in passes) / layout.pp

    def bound(self, layout: Layout) -> float:
        """What the step takes at least: its slowest stage is no quicker than the mean of all, and hiding hides no more
        than the shorter of computing and messages."""
        practice = self.hides
        working = exposed = hidden = 0.0
        for part, number, _ in self.whole:
            one, again = self.passed(part, layout), part.letter in layout.recompute
            working += number * (one.forward * (1 + again) + one.backward)
            tensor = number * (sum(one.tensor) + one.tensor[0] * again)
            expert = number * (sum(one.expert) + one.expert[0] * again)
            data = number * sum(self.data(part, layout))
            exposed += number * (sum(one.context) + one.context[0] * again)
            for time, hides in (
                (tensor, practice.hides_tensor),
                (expert, practice.hides_experts),
                (data, practice.hides_data),
            ):
                hidden += time * hides
                exposed += time * (not hides)
        count = self.job.rows // layout.rows // layout.micro_batch
        return count * (max(working, hidden) + exposed) / layout.pp

    @cached_property
    def hides(self) -> Practice:
        """The practice, as far as the machine lets it hide messages."""
        if self.job.hardware.hides:
            return self.job.practice
        return replace(
            self.job.practice, hides_data=False, hides_tensor=False, hides_pipeline=False, hides_experts=False
        )

    @cached_property
    def whole(self) -> list[tuple[Block, int, int]]:
        """The layers of the model on one device."""
        (stage,) = stages(self.job.config, self.job.sequence, 1, 1, False)
        return self.content(stage)

    def handed_on(self, layout: Layout) -> float:
        """Activations to the next stage and gradients to the one before, per micro-batch."""
        if layout.pp == 1:
            return 0.0
        job = self.job
        tokens = self.job.setting.row_tokens(layout) / (layout.tp if job.practice.cuts_handed else 1)
        size = tokens * job.config.hidden_size * job.value
        stride = layout.shards * layout.replicate
        return 2 * layout.virtual * seconds(job.hardware, "send", size, layout.pp, stride)

    def passed(self, part: Block, layout: Layout) -> Pass:
        """One layer, one micro-batch."""
        key = (part, layout.micro_batch, layout.cp, layout.tp, layout.ep)
        if key not in self._passes:
            talk = self.tensor(part, layout), self.context(part, layout), self.expert(part, layout)
            self._passes[key] = Pass(*self.compute(part, layout), *talk)
        return self._passes[key]

    def compute(self, part: Block, layout: Layout) -> tuple[float, float]:
        """Seconds of computing forward and backward."""
        forward, backward = self.job.setting.work(part, layout)
        return seconds_of(forward, self.job.rates), seconds_of(backward, self.job.rates)

    def tensor(self, part: Block, layout: Layout) -> tuple[float, float]:
        """The layer's input gathered over tp and its output scattered; the head stands for the embedding too."""
        job, practice = self.job, self.job.practice
        if layout.tp == 1 or not part.tensor:
            return 0.0, 0.0
        size = self.job.setting.row_tokens(layout) * part.width * job.value
        if not practice.sequence_parallel:
            once = seconds(job.hardware, "all_reduce", size, layout.tp)
            return once, once
        gather = seconds(job.hardware, "all_gather", size, layout.tp)
        scatter = seconds(job.hardware, "reduce_scatter", size, layout.tp)
        return gather + scatter, gather + scatter + (0.0 if practice.keeps_gathered else gather)

    def context(self, part: Block, layout: Layout) -> tuple[float, float]:
        """Keys and values gathered over cp; the Mamba state handed on, or tokens exchanged for heads."""
        job, hardware = self.job, self.job.hardware
        if layout.cp == 1:
            return 0.0, 0.0
        group, tokens = (layout.cp, layout.tp), self.job.setting.row_tokens(layout)
        if part.letter in ATTENTION:
            kept = part.kv / min(layout.tp, job.config.num_key_value_heads)
            size = tokens * layout.cp * kept * job.value
            return seconds(hardware, "all_gather", size, *group), seconds(hardware, "reduce_scatter", size, *group)
        if not part.state:
            return 0.0, 0.0
        if job.practice.scan_by_state:
            size = layout.cp * layout.micro_batch * part.state / layout.tp * 4
            once = seconds(hardware, "all_gather", size, *group)
            return once, 2 * once
        projected = sum(p.outputs for p in part.products if p.cut == "out") + sum(
            p.inputs for p in part.products if p.cut == "in"
        )
        once = seconds(hardware, "all_to_all", tokens * projected / layout.tp * job.value, *group)
        return once, once

    def expert(self, part: Block, layout: Layout) -> tuple[float, float]:
        """Tokens to their experts and back: two exchanges forward, two backward."""
        job = self.job
        if layout.ep == 1 or not part.experts:
            return 0.0, 0.0
        copies = float(part.chosen)
        domains = layout.ep / min(layout.ep, job.hardware.domain)
        if job.practice.dispatch_once and domains > 1:
            copies = domains * (1 - (1 - 1 / domains) ** part.chosen)
        size = self.job.setting.local_tokens(layout) * copies * part.dispatched * job.value
        once = 2 * seconds(job.hardware, "all_to_all", size, layout.ep)
        return once, once

    def data(self, part: Block, layout: Layout) -> tuple[float, float]:
        """Weights gathered for each pass, and gradients scattered where they are not summed up first, per micro-batch;
        nothing where weights lie whole."""
        practice, hardware = self.job.practice, self.job.hardware
        if not practice.shards_weights:
            return 0.0, 0.0
        key = (part, layout.fsdp, layout.cp, layout.tp, layout.ep)
        if key not in self._data:
            gather = scatter = 0.0
            for weights, members, stride in spread(part, layout):
                gather += seconds(hardware, "all_gather", weights * practice.message, members, stride)
                scatter += seconds(hardware, "reduce_scatter", weights * practice.summed, members, stride)
            back = 0.0 if practice.sums_last else scatter
            self._data[key] = gather, back + (gather if practice.regathers else 0.0)
        return self._data[key]

    def add_tail(self, parts: Times, found: set[Stage], layout: Layout) -> None:
        """Once a step: gradients summed beside the last backward pass, weights that the optimizer renewed gathered
        beside the first forward pass, and the optimizer's pass over its shard."""
        hardware, reach = self.job.hardware, self.job.hardware.reach
        worst, held = (0.0, 0.0), 0.0
        for stage in found:
            content = self.content(stage)
            tails = [(self.tail(part, layout), copies) for part, _, copies in content]
            held = max(held, sum(copies * tail[2] for tail, copies in tails))
            talk = taken = 0.0
            for place, run in enumerate(("backward", "forward")):
                say = sum(copies * tail[place] for tail, copies in tails)
                work = sum(number * getattr(self.passed(part, layout), run) for part, number, _ in content)
                hides = self.hides.hides_data
                taken += together(work, say, reach.slowed_compute, reach.slowed_link) - work if hides else say
                talk += say
            worst = max(worst, (taken, talk))
        parts.data += worst[1]
        parts.overlap += worst[0] - worst[1]
        parts.optimizer = held * ADAM_BYTES / (hardware.bandwidth * reach.optimizer)
        parts.other = reach.step

    def tail(self, part: Block, layout: Layout) -> tuple[float, float, float]:
        """Once a step, for one layer: seconds of its gradients' sums and of its weights' gathering, and the parameters
        that the optimizer of one device updates."""
        practice, hardware = self.job.practice, self.job.hardware
        key = (part, layout.replicate, layout.fsdp, layout.cp, layout.tp, layout.ep)
        if key not in self._tails:
            sums = gather = held = 0.0
            for weights, members, stride in spread(part, layout):
                shard = weights / members
                held += shard
                sums += seconds(hardware, "all_reduce", shard * practice.summed, layout.replicate, layout.shards)
                if practice.sums_last or not practice.shards_weights:
                    sums += seconds(hardware, "reduce_scatter", weights * practice.summed, members, stride)
                if not practice.shards_weights:
                    gather += seconds(hardware, "all_gather", weights * practice.message, members, stride)
            self._tails[key] = sums, gather, held
        return self._tails[key]


def spread(part: Block, layout: Layout) -> tuple[tuple[float, int, int], ...]:
    """(parameters a device works with, ranks that share them, their stride): cut, whole and expert weights, those of
    one group together, for they travel in one message."""
    experts = (part.expert_weights / layout.ep, layout.shards // layout.ep, layout.ep)
    if layout.tp > 1:
        cut = (part.cut_weights / layout.tp, layout.fsdp * layout.cp, layout.tp)
        return cut, (part.whole_weights, layout.shards, 1), experts
    if layout.ep > 1:
        return (part.cut_weights + part.whole_weights, layout.shards, 1), experts
    return ((part.weights, layout.shards, 1),)


@lru_cache(maxsize=64)
def table(config: ModelConfig) -> Block:
    """The input's table. Looking a token up passes its vector once."""
    weights = config.vocab_size * config.hidden_size
    return Block(TABLE, config.hidden_size, cut_weights=weights, passed_whole=config.hidden_size, tensor=False)
