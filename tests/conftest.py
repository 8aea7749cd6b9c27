import pytest
import torch

torch.set_num_threads(1)  # tests run in parallel processes; more threads would only contend


@pytest.fixture(autouse=True)
def _no_grad_leaks():
    """Every test starts with gradients on and the default dtype."""
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
