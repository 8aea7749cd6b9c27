"""a b^T for rounded operands: by the device's own FP8 product where it has one, else by numbers in fp32.

Emulated, the numbers are those that the narrow format holds, and their products and sums are fp32. Tensor cores add in
another order, so the two agree to rounding, not to the bit. FP4 and MXFP8 products need Blackwell and are emulated
everywhere here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.ops.formats_scaled import FP8_BLOCK, Rounded

HOPPER = (9, 0)
ALIGN = 16  # rows and columns that the product wants multiples of
SCALES = 4  # what it wants scales of blocks filled up to


def product(a_RK: Rounded, b_SK: Rounded) -> Tensor:
    """sum_k a[r, k] b[s, k]: [.., R, S] in fp32."""
    if on_tensor_cores(a_RK, b_SK):
        return by_blocks(a_RK, b_SK) if a_RK.block[1] == FP8_BLOCK else by_tensor(a_RK, b_SK)
    return emulated(a_RK, b_SK)


def emulated(a_RK: Rounded, b_SK: Rounded) -> Tensor:
    """The same in fp32, factors taken out of the sum."""
    return a_RK.numbers() @ b_SK.numbers().mT * (1 / a_RK.factor) * (1 / b_SK.factor)


def on_tensor_cores(a: Rounded, b: Rounded) -> bool:
    """Whether this device has the product of these two: FP8 with a factor for each tensor, or 1 x 128 blocks times
    1 x 128 or 128 x 128, on Hopper. (Blackwell has the first.)"""
    if a.values.device.type != "cuda" or a.values.ndim > 2 or a.form.dtype is None or b.form.dtype is None:
        return False
    chip = torch.cuda.get_device_capability(a.values.device)
    if a.scale is None and b.scale is None:
        return chip >= HOPPER
    wide = FP8_BLOCK, FP8_BLOCK
    return chip[0] == HOPPER[0] and a.block == (1, FP8_BLOCK) and b.block in ((1, FP8_BLOCK), wide)


def by_tensor(a_RK: Rounded, b_SK: Rounded) -> Tensor:
    """torch's scaled product with one factor for each operand; sums in fp32, also between its own steps."""
    a, b = codes(a_RK), codes(b_SK)
    scale_a, scale_b = 1 / a_RK.factor.view(()), 1 / b_SK.factor.view(())
    out = torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=torch.float32, use_fast_accum=False)
    return out[: a_RK.shape[0], : b_SK.shape[0]]


def by_blocks(a_RK: Rounded, b_SK: Rounded) -> Tensor:
    """torch's scaled product with scales of blocks."""
    recipes = [
        F.ScalingType.BlockWise128x128 if one.block[0] > 1 else F.ScalingType.BlockWise1x128 for one in (a_RK, b_SK)
    ]
    # bf16 is the one output that every release has for blocks.
    out = F.scaled_mm(
        *(codes(a_RK), codes(b_SK).t(), block_scales(a_RK), recipes[0], block_scales(b_SK).t(), recipes[1]),
        output_dtype=torch.bfloat16,
    )
    return out[: a_RK.shape[0], : b_SK.shape[0]].float()


def codes(one: Rounded) -> Tensor:
    """The 8-bit codes, filled up with zeros to what the product wants."""
    fill = [-size % ALIGN for size in one.values.shape[::-1]]
    return F.pad(one.values, (0, fill[0], 0, fill[1])).to(one.form.dtype).contiguous()


def block_scales(one: Rounded) -> Tensor:
    """Scales as cuBLAS reads them: of 1 x 128 blocks [R, K / 128] with rows side by side in memory, of 128 x 128 with
    the blocks of K side by side, filled up."""
    assert one.scale is not None
    if one.block[0] == 1:
        scale = F.pad(one.scale, (0, 0, 0, -len(one.scale) % ALIGN))
        return scale.t().contiguous().t()
    return F.pad(one.scale, (0, -one.scale.shape[1] % SCALES)).contiguous()
