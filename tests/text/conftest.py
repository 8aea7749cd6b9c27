import sysconfig
from pathlib import Path

import pytest

from trimaran.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    folder = Path(sysconfig.get_path("stdlib")) / "json"
    return Tokenizer.train((path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))), 512)


@pytest.fixture(scope="session")
def saved(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder
