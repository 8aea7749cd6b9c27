"""The kernel for single queries over paged keys against the gathering formula."""

import pytest
import torch

from tests.ops.agree import near
from tests.ops.triton.operands import DEVICE, TOLERANCE, exact, given
from trimaran.ops import paged, triton_paged


def check(lengths: list[int], page: int, heads: int, groups: int, width: int, window: int | None, dtype) -> None:
    rows, depth = len(lengths), -(-max(lengths) // page) + 1
    q = given(rows, heads, width, dtype=dtype, seed=1).detach()
    k, v = (given((rows * depth + 1) * page, groups, width, dtype=dtype, seed=seed).detach() for seed in (2, 3))
    generator = torch.Generator().manual_seed(5)
    table = torch.randperm(rows * depth + 1, generator=generator)[: rows * depth].view(rows, depth)
    spare = torch.arange(depth) * page >= torch.tensor(lengths)[:, None]
    k.view(-1, page, groups, width)[table[spare].to(DEVICE)] = float("nan")  # pages that are nobody's
    inputs = (table.to(DEVICE), torch.tensor(lengths, device=DEVICE))
    found = triton_paged.paged_attention(q, k, v, *inputs, page, window, 0.3)
    expected = paged.paged_attention_reference(*map(exact, (q, k, v, *inputs)), page, window, 0.3)
    near(found.cpu(), expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("window", "dtype"), [(None, torch.float32), (5, torch.bfloat16)])
def test_paged_attention_equals_formula(window, dtype):
    check([1, 70], 4, 6, 2, 12, window, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_attention_equals_formula_at_length(window, dtype):
    check([1500, 63, 100, 257], 32, 10, 2, 40, window, dtype)
