import errno
import json

import numpy as np
import pytest

from trimaran.data import shards as room
from trimaran.data.corpora import Document
from trimaran.data.shards import TokenShards, pieces_of, write
from trimaran.data.split import Listed
from trimaran.errors import Refusal
from trimaran.text.tokenizer import Tokenizer


def test_documents_come_back_with_their_borders(shards, documents, tokenizer):
    assert len(shards) == len(documents) and len(shards.files) > 3  # shard_tokens is small, so that spans cross files
    for place, document in enumerate(documents):
        ids = shards.document(place).tolist()
        assert ids == [tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id]
    whole = shards.tokens(0, shards.total_tokens)
    assert whole.dtype == np.int64 and len(whole) == shards.total_tokens == shards.starts[-1]
    assert shards.total_bytes == sum(len(one.text.encode()) for one in documents) == tokenizer.bytes_of(whole)
    assert shards.files[0].dtype == np.uint16 and shards.tokens(5, 5).size == 0


def test_long_documents_are_cut_where_the_ids_do_not_change(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(room, "PIECE", 50)
    text = "def f(x):\n    return x\n\n\n" * 20 + "sail\r\n  \nrope " * 30 + "no line end at all " * 10
    pieces = pieces_of(text)
    assert len(pieces) > 5 and "".join(pieces) == text
    assert [identity for piece in pieces for identity in tokenizer.encode(piece)] == tokenizer.encode(text)
    shards = write(Listed([Document("long", text)]), tokenizer, tmp_path / "long")
    assert tokenizer.decode(shards.document(0)[1:-1]) == text


def test_the_same_text_is_encoded_once_and_other_text_is_refused(documents, tokenizer, tmp_path):
    folder = tmp_path / "text"
    write(Listed(documents), tokenizer, folder)
    before = (folder / "tokens-00000.bin").stat().st_mtime_ns
    write(Listed(documents), tokenizer, folder)
    assert (folder / "tokens-00000.bin").stat().st_mtime_ns == before
    with pytest.raises(Refusal, match="another corpus"):
        write(Listed(documents[1:]), tokenizer, folder)
    with pytest.raises(Refusal, match="another tokenizer"):
        write(Listed(documents), Tokenizer.train(["other words entirely"], 300), folder)


def test_nothing_is_left_when_encoding_fails(documents, tokenizer, tmp_path):
    class Broken(Listed):
        def documents(self):
            yield documents[0]
            raise OSError(errno.ENOSPC, "no space left on device")

    with pytest.raises(Refusal, match="no space left"):
        write(Broken(documents), tokenizer, tmp_path / "text")
    with pytest.raises(Refusal, match="no documents"):
        write(Listed([]), tokenizer, tmp_path / "text")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tokens-00000.bin", "documents.bin", "index.json"])
def test_damage_is_refused(documents, tokenizer, tmp_path, name):
    path = tmp_path / "text" / name
    write(Listed(documents), tokenizer, path.parent)
    whole = path.read_bytes()
    damaged = [whole[:-2], bytes([whole[0] ^ 1]) + whole[1:], b"", None]
    for content in damaged:
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(Refusal, match=name):
            TokenShards(path.parent)
        with pytest.raises(Refusal, match=name):
            write(Listed(documents), tokenizer, path.parent)


def test_large_vocabularies_take_four_bytes(documents, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", (1 << 16) + 1)
    shards = write(Listed(documents), tokenizer, tmp_path / "text")
    assert shards.files[0].dtype == np.uint32
    assert json.loads((tmp_path / "text" / "index.json").read_text())["vocab_size"] == shards.vocab_size
