"""`trimaran score RUN representation`: a table, one JSON document, a picture; called again, it goes on."""

import json
from pathlib import Path

import pytest
import torch

from tests.models import tiny
from trimaran.engine.folder import FolderSettings, open_folder
from trimaran.errors import Refusal
from trimaran.evals.representation_run import RepresentationSettings, analysed, main
from trimaran.model import hub
from trimaran.text.tokenizer import Tokenizer

WORDS = ["lengths=[4,12]", "suffix=5", "samples=4", "period=3"]


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("run")
    with pytest.warns(UserWarning, match="opens in trimaran only"):
        hub.save(tiny("everything", torch.float32, vocab_size=tokenizer.vocab_size), place)
    tokenizer.save(place)
    (place / "book.txt").write_text("\n".join(f"boat {number} and its hull" for number in range(200)))
    return place


@pytest.fixture
def words(folder):
    return [*WORDS, f"path={folder / 'book.txt'}"]


def test_the_verb_prints_a_table_and_leaves_results_and_a_picture(folder, words, capsys):
    assert main(str(folder), words) == 0
    out = capsys.readouterr().out
    (home,) = (folder / "scores").glob("representation-*")
    document = json.loads((home / "results.json").read_text())
    assert document["layers"] == ["0 embedding", *(f"{n} {letter}" for n, letter in enumerate("M*EW-RE", 1))]
    assert all(layer in out for layer in document["layers"]) and "no recipe says" in out
    assert set(document["measured"]) == {"trained", "untrained"}
    for parts in document["measured"].values():
        assert set(parts) == {"text", "periodic", "noise"}
        for part in parts.values():
            assert [len(of_layers) for of_layers in part["accs"]] == [8, 8]
            assert all(self == 1 for self in (part["self"][0][0], part["self"][1][0]))
            for accs, (low, high) in zip(part["accs"][1], part["interval"][1]):
                assert low - 1e-9 <= accs <= high + 1e-9
    same = [document["measured"][name]["text"]["compressed"] for name in ("trained", "untrained")]
    assert same[0] == same[1]
    assert document["measured"]["trained"]["text"]["accs"] != document["measured"]["untrained"]["text"]["accs"]
    assert (home / "representation.png").read_bytes().startswith(b"\x89PNG")
    (folder / "recipe.toml").write_text('stage = "pretrain"\n[data]\nsequence_length = 64\n')
    assert main(str(folder), words) == 0
    (folder / "recipe.toml").unlink()
    assert "trained on rows of 64 tokens" in capsys.readouterr().out
    assert main(str(folder), words, json=True) == 0
    assert json.loads(capsys.readouterr().out)["measured"] == document["measured"]


def test_what_is_measured_is_not_measured_again(folder, words, tmp_path):
    held = open_folder(str(folder), FolderSettings())
    settings = RepresentationSettings(
        lengths=(4, 12), suffix=5, samples=4, period=3, path=str(folder / "book.txt"), untrained=False
    )
    whole = analysed(held, settings, tmp_path)
    assert whole == analysed(held, settings)  # the same without a folder
    (tmp_path / "trained-noise.json").unlink()  # as if killed before it
    kept = json.loads((tmp_path / "trained-text.json").read_text())
    (tmp_path / "trained-text.json").write_text(json.dumps(kept | {"mark": 1}))
    again = analysed(held, settings, tmp_path)
    assert again["measured"]["trained"]["text"]["mark"] == 1
    assert again["measured"]["trained"]["noise"] == whole["measured"]["trained"]["noise"]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("lengths=[12,4]", "rising numbers"),
        ("lengths=[1]", "rising numbers"),
        ("sources=[]", "each once"),
        ('sources=["prose"]', "prose"),
        ("lengths=[4000]", "pieces of 4005 tokens"),
        ("path=nowhere.txt", "no such file"),
        ("length=[4]", "lengths"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, words, word, told):
    with pytest.raises(Refusal, match=told):
        main(str(folder), [*words, word])
