"""Experts kept equally busy: the router's bias steps against the load, a small loss acts within each sequence.

    b_e += rate * sign(mean(load) - load_e)        once per optimizer step, over all its tokens, without gradient

Auxiliary-loss-free balancing (arXiv 2408.15664; DeepSeek-V3, Nemotron-3: rate 1e-3, loss coefficient 1e-4). The bias
takes part in the choice of experts and never in their weights. It is one of the buffers that stay in fp32: it drifts
as a whole, and bf16 would round the differences away that balance.
"""

import torch
from torch import Tensor, nn

from trimaran.model.moe import MoE
from trimaran.parallel.world import World


class Balance:
    """What the MoE blocks of a model report during one optimizer step. Routers without a bias have the loss alone.

    world: the processes that have parts of the step; `gather` adds up what they counted.
    """

    def __init__(self, model: nn.Module, rate: float, world: World | None = None):
        self.rate, self.world = rate, world or World()
        self.blocks = [module for module in model.modules() if isinstance(module, MoE)]
        for block in self.blocks:
            block.watched = True
        self.loads: list[Tensor | None] = [None] * len(self.blocks)

    def collect(self) -> tuple[Tensor, int] | None:
        """The sequence balance losses of the forward just done (their sum, and how many); counts its loads."""
        losses = []
        for index, block in enumerate(self.blocks):
            for stats in block.take_stats():
                losses.append(stats.aux)
                load_E = self.loads[index]
                self.loads[index] = stats.load_E if load_E is None else load_E + stats.load_E
        return (torch.stack(losses).sum(), len(losses)) if losses else None

    def gather(self) -> None:
        """Once per step, behind its last forward: the loads of all processes, in one exchange."""
        known = [load_E for load_E in self.loads if load_E is not None]
        if known and not self.world.alone:
            total = iter(self.world.sum(torch.stack(known)))
            self.loads = [None if load_E is None else next(total) for load_E in self.loads]

    def violation(self) -> Tensor | None:
        """MaxVio of the step so far, max_e load_e / mean(load) - 1, in the worst block; 0 is perfect balance."""
        worst = [load_E.max() / load_E.mean() - 1 for load_E in self.loads if load_E is not None]
        own = torch.stack(worst).max() if worst else None
        if self.world.settings.pp == 1:
            return own
        # a stage may have no routers; -1 is below any violation
        largest = self.world.largest(torch.tensor(-1.0, device=self.world.device) if own is None else own, "pp")
        return None if largest < 0 else largest

    @torch.no_grad()
    def step(self) -> None:
        """Moves the biases by the loads of this step and forgets them."""
        for block, load_E in zip(self.blocks, self.loads):
            if load_E is not None and block.gate.config.router == "sigmoid":
                block.gate.e_score_correction_bias.add_(torch.sign(load_E.mean() - load_E), alpha=self.rate)
        self.forget()

    def forget(self) -> None:
        self.loads = [None] * len(self.blocks)
