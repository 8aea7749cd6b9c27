"""The captured step's own code, run as it is, against ordinary passes over single tokens."""

import pytest
import torch

from trimaran.engine.captured import CapturedStep
from trimaran.engine.paged import Segment
from trimaran.engine.pages import Memory, Sequence
from trimaran.errors import Refusal
from trimaran.model.config import ModelConfig
from trimaran.model.hybrid import HybridModel, build
from trimaran.ops import backend
from trimaran.ops.rounding import key_of, keys_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [5, 1, 9]


def config(pattern: str) -> ModelConfig:
    return ModelConfig(
        pattern=pattern,
        vocab_size=32,
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        mamba_num_heads=4,
        mamba_head_dim=4,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=4,
        intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_latent_size=8,
        moe_intermediate_size=16,
        initializer_range=0.2,
    )


def opened(model: HybridModel, ssm_dtype: torch.dtype | None = None) -> tuple[Memory, list[Sequence]]:
    """Three prompts read, their slots and pages in no order."""
    memory = Memory(model, rows=4, pages=24, page=4, ssm_dtype=ssm_dtype)
    first = memory.open()
    sequences = [memory.open() for _ in LENGTHS]
    memory.close(first)
    sequences = [sequences[1], sequences[2], sequences[0]]
    with torch.no_grad():
        for number, (sequence, length) in enumerate(zip(sequences, LENGTHS)):
            assert memory.reserve(sequence, length)
            prompt = (torch.arange(length, device=DEVICE) * 7 + number)[None] % 32
            model.hidden(prompt, state=memory.view([Segment(sequence, length)]))
    return memory, sequences


@torch.no_grad()
def ordinary(model: HybridModel, memory: Memory, tokens: torch.Tensor, rows: list[Sequence]) -> torch.Tensor:
    return model(tokens[None], state=memory.view([Segment(row, 1) for row in rows]))[0]


def compared(model: HybridModel, ssm_dtype: torch.dtype | None, tolerance: float) -> None:
    """Seven steps, over borders of pages; then one row leaves and another stands in its place."""
    (memory, rows), (plain, others) = (opened(model, ssm_dtype) for _ in range(2))
    step = CapturedStep(model, memory, rows=3, longest=24)
    for number in range(9):
        tokens = torch.tensor([number, 30 - number, 3 * number], device=DEVICE)
        if number == 7:
            for held, listed in ((memory, rows), (plain, others)):
                held.close(listed[1])
                listed[1] = held.open()
        for held, listed in ((memory, rows), (plain, others)):
            assert all(held.reserve(row, 1) for row in listed)
        found, expected = step(tokens, rows), ordinary(model, plain, tokens, others)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert [row.length for row in rows] == [row.length for row in others] == step.state.length_N.tolist()
    for one, other in ((memory.tail, plain.tail), (memory.ssm, plain.ssm), (memory.kv, plain.kv)):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pattern", ["ME*M-", "MW", "RE", "M"])
def test_steps_equal_ordinary_passes(pattern):
    compared(build(config(pattern), device=DEVICE, dtype=torch.float64), None, 1e-9)


def test_a_narrow_state_is_rounded_as_in_ordinary_passes():
    compared(build(config("M*M"), device=DEVICE), torch.float16, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ssm_dtype", [None, torch.float16])
def test_kernels_for_a_gpu_equal_ordinary_passes(ssm_dtype):
    pytest.importorskip("triton")
    with backend.using("triton,-native"):
        compared(build(config("ME*W" if ssm_dtype is None else "M"), device=DEVICE), ssm_dtype, 1e-3)


def test_what_has_no_room_is_refused():
    model = build(config("M*"), device=DEVICE)
    memory, rows = opened(model)
    with pytest.raises(Refusal, match="5 rows"):
        CapturedStep(model, memory, rows=5, longest=24)
    step = CapturedStep(model, memory, rows=2, longest=10)
    tokens = torch.tensor([1, 2], device=DEVICE)
    for wrong in ([rows[0]], [rows[0], rows[0]]):
        with pytest.raises(ValueError, match="step"):
            step(tokens, wrong)
    memory.reserve(rows[2], 8)
    step(tokens, [rows[1], rows[2]])
    with pytest.raises(ValueError, match="no room"):
        step(tokens, [rows[1], rows[2]])
    model.version += 1
    with pytest.raises(RuntimeError, match="version"):
        step(tokens, rows[:2])


def test_keys_made_on_the_device_are_the_hosts():
    numbers = torch.tensor([0, 1, 7, 99_999, 2_000_003, 2**31])
    words = [key_of(3, int(number)) for number in numbers]
    assert keys_of(3, numbers).tolist() == [word - (word >> 31 << 32) for word in words]
