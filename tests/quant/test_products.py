"""Every product of every format against the plain one: dequantise the operands, multiply in fp64."""

import pytest
import torch

from trimaran.model.linear import Linear, StackedLinear
from trimaran.ops import experts
from trimaran.quant import product as products
from trimaran.quant.formats import MXFP8, NVFP4, FP8Blocks, FP8Tensor, Operand
from trimaran.quant.linear import Draws, Manner, NarrowLinear, NarrowStackedLinear

FORMATS = {
    "fp8": FP8Tensor(),
    "fp8 e4m3": FP8Tensor(wide_gradients=False),
    "blocks": FP8Blocks(),
    "mxfp8": MXFP8(),
    "nvfp4": NVFP4(),
    "nvfp4 plain": NVFP4(hadamard=False, by_chance=()),
    "nvfp4 rows": NVFP4(square_weights=False),
    "nvfp4 by chance": NVFP4(by_chance=tuple(Operand)),
}
SIZES = [(1, 1, 1), (7, 33, 5), (100, 48, 130), (257, 129, 16)]  # tokens, inputs, outputs


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(formats, inputs: int, outputs: int) -> NarrowLinear:
    plain = Linear(inputs, outputs)
    torch.nn.init.normal_(plain.weight, generator=torch.Generator().manual_seed(5))
    return NarrowLinear(plain, Manner("tested", formats, Draws(3), 4))


def wide(rounded) -> torch.Tensor:
    return rounded.dequantize().double()


@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SIZES, ids=str)
def test_a_linear_map_is_its_rounded_operands_multiplied(formats, tokens, inputs, outputs):
    layer, x, g = linear(formats, inputs, outputs), gaussian(tokens, inputs), gaussian(tokens, outputs, seed=1)
    x.requires_grad_()
    y = layer(x)
    y.backward(g)
    draws, w = Draws(3), layer.weight.detach()
    forward, backward = draws.forward(4), draws.backward(4)
    x0 = x.detach()
    y0 = wide(formats(x0, Operand.ACTIVATION, forward)) @ wide(formats(w, Operand.WEIGHT, forward)).mT
    dx0 = wide(formats(g, Operand.GRADIENT, backward)) @ wide(formats(w, Operand.WEIGHT_TURNED, forward)).mT
    turned = wide(formats(g, Operand.GRADIENT_TURNED, backward))
    dw0 = turned @ wide(formats(x0, Operand.ACTIVATION_TURNED, forward)).mT
    for found, expected in ((y, y0), (x.grad, dx0), (layer.weight.grad, dw0)):
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= 1e-6 * max(1.0, inputs**0.5) * expected.norm().clamp(min=1e-6)


@pytest.mark.parametrize(("formats", "limit"), [(FP8Tensor(), 0.06), (FP8Blocks(), 0.05), (NVFP4(), 0.25)], ids=str)
def test_a_linear_map_is_near_the_plain_one(formats, limit):
    layer, x = linear(formats, 192, 160), gaussian(3, 50, 192).requires_grad_()
    weight = layer.weight.detach().clone().requires_grad_()
    again = x.detach().clone().requires_grad_()
    g = gaussian(3, 50, 160, seed=1)
    (y := layer(x)).backward(g)
    (y0 := torch.nn.functional.linear(again, weight)).backward(g)
    for found, plain in ((y, y0), (x.grad, again.grad), (layer.weight.grad, weight.grad)):
        error = (found - plain).norm() / plain.norm()
        assert 0.01 < error < limit


