"""What differs between the processes of a run: the time of the work that waits for nobody, and memory.

A step takes all processes equally long, since each waits for the slowest in every exchange. What shows a slow one is
work without exchanges of which all of a pipeline's stage have as much: drawing the batch, and the optimizer's update of
its share. Both are timed all along, and compared every EVERY steps.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median_low

import torch
import torch.distributed as dist

from trimaran.parallel.world import World
from trimaran.report.environment import memory_in_use

EVERY = 20  # steps
SLOW, NOTICED = 2.0, 0.002  # told: twice the time of the others, and 2 ms more of it


@dataclass
class Watch:
    """One process's own time since the last comparison; `told` are the slow ones that were named."""

    world: World
    seconds: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    steps: int = 0
    told: set[int] = field(default_factory=set)

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """Counts the time of what is done inside. On a GPU, that of its work; nothing waits for it."""
        if self.world.alone:
            yield
        elif self.world.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began = time.perf_counter()
            begin.record()
            yield
            end.record()
            self.events.append((begin, end))
            self.seconds += time.perf_counter() - began
        else:
            began = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - began

    def after_step(self, step: int) -> tuple[dict[str, list[float]], str]:
        """Every EVERY steps, in all processes: own seconds per step and memory in bytes of each, by rank, for the
        metrics; and a warning, or "". Otherwise nothing."""
        self.steps += 1
        if self.world.alone or step % EVERY:
            return {}, ""
        if self.events:
            torch.cuda.synchronize(self.world.device)
            self.seconds += sum(begin.elapsed_time(end) for begin, end in self.events) / 1000
        mine = torch.tensor([self.seconds / self.steps, float(memory_in_use()[1])], dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.world.settings.world)]
        dist.all_gather(found, mine)
        self.seconds, self.steps = 0.0, 0
        self.events.clear()
        seconds, memory = ([float(one[index]) for one in found] for index in (0, 1))
        return {"own_s_by_process": [round(s, 6) for s in seconds], "memory_by_process": memory}, self.warning(seconds)

    def warning(self, seconds: Sequence[float]) -> str:
        """Who is slow among the processes of its stage, said once of each."""
        stage = len(seconds) // self.world.settings.pp
        lines = []
        for rank, own in enumerate(seconds):
            first = rank - rank % stage
            usual = median_low(seconds[first : first + stage])
            slow = own > SLOW * usual and own - usual > NOTICED
            if slow and rank not in self.told:
                lines.append(
                    f"warning: process {rank} is slow: {1e3 * own:.1f} ms per step of work that waits for nobody, "
                    f"where {1e3 * usual:.1f} ms are usual; all others wait for it"
                )
            (self.told.add if slow else self.told.discard)(rank)
        return "\n".join(lines)
