import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# A clock says nothing about what is tested, and the machine may be busy.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

# Where there is no GPU, its kernels are tested in triton's interpreter. That must be asked for before anything imports
# triton, as torch's compiler does; kernels run in it only where a test names them (ops.triton_backend).
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # tests run in parallel processes; more threads would only contend


@pytest.fixture(autouse=True)
def _no_grad_leaks():
    """Every test starts with gradients on and the default dtype."""
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
