import pytest
import torch

from tests.models import tiny
from trimaran.engine.engine import Engine
from trimaran.engine.request import EngineSettings
from trimaran.model.hybrid import HybridModel
from trimaran.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the boat, the boats", "a hull and a hull"] * 5, 300)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> HybridModel:
    """Random weights, but for a head that often ends its turn: about one token in eight."""
    model = tiny("latent", vocab_size=tokenizer.vocab_size, initializer_range=0.1)
    bonus = torch.zeros(tokenizer.vocab_size, dtype=torch.float64)
    bonus[tokenizer.id_of("<|im_end|>")] = 4.0
    model.head.register_forward_hook(lambda head, hidden, logits: logits + bonus)
    return model


@pytest.fixture
def engine(model: HybridModel, tokenizer: Tokenizer) -> Engine:
    return Engine(model, tokenizer, EngineSettings(rows=4, memory_bytes=1 << 24, tokens_per_pass=64))
