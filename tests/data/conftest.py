import random

import pytest

from trimaran.data.corpora import Document
from trimaran.data.shards import write
from trimaran.data.split import Listed
from trimaran.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    random.seed(0)
    words = ["sea", "hull", "mast", "tide", "wind", "rope", "keel", "sail", "anchor", "harbour"]
    return [Document(f"log-{n}", " ".join(random.choices(words, k=random.randint(1, 60))) + "\n") for n in range(50)]


@pytest.fixture(scope="session")
def tokenizer(documents) -> Tokenizer:
    return Tokenizer.train((one.text for one in documents), 320)


@pytest.fixture(scope="session")
def shards(documents, tokenizer, tmp_path_factory):
    return write(Listed(documents), tokenizer, tmp_path_factory.mktemp("shards") / "text", shard_tokens=300)
