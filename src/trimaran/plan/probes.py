"""Small models whose training steps tell a machine's coefficients, and the fits.

A step's time is linear in its counts (work.py), so the coefficients come from least squares on relative errors, none of
them negative. The probes have every kind of layer alone at two sizes, and mixtures. What messages cost within a step,
and how long processes wait for one another, are fitted to steps that are spread, after all else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimaran.data.batch import Batch
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import build
from trimaran.parallel.parallelize import parallelize
from trimaran.parallel.settings import ParallelSettings
from trimaran.parallel.world import World, join
from trimaran.plan.costs import ADAM_BYTES, Costs, Job
from trimaran.plan.hardware import Hardware, Precision, Reach
from trimaran.plan.layout import Layout
from trimaran.plan.work import Work
from trimaran.train.loop import Run, train_step
from trimaran.train.prepare import objective_of, optimizer_of
from trimaran.train.recipe import TrainSettings

LEAST = 0.05  # a coefficient is at least this share of what the peak or the bandwidth says


@dataclass(frozen=True)
class Probe:
    """A small model's step."""

    pattern: str
    width: int
    rows: int
    sequence: int


PROBES = (
    Probe("----", 256, 4, 128),
    Probe("----", 256, 16, 128),
    Probe("--", 512, 4, 256),
    Probe("MM", 128, 4, 256),
    Probe("MM", 256, 8, 128),
    Probe("**", 128, 4, 512),
    Probe("****", 256, 8, 128),
    Probe("EE", 128, 8, 128),
    Probe("EEEE", 256, 8, 128),
    Probe("R-R-", 192, 8, 128),
    Probe("ME*E", 192, 4, 256),
    Probe("ME*E", 192, 16, 128),
    Probe("M-*E", 320, 4, 128),
    Probe("M-*E", 320, 8, 128),
)


# Rows are those of one process, times their number.
SPREAD = (Probe("ME*-", 192, 4, 128), Probe("M-*E", 320, 2, 128), Probe("ME*-", 192, 8, 128))


