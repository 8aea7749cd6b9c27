"""How one pass reads stored keys: the parts of a plan together are plain attention of each row over its keys."""

import pytest
import torch

from trimaran.engine.reach import SHORT, Rules, Span, plan
from trimaran.ops import native
from trimaran.ops.attention import attention_reference

PAGE, GROUPS, HEADS, WIDTH = 4, 2, 6, 16
COUNTS, BEFORE = (
    [1, 90, 3, 1, 200, SHORT, SHORT + 1],
    [40, 33, 0, 7, 0, 5, 1],
)  # a step, a prompt's block, a verification


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("long", [False, True])
def test_every_plan_is_plain_attention(dtype, window, shift, long):
    """Pages are scattered, and all that no row has written is NaN."""
    dice = torch.Generator().manual_seed(1)
    pool = [torch.full((1200, GROUPS, WIDTH), torch.nan, dtype=dtype) for _ in range(2)]
    free = torch.randperm(300, generator=dice).tolist()
    q_NHK = torch.randn(sum(COUNTS), HEADS, WIDTH, generator=dice).to(dtype)
    if long and not native.takes_long_attention(q_NHK, *pool):
        pytest.skip("the kernel for many queries does not run here")
    spans, expected = [], []
    for count, before in zip(COUNTS, BEFORE, strict=True):
        start, keys = sum(span.count for span in spans), before + count
        spans.append(Span(start, count, before, [free.pop() for _ in range(-(-(keys + shift) // PAGE))]))
        at = torch.tensor([spans[-1].pages[(j + shift) // PAGE] * PAGE + (j + shift) % PAGE for j in range(keys)])
        for tensor in pool:
            tensor[at] = torch.randn(keys, GROUPS, WIDTH, generator=dice).to(dtype)
        query, key = torch.arange(before, keys)[:, None], torch.arange(keys)
        mask = (key <= query) & (key > query - (window or keys))
        read = (t[None].double() for t in (q_NHK[start : start + count], pool[0][at], pool[1][at]))
        expected.append(attention_reference(*read, mask, False, 0.25)[0])
    key_bytes = 2 * GROUPS * WIDTH * dtype.itemsize
    found = plan(spans, window, Rules(PAGE, shift, key_bytes, torch.device("cpu"), long=long))
    assert sum(part.table is not None for part in found.own) == (3 if long else 0)
    out_NHK, count = found.read(q_NHK, *pool, 0.25)
    apart = (out_NHK.double() - torch.cat(expected)).abs().max() / torch.cat(expected).abs().max()
    assert apart < (1e-5 if dtype is torch.float32 else 1e-2)
    rows = zip(BEFORE, COUNTS, strict=True)
    least = sum((before if window is None else min(before, window - 1)) + count for before, count in rows)
    assert count >= least * key_bytes
