import json
import sys
from pathlib import Path

import pytest

from trimaran.data.corpora import HELD_OUT, Document, read, stdlib_source
from trimaran.data.split import Listed, split
from trimaran.errors import Refusal


def test_stdlib_leaves_out_what_is_no_library_and_holds_out_whole_packages():
    train, held_out = stdlib_source()
    names = [source.name for source in train.sources]
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "encodings", "idlelib", "lib2to3", "pydoc_data", *HELD_OUT}
    assert {"json/decoder.py", "argparse.py"} <= set(names) and names == sorted(names)
    assert {source.name.split("/")[0] for source in held_out.sources} == set(HELD_OUT)
    assert train.digest == stdlib_source()[0].digest != held_out.digest
    assert f"{len(names)} files" in str(train) and train.digest[:12] in str(train)
    assert train.total_bytes == sum(len(text.encode()) for text in train.texts())


def test_stdlib_refuses_an_unknown_package_and_an_interpreter_without_sources(tmp_path):
    with pytest.raises(Refusal, match="top-level packages such as email"):
        stdlib_source(("emial",))
    with pytest.raises(Refusal, match=r"no \.py files"):
        stdlib_source(root=tmp_path)


def test_what_can_not_be_read_is_counted_and_said(tmp_path):
    (tmp_path / "b.txt").write_bytes("über\r\n".encode())
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes(b"\xfcber")
    (tmp_path / "cut.txt").write_bytes("é".encode()[:1])
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    corpus = read(tmp_path)
    assert list(corpus.documents()) == [Document("a.md", "first"), Document("b.txt", "über\r\n")]
    assert dict(corpus.skipped).keys() == {"image.png", "latin.txt", "cut.txt", "empty.txt", "gone.txt"}
    assert "skipped 5" in str(corpus)


def test_jsonl_and_parquet_give_a_document_a_row(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "one\u2028line", "body": "x"}, {"text": "two", "body": "y"}]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert list(read(tmp_path / "rows.jsonl").texts()) == ["one\u2028line", "two"]
    assert list(read(tmp_path / "rows.parquet", field="body").texts()) == ["x", "y"]
    assert [one.name for one in read(tmp_path).documents()] == [
        *("rows.jsonl:1", "rows.jsonl:3"),
        *("rows.parquet:1", "rows.parquet:2"),
    ]
    assert read(tmp_path / "rows.jsonl").digest != read(tmp_path / "rows.jsonl", field="body").digest
    with pytest.raises(Refusal, match=r"no column 'txt'; allowed: text"):
        list(read(tmp_path / "rows.parquet", field="txt").documents())


def test_parquet_without_its_extra_names_the_command(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(Refusal, match=r"pip install trimaran\[data\]"):
        list(read(tmp_path / "rows.parquet").documents())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', "line 2 is no JSON"),
        ('{"text": "a"}\n\n[1]', "line 3 is a list"),
        ('{"txt": "a"}', "line 1 has no field 'text'; allowed: its fields: txt"),
        ('{"text": 3}', "line 1: 'text' is int"),
        ('{"text": "a\\ud800"}', "line 1: 'text' holds half a surrogate pair at character 1"),
    ],
)
def test_bad_jsonl_lines_are_named(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(Refusal, match=message):
        list(read(tmp_path / "rows.jsonl").documents())


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "empty"), (b"\0\1", "binary"), (b"\xff\xfe", "not UTF-8"), (None, "no such file")]
)
def test_files_that_are_no_text_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "data.txt").write_bytes(content)
    with pytest.raises(Refusal, match=message):
        read(tmp_path / "data.txt")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device here")
def test_devices_are_not_read():
    with pytest.raises(Refusal, match="zero is no regular file"):
        read("/dev/zero")


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(Refusal, match="0 files skipped"):
        read(tmp_path)


def test_split_keeps_every_document_once_and_moves_none_when_others_come(documents):
    train, held_out = split(Listed(documents), 0.2)
    kept, away = list(train.documents()), list(held_out.documents())
    assert sorted([*kept, *away], key=str) == sorted(documents, key=str) and 0 < len(away) < 25
    assert train.digest != held_out.digest
    fewer = {one.name for one in split(Listed(documents[:30]), 0.2)[1].documents()}
    assert fewer == {one.name for one in away} & {one.name for one in documents[:30]}


@pytest.mark.parametrize("text", ["a\nb\nc\nd\n", "without a line end"])
def test_split_cuts_a_single_document(text):
    parts = [list(part.texts()) for part in split(Listed([Document("one", text)]), 0.25)]
    assert "".join(parts[0] + parts[1]) == text and all(part[0] for part in parts)


@pytest.mark.parametrize("text", ["title\n" + "x" * 10_000, "x" * 10_000, "line\n" * 2_000])
def test_a_cut_holds_out_about_what_was_asked_wherever_lines_end(text):
    _, (away,) = (list(part.texts()) for part in split(Listed([Document("one", text)]), 0.05))
    assert 0.05 * len(text) - 1 <= len(away) <= 0.1 * len(text)


def test_split_refuses_shares_outside_0_1(documents):
    with pytest.raises(Refusal, match="held_out = 1"):
        split(Listed(documents), 1.0)
    with pytest.raises(Refusal, match="no documents"):
        split(Listed([]), 0.5)