def spreads(processes: int) -> list[dict[str, Any]]:
    """Layouts that steps are spread in: each axis that talks within a step, over two processes, fsdp over the rest."""
    found: list[dict[str, Any]] = [{"replicate": processes}, {"fsdp": processes}]
    if processes % 2 == 0:
        found += [{"fsdp": processes // 2, "tp": 2}, {"fsdp": processes // 2, "cp": 2}, {"fsdp": processes, "ep": 2}]
    return found


def probe_model(pattern: str, width: int) -> ModelConfig:
    """A small model in usual proportions."""
    return ModelConfig(
        pattern=pattern,
        vocab_size=1024,
        hidden_size=width,
        num_attention_heads=width // 32,
        num_key_value_heads=2,
        head_dim=32,
        mamba_num_heads=2 * width // 64,
        mamba_head_dim=64,
        ssm_state_size=32,
        n_groups=2,
        chunk_size=64,
        intermediate_size=4 * width,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_latent_size=width // 2,
        moe_intermediate_size=width,
        moe_shared_expert_intermediate_size=2 * width,
    )


def batch_of(config: ModelConfig, rows: int, sequence: int) -> Batch:
    """Random tokens, one document a row."""
    tokens = torch.randint(3, config.vocab_size, (rows, sequence), generator=torch.Generator().manual_seed(0))
    return Batch(tokens, tokens, torch.zeros_like(tokens, dtype=torch.int32), torch.ones(rows, sequence))


def stepper(
    one: Probe, device: torch.device, precision: Precision, axes: Mapping[str, Any] | None = None
) -> Callable[[], Any]:
    """A function that takes one real step: the loop's own, with loss, clipping and optimizer. axes: sizes of a layout
    that it is spread in, with `one.rows` rows for each process; None: it is whole in one process."""
    config = probe_model(one.pattern, one.width)
    model = build(config, device, seed=0).train()
    number = "bf16" if precision == "bf16" else "fp32"
    world = World() if axes is None else join(ParallelSettings(**axes), device)
    rows = one.rows * world.settings.world
    cuts = {} if axes is None else parallelize(model, world, one.sequence // 2)
    settings = TrainSettings(steps=99, batch_size=rows, lr=1e-4, precision=number, device=device.type)
    learner, objective = optimizer_of(settings, model), objective_of(settings, model, world)
    run = Run(Path("."), settings, model, objective, learner, loader=None, world=world, cuts=cuts)  # type: ignore[arg-type]
    batch = batch_of(config, rows, one.sequence)
    return lambda: train_step(run, batch, 1e-4)


def counts(job: Job, layout: Layout) -> tuple[Work, float]:
    """The counts of one step in one process: its work, and the bytes that the optimizer reads and writes."""
    costs, total, held = Costs(job), Work(), 0.0
    for part, passes, copies in costs.whole:
        forward, backward = job.setting.work(part, layout)
        total = total + (forward + backward) * passes
        held += copies * part.weights
    return total, ADAM_BYTES * held


def fitted(bare: Hardware, precision: Precision, seconds: list[float]) -> Reach:
    """Least squares of relative errors over matmul, attention, scan, traffic, launches, optimizer and a constant.

    seconds: of a step of each of PROBES.
    """
    wide = bare.flops("fp32" if precision == "fp32" else "bf16")
    units = np.array(
        [1 / bare.flops(precision), 1 / wide, 1 / wide, 1 / bare.bandwidth, 1e-6, 1 / bare.bandwidth, 1e-4]
    )
    rows = []
    for one, taken in zip(PROBES, seconds, strict=True):
        job = Job(probe_model(one.pattern, one.width), one.sequence, one.rows, bare, precision)
        work, optimizer = counts(job, Layout(micro_batch=one.rows))
        line = [work.matmul + work.wide, work.attention, work.scan, work.traffic, work.launches, optimizer, 1.0]
        rows.append(np.array(line) * units / taken)
    found = nonnegative(np.array(rows), np.ones(len(rows)))
    share = [1 / max(value, LEAST) for value in found]
    return bare.reach.replace(
        matmul=share[0],
        attention=share[1],
        scan=share[2],
        memory=share[3],
        launch=found[4] * 1e-6,
        optimizer=share[5],
        step=found[6] * 1e-4,
    )


def fitted_spread(known: Hardware, precision: Precision, processes: int, seconds: list[float]) -> Reach:
    """`known` with what it lacks of steps that are spread: least squares of relative errors over messages and waiting.

    seconds: of a step of each of SPREAD in each of `spreads(processes)`, models outermost. Nothing is fitted where
    messages run beside computing, for time is not linear there.
    """
    if known.hides:
        return known.reach
    rows, missing = [], []
    cases = [(one, axes) for one in SPREAD for axes in spreads(processes)]
    for (one, axes), taken in zip(cases, seconds, strict=True):
        layout = Layout(**axes)
        layout = replace(layout, micro_batch=one.rows * processes // layout.rows)
        job = Job(probe_model(one.pattern, one.width), one.sequence, one.rows * processes, known, precision)
        parts = Costs(job).step(layout)
        talking = parts.tensor + parts.context + parts.expert + parts.data
        rows.append([talking / taken, parts.compute / taken])
        missing.append(1 - parts.total / taken)
    longer, waits = nonnegative(np.array(rows), np.array(missing))
    return known.reach.replace(exchange=1 + longer, waits=waits)


def nonnegative(matrix: np.ndarray, wanted: np.ndarray, sweeps: int = 5000) -> list[float]:
    """x >= 0 with the least |matrix x - wanted|^2, one coordinate after the other."""
    x = np.zeros(matrix.shape[1])
    left = wanted.astype(float)
    sizes = (matrix**2).sum(0)
    for _ in range(sweeps):
        before = x.copy()
        for j in np.flatnonzero(sizes):
            step = max(-x[j], float(matrix[:, j] @ left) / sizes[j])
            x[j] += step
            left -= step * matrix[:, j]
        if np.abs(x - before).max() <= 1e-10 * max(1.0, np.abs(x).max()):
            break
    return [float(value) for value in x]
