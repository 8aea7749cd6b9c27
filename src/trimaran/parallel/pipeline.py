"""Pipeline parallel: stages of the stack on processes of their own, the parts of a step one behind another.

torch.distributed.pipelining keeps the order (1F1B; GPipe where there are fewer parts than stages) and passes residual
streams on and their gradients back. What is ours:

    first     embedding and the first layers
    last      the last layers, final norm, head, draft block (MTP), and every loss. Where the draft block or a tie reads
              the embedding it has a copy: both copies' gradients are added up, so that they stay the same
    others    layers alone. What their routers add to the loss is attached to the stream they pass on

Every process has the whole batch, so a stage takes documents, targets and weights from there; only streams travel.
Every loss is a share of one sum, so gradients add up over the parts and nothing is averaged.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from math import gcd
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from trimaran.errors import Refusal
from trimaran.model.hybrid import HybridModel
from trimaran.parallel.places import local
from trimaran.parallel.shard import synchronise
from trimaran.parallel.stages import read_at_the_end
from trimaran.parallel.world import World


class Part(Protocol):
    """Some rows of a step, with whatever else the objective reads of them."""

    @property
    def tokens_BT(self) -> Tensor: ...
    @property
    def doc_ids_BT(self) -> Tensor: ...


class Rows(Part, Protocol):
    """Rows of which some can be taken."""

    def rows(self, start: int, stop: int) -> Any: ...


@runtime_checkable
class Staged(Protocol):
    """An objective that a pipeline can follow; see `train.objective.Pretraining`."""

    def names(self, part: Any) -> Sequence[str]: ...
    def score(self, hidden_BTD: Tensor, part: Any) -> tuple[Tensor, dict[str, Tensor]]: ...
    def imbalance(self, part: Any) -> tuple[Tensor | None, dict[str, Tensor]]: ...


class Attached(torch.autograd.Function):
    """The stream as it is; backward, the loss gets its gradient too."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], ctx.saved_tensors[0]


class Work(nn.Module):
    """What torch's schedule calls: one part through this stage. The model is not registered under it."""

    def __init__(self, stage: Callable[[Tensor | None, int], Tensor], first: bool):
        super().__init__()
        self.stage, self.first = stage, first

    def forward(self, received: Tensor, number: Tensor) -> Tensor:
        return self.stage(None if self.first else received, int(number))


