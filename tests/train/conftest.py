import pytest
import torch

from tests.models import tiny
from trimaran.model.hybrid import HybridModel


@pytest.fixture
def model() -> HybridModel:
    """Every kind of layer but windows, two depths of MTP; training mode."""
    return tiny("latent", torch.float64, mtp_depth=2).train()
