import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.models import tiny
from trimaran.model import hub
from trimaran.model.hybrid import HybridModel
from trimaran.text.tokenizer import Tokenizer

LETTERS = ["a", "b", "c", "d", "e", " ", "é", "ß", "日", "本", "🙂"]
VOCABULARY = 330  # more ids than the tokenizer has: the last must never be chosen


def patterns(count: int, seed: int) -> list[str]:
    """Texts that repeat 2 to 4 letters of one to four bytes."""
    letters = random.Random(seed)
    return ["".join(letters.sample(LETTERS, letters.randint(2, 4))) * 40 for _ in range(count)]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the boat, the boats", "a hull and a hull"] * 5, 300)


@pytest.fixture(scope="session")
def copier(tokenizer: Tokenizer) -> HybridModel:
    """A small model with a draft block, in fp64, that has half learnt to go on with a pattern."""
    model = tiny("latent", torch.float32, vocab_size=VOCABULARY, initializer_range=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    with torch.enable_grad():
        for step in range(70):
            tokens = torch.tensor([tokenizer.encode(text)[:32] for text in patterns(6, seed=step)])
            hidden = model.hidden(tokens)
            loss = cross_entropy(model.head(hidden[:, :-1]), tokens[:, 1:])
            for depth in (1, 2):
                hidden = model.mtp(hidden[:, :-1], tokens[:, depth:])
                loss = loss + 0.5 * cross_entropy(model.head(hidden[:, :-1]), tokens[:, depth + 1 :])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.double().eval()


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.fixture(scope="session")
def pattern_prompts(tokenizer: Tokenizer) -> Callable[[], list[list[int]]]:
    return lambda: [
        tokenizer.encode(text)[:n] for text, n in zip(patterns(6, seed=999), (40, 30, 21, 12, 11, 1), strict=True)
    ]


@pytest.fixture(scope="session")
def base_run(tmp_path_factory, copier, tokenizer) -> Path:
    """A run folder as pretraining leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    hub.save(copier, folder)
    tokenizer.save(folder)
    (folder / "recipe.toml").write_text('stage = "pretrain"\n')
    return folder


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory, base_run) -> Path:
    """The same after a stage that teaches conversation."""
    folder = tmp_path_factory.mktemp("runs") / "chat"
    shutil.copytree(base_run, folder)
    (folder / "recipe.toml").write_text('stage = "sft"\n')
    return folder