class Pipeline:
    """This process's stage of a model that `cut_stage` has cut, and the schedule it works by."""

    def __init__(self, model: HybridModel, world: World):
        self.model, self.world = model, world
        self.count = world.settings.parts
        self.stage, self.last = world.place["pp"], world.settings.pp - 1
        self.copied = next(model.backbone.embeddings.parameters(), None) if read_at_the_end(model) else None
        self.schedules: dict[tuple[int, ...], Any] = {}
        self.work: Callable[[Tensor | None, int], Tensor] = self._idle

    @property
    def copies(self) -> list[nn.Parameter]:
        """Parameters that another stage holds too and counts."""
        return [self.copied] if self.copied is not None and self.stage == self.last else []

    def gradients(
        self, objective: object, parts: Sequence[Any], precision: Callable[[], AbstractContextManager[object]]
    ) -> dict[str, Tensor]:
        """Losses and their gradients of a step's parts (`Part`); the terms by name, added up, 0 where another stage
        has them.

        precision: the context that a forward pass runs in. Raises Refusal for an objective that is not `Staged`.
        """
        if not isinstance(objective, Staged):
            found = f"parallel.pp = {self.last + 1} for {type(objective).__name__}"
            raise Refusal(found, "an objective of stage pretrain or sft", "set parallel.pp=1")
        seen = {name: torch.zeros((), device=self.model.device) for name in objective.names(parts[0])}

        def work(received: Tensor | None, number: int) -> Tensor:
            part = parts[number]
            with precision():
                out = self._pass(part, received)
                if self.stage == self.last:
                    out, terms = objective.score(out, part)
                else:
                    loss, terms = objective.imbalance(part)
                    out = out if loss is None else Attached.apply(out, loss)
            for name, term in terms.items():
                seen[name] = seen[name] + term
            # parts come back in the order in which they went
            out.register_hook(lambda _: synchronise(self.model, number == len(parts) - 1, self.world))
            return out

        self._run(work, parts, training=True)
        self._add_up_copies()
        return seen

    @torch.no_grad()
    def hidden(self, batch: Rows) -> Tensor | None:
        """Hidden vectors after the final norm [B, T, D], at the last stage; None at the others."""
        rows, found = len(batch.tokens_BT), list[Tensor]()
        each = rows // gcd(rows, self.count)
        parts = [batch.rows(start, start + each) for start in range(0, rows, each)]

        def work(received: Tensor | None, number: int) -> Tensor:
            out = self._pass(parts[number], received)
            if self.stage == self.last:
                found.append(out)
            return out

        self._run(work, parts, training=False)
        return torch.cat(found) if found else None

    def _pass(self, part: Part, stream_BTD: Tensor | None) -> Tensor:
        return self.model.hidden(part.tokens_BT, part.doc_ids_BT, stream_BTD=stream_BTD)

    def _run(self, work: Callable[[Tensor | None, int], Tensor], parts: Sequence[Part], training: bool) -> None:
        """All parts through all stages, and back if `training`."""
        rows, length = parts[0].tokens_BT.shape
        if any(part.tokens_BT.shape != (rows, length) for part in parts):
            found = f"{sum(len(part.tokens_BT) for part in parts)} rows for {len(parts)} micro-batches"
            allowed = f"a multiple of {len(parts)} rows in each of the processes that share them"
            raise Refusal(found, allowed, "change train.batch_size or parallel.micro_batches")
        key = (len(parts), rows, length, training)
        if key not in self.schedules:
            self.schedules[key] = self._schedule(*key)
        numbers = torch.arange(len(parts))
        # torch wants something at the first stage: the numbers stand in for tokens
        given = [numbers] if self.stage == 0 else []
        self.work = work
        try:
            if training:
                self.schedules[key].step(*given, number=numbers, target=numbers, return_outputs=False)
            else:
                self.schedules[key].eval(*given, number=numbers)
        except RuntimeError as problem:
            # what goes wrong in a stage comes out wrapped
            raise (problem.__cause__ if isinstance(problem.__cause__, Refusal) else problem) from None
        finally:
            self.work = self._idle

    def _schedule(self, count: int, rows: int, length: int, training: bool) -> Any:
        """torch's schedule for `count` parts of [rows, length] tokens. It is told all shapes: it would try them out."""
        config, settings = self.model.config, self.world.settings
        shape = (rows, length // settings.tp, config.hidden_size)
        stream = torch.empty(shape, dtype=self.model.dtype, device="meta", requires_grad=training)
        given = torch.arange(1) if self.stage == 0 else stream
        out = torch.empty((), device="meta", requires_grad=True) if training and self.stage == self.last else stream
        stage = PipelineStage(
            Work(lambda received, number: self.work(received, number), self.stage == 0),
            self.stage,
            settings.pp,
            self.model.device,
            input_args=(given,),
            output_args=(out,),
            group=self.world.group("pp"),
        )
        kind = Schedule1F1B if count >= settings.pp else ScheduleGPipe
        return kind(stage, count, loss_fn=(lambda loss, _: loss) if training else None, scale_grads=False)

    def _idle(self, received: Tensor | None, number: int) -> Tensor:
        raise RuntimeError("a stage was called outside of a step")

    def _add_up_copies(self) -> None:
        """The gradient of the embedding: what the first stage found and what the last did, at both."""
        weight = self.copied
        if weight is None or not weight.requires_grad:
            return
        if weight.grad is None:  # the draft block did not learn in this step
            weight.grad = torch.zeros_like(weight)
        own = local(weight.grad)
        other, group = torch.empty_like(own), self.world.group("pp")
        peer = dist.get_global_rank(group, self.last - self.stage)
        ops = [dist.P2POp(dist.isend, own, peer, group), dist.P2POp(dist.irecv, other, peer, group)]
        for sent in dist.batch_isend_irecv(ops):
            sent.wait()
        own.add_(other)
