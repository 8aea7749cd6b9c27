import pytest
import torch

from trimaran.ops import backend, native


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every test of an operation runs with NaN in freshly allocated memory, so that a number nobody wrote shows."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import the compiler
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.set_deterministic_debug_mode(mode)


@pytest.fixture(params=["auto", *["-native.amx"] * ("amx_bf16" in native.instruction_sets())])
def kernels(request):
    """The best kernels for this processor, and where those use a matrix unit, those without it too."""
    with backend.using(request.param):
        yield