def dealt(tokens: int, count: int, k: int = 2) -> experts.Dispatch:
    """Tokens over experts, expert 1 left without; spare rows in every stretch."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(tokens, count, generator=generator)
    scores[:, 1] = -1
    return experts.dispatch(scores.topk(k).indices, torch.ones(tokens, k), count, align=4)


@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
def test_experts_are_linear_maps_of_their_tokens(formats):
    plan, count, inputs, outputs = dealt(61, 4), 4, 24, 40
    plain = StackedLinear(count, inputs, outputs)
    torch.nn.init.normal_(plain.weight, generator=torch.Generator().manual_seed(5))
    layer = NarrowStackedLinear(plain, Manner("tested", formats, Draws(3), 4))
    x = experts.to_experts(gaussian(61, inputs), plan).requires_grad_()
    g = gaussian(len(x), outputs, seed=1)
    y = layer(x, plan)
    y.backward(g)
    draws, w, x0 = Draws(3), layer.weight.detach(), x.detach()
    forward, backward = draws.forward(4), draws.backward(4)
    a, b = wide(formats(x0, Operand.ACTIVATION, forward)), wide(formats(w, Operand.WEIGHT, forward))
    c, d = wide(formats(g, Operand.GRADIENT, backward)), wide(formats(w, Operand.WEIGHT_TURNED, forward))
    start = 0
    for expert, rows in enumerate(plan.count_E.tolist()):
        part = slice(start, start + rows)
        assert torch.allclose(y[part].double(), a[part] @ b[expert].mT, rtol=1e-4, atol=1e-4)
        assert torch.allclose(x.grad[part].double(), c[part] @ d[expert].mT, rtol=1e-4, atol=1e-4)
        plain_gradient = g[part].double().mT @ x0[part].double()
        error = (layer.weight.grad[expert] - plain_gradient).norm()
        assert error <= 0.35 * plain_gradient.norm()
        start += rows
    assert (layer.weight.grad[1] == 0).all()


def test_everyone_reads_the_same_rounded_numbers():
    plain = StackedLinear(3, 32, 16)
    torch.nn.init.normal_(plain.weight, generator=torch.Generator().manual_seed(5))
    layer = NarrowStackedLinear(plain, Manner("tested", NVFP4(), Draws(0), 0))
    x, formats = gaussian(5, 32), NVFP4()
    with torch.no_grad():
        y = layer(x, experts.Everyone(torch.ones(5, 3)))
    expected = wide(formats(x, Operand.ACTIVATION, 0)) @ wide(formats(plain.weight, Operand.WEIGHT, 0)).mT
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_weights_are_the_same_numbers_in_both_directions():
    w = gaussian(48, 80)
    for name in ("fp8", "blocks", "nvfp4", "nvfp4 by chance"):
        there, back = (FORMATS[name](w, what, 9) for what in (Operand.WEIGHT, Operand.WEIGHT_TURNED))
        assert torch.equal(there.dequantize().mT, back.dequantize())
    rows = FORMATS["nvfp4 rows"]
    there, back = (rows(w, what, 9).dequantize() for what in (Operand.WEIGHT, Operand.WEIGHT_TURNED))
    assert (there.mT == back).float().mean() < 0.4


def test_draws_follow_from_seed_step_map_and_call():
    layer, x = linear(NVFP4(), 32, 32), gaussian(40, 32).requires_grad_()
    g = gaussian(40, 32, seed=1)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(layer(x), x, g)[0]

    draws = layer.manner.draws
    first, second = gradient(), gradient()
    assert not torch.equal(first, second)  # the second part of a step draws anew
    draws.begin(0)
    assert torch.equal(gradient(), first)
    draws.begin(1)
    assert not torch.equal(gradient(), first)


def test_gradients_are_right_on_average():
    layer, x = linear(NVFP4(hadamard=False), 32, 48), gaussian(64, 32).requires_grad_()
    formats, g = layer.manner.formats, gaussian(64, 48, seed=1)
    draws = torch.stack([torch.autograd.grad(layer(x), x, g)[0] for _ in range(200)])
    weight = formats(layer.weight.detach(), Operand.WEIGHT_TURNED, 0).dequantize()
    plain = g @ weight.mT
    by_nearest = NVFP4(by_chance=())(g, Operand.GRADIENT, 0).dequantize() @ weight.mT
    assert (draws.mean(0) - plain).norm() < 0.5 * (by_nearest - plain).norm()  # what clips is not averaged away


@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
def test_what_is_not_finite_comes_out(formats):
    layer, x = linear(formats, 40, 24), gaussian(50, 40)
    x[3, 5] = float("inf")
    x.requires_grad_()
    y = layer(x)
    assert y[3].isnan().all()
    y.backward(gaussian(50, 24))
    assert layer.weight.grad[:, 5].isnan().all() and x.grad.isfinite().all()
    if not isinstance(formats, (FP8Blocks, MXFP8)):
        assert y.isnan().all()


def test_autocast_decides_the_outputs_and_sums_stay_fp32():
    layer, x = linear(NVFP4(), 48, 32), gaussian(20, 48)
    whole = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16 and torch.equal(half, whole.bfloat16())
    half.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_torchs_scaled_product_is_the_emulated_one():
    """The call that Hopper gets: torch computes it on a CPU, too."""
    for tokens, inputs, outputs in SIZES:
        x, w, g = gaussian(tokens, inputs), gaussian(outputs, inputs, seed=1), gaussian(tokens, outputs, seed=2)
        formats = FP8Tensor()
        for a, b in (
            (formats(x, Operand.ACTIVATION, 0), formats(w, Operand.WEIGHT, 0)),
            (formats(g, Operand.GRADIENT, 0), formats(w, Operand.WEIGHT_TURNED, 0)),
            (formats(g, Operand.GRADIENT_TURNED, 0), formats(x, Operand.ACTIVATION_TURNED, 0)),
        ):
            torch.testing.assert_close(products.by_tensor(a, b), products.emulated(a, b), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's products with blocks need Hopper")
@pytest.mark.parametrize("formats", [FP8Tensor(), FP8Blocks()], ids=str)
def test_tensor_cores_give_the_emulated_product(formats):
    for tokens, inputs, outputs in SIZES[1:]:
        x, w = gaussian(tokens, inputs).cuda(), gaussian(outputs, inputs, seed=1).cuda()
        g = gaussian(tokens, outputs, seed=2).cuda()
        for a, b in (
            (formats(x, Operand.ACTIVATION, 0), formats(w, Operand.WEIGHT, 0)),
            (formats(g, Operand.GRADIENT, 0), formats(w, Operand.WEIGHT_TURNED, 0)),
            (formats(g, Operand.GRADIENT_TURNED, 0), formats(x, Operand.ACTIVATION_TURNED, 0)),
        ):
            assert products.on_tensor_cores(a, b)
            found, expected = products.product(a, b), products.emulated(a, b)
            assert (found - expected).norm() < 1e-2 * expected.norm()
