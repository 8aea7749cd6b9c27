"""The one place where a weight is stored and applied.

Modules call `self.proj(x)` and never read `.weight`, so a rewrite (packing, quantisation, LoRA, sharding) that swaps
one of these classes changes every use at once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimaran.model.scale import Scale
from trimaran.ops import experts, native, triton_backend
from trimaran.ops.linear import linear
from trimaran.ops.loss import Stretch
from trimaran.ops.numbers import at_least_fp32


class Linear(nn.Module):
    """y = W x, W [out, in]. The whole family has no biases."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"


def heard(module: nn.Module) -> bool:
    """Whether somebody listens to the module's calls with a hook."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def plain(module: object, kind: type[nn.Module]) -> bool:
    """Whether a module is of the kind itself and nobody listens to it, so that a kernel may do its work unasked."""
    return type(module) is kind and not heard(module)


class StackedLinear(nn.Module):
    """One linear map per expert, W [E, out, in], applied to rows laid out by `ops.experts`."""

    def __init__(self, count: int, in_features: int, out_features: int):
        super().__init__()
        self.count, self.in_features, self.out_features = count, in_features, out_features
        self.weight = nn.Parameter(torch.empty(count, out_features, in_features))

    def forward(self, x: Tensor, plan: experts.Plan) -> Tensor:
        """Rows in the plan's order [S, in] -> [S, out]."""
        weight: Tensor = self.weight
        if torch.is_autocast_enabled(x.device.type):  # the grouped product does not know autocast
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        return experts.through_experts(x, weight, plan)

    def extra_repr(self) -> str:
        return f"{self.count} x ({self.in_features} -> {self.out_features})"


def few_through(up: nn.Module, down: nn.Module, x_MI: Tensor, ids_MK: Tensor, weights_MK: Tensor) -> Tensor | None:
    """The weighted sum of a few tokens' relu^2 experts in one call [M, I]; None where no kernel knows the case."""
    if not (plain(up, StackedLinear) and plain(down, StackedLinear)):  # rewritten: its own forward counts
        return None
    assert isinstance(up, StackedLinear) and isinstance(down, StackedLinear)
    if triton_backend.runs("triton.experts", x_MI) and not torch.is_grad_enabled():
        from trimaran.ops import triton_experts

        few = len(x_MI) <= triton_experts.FEW and x_MI.dtype == up.weight.dtype == down.weight.dtype
        return triton_experts.few_through(x_MI, up.weight, down.weight, ids_MK, weights_MK) if few else None
    if not native.takes_experts(x_MI, ids_MK, up.weight, down.weight):
        return None
    return native.experts(x_MI, ids_MK, weights_MK, up.weight, down.weight)


class Embedding(nn.Module):
    """A row of W [vocab, D] per token. `stretch`: the ids whose rows are here; None: all."""

    stretch: Stretch | None = None

    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        self.vocab_size, self.width = vocab_size, width
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight)

    def scores(self, hidden: Tensor) -> Tensor:
        """hidden . row for every row: what a tied head computes."""
        return linear(hidden, self.weight)


class Head(Linear):
    """Hidden -> logits, held in at least fp32; `scaled` adds nGPT's factor per token of the vocabulary.

    `stretch`: the ids whose logits come out; None: all.
    """

    stretch: Stretch | None = None

    def __init__(self, in_features: int, out_features: int, scaled: bool = False):
        super().__init__(in_features, out_features)
        self.s_z = Scale(out_features, 1.0, in_features**-0.5) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        logits = at_least_fp32(super().forward(x))
        return logits if self.s_z is None else self.s_z(logits)

    def scores(self, x: Tensor) -> Tensor | None:
        """The logits before they are widened; None where the factor changes them after that."""
        return super().forward(x) if self.s_z is None else None


class TiedHead(nn.Module):
    """A head that borrows the embedding; made when asked for, so that the weight has one owner and one name."""

    def __init__(self, embeddings: Embedding):
        super().__init__()
        self.embeddings = embeddings

    @property
    def stretch(self) -> Stretch | None:
        """The ids whose logits come out; None: all."""
        return self.embeddings.stretch

    def forward(self, x: Tensor) -> Tensor:
        return at_least_fp32(self.scores(x))

    def scores(self, x: Tensor) -> Tensor:
        """The logits before they are widened."""
        return self.embeddings.scores(x)
