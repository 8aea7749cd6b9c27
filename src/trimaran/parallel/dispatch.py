"""Expert parallel: a layer's experts dealt out over `ep` processes, whose tokens go to them and come back.

Every process routes its own tokens. For each choice it sends the token's vector (D or latent numbers wide) to the
process that holds the chosen expert, which answers with the expert's output; combine weights stay at home. So forward
moves k rows per token each way, as many as were chosen: no expert has a capacity, no token is dropped, and a process
may get none. Numbers of rows travel first; reading them is the one wait for the device.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trimaran.errors import Refusal
from trimaran.model.feedforward import activate
from trimaran.model.moe import Experts, MoE
from trimaran.ops import experts
from trimaran.parallel.collectives import deal, dealt
from trimaran.parallel.places import Cut
from trimaran.parallel.world import World


def deal_out(model: nn.Module, world: World) -> dict[str, Cut]:
    """Leaves this process its experts of every MoE block of `model`, in place; what is left, by name of the parameter.

    Raises Refusal where ep does not divide the number of experts, or where there are none.
    """
    found: dict[str, Cut] = {}
    for path, block in model.named_modules():
        if isinstance(block, MoE):
            block.experts = DealtExperts(block.experts, world.group("ep"))
            each, count = block.experts.own, block.experts.count
            for name, weight in block.experts.named_parameters():
                span = (block.experts.first, block.experts.first + each)
                found[f"{path}.experts.{name}"] = Cut((count, *weight.shape[1:]), 0, (span,))
    if not found and world.settings.pp == 1:
        step = "leave parallel.ep out"
        raise Refusal(f"parallel.ep = {world.settings.ep} and no experts", "a pattern with E", step)
    return found


class DealtExperts(Experts):
    """The experts first .. first + own of `count`; tokens of all processes of `group` come to them."""

    def __init__(self, whole: Experts, group: dist.ProcessGroup):
        nn.Module.__init__(self)  # not Experts', which would make other weights
        if whole.count % group.size():
            found = f"n_routed_experts = {whole.count} for parallel.ep = {group.size()}"
            raise Refusal(found, f"a multiple of {group.size()}", "choose an ep that divides it")
        self.group, self.count, self.numbers = group, whole.count, whole.numbers
        self.own = whole.count // group.size()
        self.first = group.rank() * self.own
        self.up_proj, self.gate_proj, self.down_proj = whole.up_proj, whole.gate_proj, whole.down_proj
        for maps in (self.up_proj, self.gate_proj, self.down_proj):
            if maps is not None:
                left = maps.weight.detach()[self.first : self.first + self.own].clone()
                maps.weight, maps.count = nn.Parameter(left, requires_grad=maps.weight.requires_grad), self.own

    def forward(self, x_MI: Tensor, ids_MK: Tensor, weights_MK: Tensor) -> Tensor:
        """Own tokens [M, I] through the experts that they have chosen, wherever those are; see `Experts`."""
        plan = experts.dispatch(ids_MK, weights_MK, self.count)
        once = [1] * self.group.size()
        count_RE = plan.count_E.view(self.group.size(), self.own)  # E: of process R's experts
        asked_RE = dealt(count_RE, once, once, self.group)  # R: who asks
        sent, received = torch.stack([count_RE.sum(1), asked_RE.sum(1)]).tolist()
        rows_SI = deal(experts.to_experts(x_MI, plan), sent, received, self.group)
        return experts.from_experts(deal(self.work(rows_SI, asked_RE), received, sent, self.group), plan)

    def work(self, rows_SI: Tensor, asked_RE: Tensor) -> Tensor:
        """Own experts on the rows that came, which lie by who asks, then by expert: [S, I] -> [S, O]."""
        expert_RE = torch.arange(self.own, device=rows_SI.device).expand_as(asked_RE)
        expert_S1 = expert_RE.flatten().repeat_interleave(asked_RE.flatten(), output_size=len(rows_SI))[:, None]
        align = experts.alignment(len(rows_SI), self.own)
        plan = experts.dispatch(expert_S1, torch.ones_like(expert_S1), self.own, align)
        ordered = experts.to_experts(rows_SI, plan)
        gate = None if self.gate_proj is None else self.gate_proj(ordered, plan)
        out = self.down_proj(activate(self.up_proj(ordered, plan), gate), plan)
        return out.index_select(0, plan.slot_MK[:, 0])
