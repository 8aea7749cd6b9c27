"""Linear maps whose three products take narrow numbers. The weight stays what it was, in fp32, under its name.

Operands are rounded where they are used, sums are fp32, the gradient of the weight is fp32. Saved for the way back are
the inputs as they came, which are rounded anew, since blocks lie along the tokens there.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimaran.model.linear import Linear, StackedLinear
from trimaran.ops.experts import Dispatch, Plan, grouped_linear, through_experts
from trimaran.ops.rounding import key_of
from trimaran.quant.formats import Formats, Operand
from trimaran.quant.product import product


@dataclass
class Draws:
    """What the rounding by chance of a whole model derives from: the run's seed, the step, the map, and how many times
    its way back was taken in this step. Nothing of it needs saving: a run that goes on after step n draws the same."""

    seed: int
    step: int = 0
    back: Counter[int] = field(default_factory=Counter)

    def begin(self, step: int) -> None:
        """Everything from here on belongs to this step."""
        self.step = step
        self.back.clear()

    def forward(self, number: int) -> int:
        """The key of a map's forward pass: the same for every part of a step, for a pass may be made twice."""
        return key_of(self.seed, self.step, number)

    def backward(self, number: int) -> int:
        """The key of this way back, the next of the step."""
        self.back[number] += 1
        return key_of(self.seed, self.step, number, self.back[number])


@dataclass(frozen=True)
class Manner:
    """How one map computes: its formats, and whose draws it makes under which number."""

    name: str
    formats: Formats
    draws: Draws
    number: int


class NarrowLinear(Linear):
    """y = W x in a narrow format; y has autocast's dtype, or that of x."""

    def __init__(self, plain: Linear, manner: Manner):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.weight = plain.in_features, plain.out_features, plain.weight
        self.manner = manner

    def forward(self, x: Tensor) -> Tensor:
        dtype = output_dtype(x)
        y_MO = Products.apply(x.reshape(-1, self.in_features), self.weight, self.manner, dtype)
        return y_MO.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.manner.name}"


class NarrowStackedLinear(StackedLinear):
    """One map per expert in a narrow format. Tokens share a factor, whichever expert they go to."""

    def __init__(self, plain: StackedLinear, manner: Manner):
        nn.Module.__init__(self)
        self.count, self.in_features, self.out_features = plain.count, plain.in_features, plain.out_features
        self.weight, self.manner = plain.weight, manner

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        return StackedProducts.apply(x, self.weight, plan, self.manner, output_dtype(x))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.manner.name}"


def output_dtype(x: Tensor) -> torch.dtype:
    """What a linear map would give for x here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@contextmanager
def as_written(x: Tensor) -> Iterator[None]:
    """No autocast: the sums of emulated products are fp32."""
    with torch.autocast(x.device.type, enabled=False):
        yield


class Products(torch.autograd.Function):
    """x [M, I], W [O, I] -> y [M, O], and the two products of the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, manner: Manner, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.manner, ctx.key = manner, manner.draws.forward(manner.number)
        with as_written(x):
            a = manner.formats(x, Operand.ACTIVATION, ctx.key)
            return product(a, manner.formats(weight, Operand.WEIGHT, ctx.key)).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), formats = ctx.saved_tensors, ctx.manner.formats
        key = ctx.manner.draws.backward(ctx.manner.number)
        dx, dweight = None, None
        with as_written(x):
            if ctx.needs_input_grad[0]:
                turned = formats(weight, Operand.WEIGHT_TURNED, ctx.key)
                dx = product(formats(g, Operand.GRADIENT, key), turned).to(x.dtype)
            if ctx.needs_input_grad[1]:
                turned = formats(x, Operand.ACTIVATION_TURNED, ctx.key)
                dweight = product(formats(g, Operand.GRADIENT_TURNED, key), turned)
        return dx, dweight, None, None


class StackedProducts(torch.autograd.Function):
    """Rows in expert order [S, I], W [E, O, I] -> [S, O], and the way back; for everyone, without one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, plan: Plan, manner: Manner, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.plan, ctx.manner, ctx.key = plan, manner, manner.draws.forward(manner.number)
        with as_written(x):
            a = manner.formats(x, Operand.ACTIVATION, ctx.key)
            b = manner.formats(weight, Operand.WEIGHT, ctx.key)
            return (through_experts(a.numbers(), b.numbers() / b.factor, plan) / a.factor).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), formats = ctx.saved_tensors, ctx.manner.formats
        key = ctx.manner.draws.backward(ctx.manner.number)
        dx, dweight = None, None
        with as_written(x):
            if ctx.needs_input_grad[0]:
                a, b = formats(g, Operand.GRADIENT, key), formats(weight, Operand.WEIGHT_TURNED, ctx.key)
                dx = (grouped_linear(a.numbers(), b.numbers() / b.factor, ctx.plan.count_E) / a.factor).to(x.dtype)
            if ctx.needs_input_grad[1]:
                dweight = weight_gradients(g, x, ctx.plan, formats, (key, ctx.key), weight)
        return dx, dweight, None, None, None


def weight_gradients(
    g_SO: Tensor, x_SI: Tensor, plan: Dispatch, formats: Formats, keys: tuple[int, int], weight_EOI: Tensor
) -> Tensor:
    """Each expert's g^T x, blocks along its own tokens: [E, O, I] in fp32, zero where an expert has none.

    keys: of the gradient's draws, of the activation's.
    """
    grads = torch.zeros_like(weight_EOI)
    largest_g, largest_x = (t.abs().amax().view(1, 1) for t in (g_SO, x_SI))
    start = 0
    for expert, count in enumerate(plan.count_E.tolist()):
        if count:
            rows = slice(start, start + count)
            a = formats(g_SO[rows], Operand.GRADIENT_TURNED, key_of(keys[0], expert), largest_g)
            b = formats(x_SI[rows], Operand.ACTIVATION_TURNED, key_of(keys[1], expert), largest_x)
            grads[expert] = product(a, b)
        start += count
    return grads
