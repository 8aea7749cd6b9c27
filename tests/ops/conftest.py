"""Every test of an operation runs with NaN in freshly allocated memory, so that a number nobody wrote shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import the compiler
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.set_deterministic_debug_mode(mode)
