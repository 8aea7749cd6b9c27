"""GGUF files: block formats to the last bit as ggml's own package decodes them; damaged files are refused, whatever
their damage, without hanging or taking memory."""

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import gguf_files
from tests.gguf_files import gguf
from trimaran.errors import Refusal
from trimaran.model.dequantize import FORMATS, dequantize
from trimaran.model.gguf import GGUF

KINDS = {block.name: kind for kind, block in FORMATS.items()}


def small(path, **metadata):
    """A file of a few hundred bytes with every kind of value in its header."""
    writer = gguf.GGUFWriter(path, arch="llama")
    for number, kind in enumerate(("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"), 1):
        getattr(writer, f"add_{kind}")(f"k.{kind}", number)
    writer.add_float32("k.float32", 0.5)
    writer.add_float64("k.float64", 0.25)
    writer.add_bool("k.bool", True)
    writer.add_string("k.string", "hull ⛵")
    writer.add_array("k.numbers", [1, 2, 3])
    writer.add_array("k.texts", ["a", "", "ç"])
    writer.add_array("k.nested", [[1, 2], [3]])
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.arange(32, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return small(tmp_path_factory.mktemp("gguf") / "small.gguf").read_bytes()


@pytest.mark.parametrize("form", sorted(KINDS))
def test_a_format_is_decoded_to_the_last_bit(form):
    kind = gguf.GGMLQuantizationType[form]
    assert kind == KINDS[form] and gguf.GGML_QUANT_SIZES[kind] == (FORMATS[kind].elements, FORMATS[kind].nbytes)
    raw = gguf_files.blocks(form, (64, 256), np.random.default_rng(0))
    ours = dequantize(kind, raw.reshape(-1))
    # The package leaves plain formats to numpy.
    plain = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
    theirs = raw.view(plain[form]).astype(ours.dtype) if form in plain else gguf.quants.dequantize(raw, kind)
    assert ours.dtype == theirs.dtype and np.array_equal(ours.view(np.uint8), theirs.reshape(-1).view(np.uint8))
    assert len(np.unique(ours)) > 500


def test_values_and_tensors_come_back(tmp_path):
    file = GGUF(small(tmp_path / "a.gguf"))
    found = file.metadata
    assert [found[f"k.{kind}"] for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32")] == [*range(1, 7)]
    assert (found["k.uint64"], found["k.int64"], found["k.float32"], found["k.float64"]) == (7, 8, 0.5, 0.25)
    assert found["k.bool"] is True and found["k.string"] == "hull ⛵" and found["k.texts"] == ["a", "", "ç"]
    assert found["k.numbers"].tolist() == [1, 2, 3] and [list(row) for row in found["k.nested"]] == [[1, 2], [3]]
    assert np.array_equal(file.read("one"), [[0, 1, 2], [3, 4, 5]])
    assert np.array_equal(file.read("two"), np.arange(32)) and file.read("two").dtype == np.float32
    assert file.formats() == {"F32": 1, "F16": 1}


def test_the_package_itself_reads_the_same(tmp_path):
    path = gguf_files.tiny_llama(tmp_path / "tiny.gguf", ("Q4_K", "Q8_0", "F16"))
    ours, theirs = GGUF(path), gguf.GGUFReader(path)
    assert set(ours.tensors) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(ours.read(tensor.name), values), tensor.name


def opened(path, data):
    """What became of the file with this content: the file, or None where it was refused."""
    path.write_bytes(data)
    try:
        return GGUF(path)
    except Refusal:
        return None


def test_a_file_cut_anywhere_is_refused(whole, tmp_path):
    assert opened(tmp_path / "cut.gguf", whole) is not None
    last = max(tensor.offset + tensor.nbytes for tensor in GGUF(tmp_path / "cut.gguf").tensors.values())
    for length in range(last):
        assert opened(tmp_path / "cut.gguf", whole[:length]) is None, length


@given(changes=st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_refused_or_read(whole, tmp_path_factory, changes):
    data = bytearray(whole)
    for place, value in changes:
        data[place % len(data)] = value
    file = opened(tmp_path_factory.getbasetemp() / "changed.gguf", bytes(data))
    for name in file.tensors if file else ():
        if file.tensors[name].kind in FORMATS:
            assert file.read(name).shape == file.tensors[name].shape


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


HUGE = (1 << 63) - 1
ABSURD = {
    "tensors": struct.pack("<QQ", HUGE, 0),
    "pairs": struct.pack("<QQ", 0, HUGE),
    "a key": struct.pack("<QQQ", 0, 1, HUGE) + b"key",
    "a text": struct.pack("<QQ", 0, 1) + string("k") + struct.pack("<IQ", 8, HUGE),
    "an array": struct.pack("<QQ", 0, 1) + string("k") + struct.pack("<IIQ", 9, 4, HUGE),
    "an array of texts": struct.pack("<QQ", 0, 1) + string("k") + struct.pack("<IIQ", 9, 8, HUGE),
    "an array of arrays": struct.pack("<QQ", 0, 1) + string("k") + struct.pack("<IIQ", 9, 9, HUGE),
    "depth": struct.pack("<QQ", 0, 1) + string("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 2000,
    "a kind of value": struct.pack("<QQ", 0, 1) + string("k") + struct.pack("<IQ", 99, 0),
    "dimensions": struct.pack("<QQ", 1, 0) + string("t") + struct.pack("<I", 1 << 31) + bytes(64),
    "a size": struct.pack("<QQ", 1, 0) + string("t") + struct.pack("<IQIQ", 1, HUGE, 0, 0) + bytes(64),
    "no numbers": struct.pack("<QQ", 1, 0) + string("t") + struct.pack("<IQIQ", 1, 0, 0, 0) + bytes(64),
    "an offset": struct.pack("<QQ", 1, 0) + string("t") + struct.pack("<IQIQ", 1, 4, 0, HUGE) + bytes(64),
    "half a block": struct.pack("<QQ", 1, 0) + string("t") + struct.pack("<IQIQ", 1, 33, 8, 0) + bytes(64),
    "twice": struct.pack("<QQ", 0, 2) + (string("k") + struct.pack("<II", 4, 1)) * 2,
    "no text": struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1),
    "alignment": struct.pack("<QQ", 0, 1) + string("general.alignment") + struct.pack("<II", 4, 0),
}


@pytest.mark.parametrize("what", ABSURD)
def test_absurd_counts_cost_nothing(what, tmp_path):
    data = b"GGUF" + struct.pack("<I", 3) + ABSURD[what] + bytes(100)
    tracemalloc.start()
    try:
        assert opened(tmp_path / "absurd.gguf", data) is None
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "does not begin with GGUF"),
        (b"GG", "does not begin with GGUF"),
        (b"PK\x03\x04 a zip", "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
        (b"GGUF\x03", "truncated"),
    ],
)
def test_another_kind_of_file_is_named(data, told, tmp_path):
    path = tmp_path / "odd.gguf"
    path.write_bytes(data)
    with pytest.raises(Refusal, match=told):
        GGUF(path)
    with pytest.raises(Refusal, match="no file"):
        GGUF(tmp_path)


def test_an_unknown_format_is_refused_when_it_is_asked_for(tmp_path):
    raw = np.zeros((4, 66), dtype=np.uint8)  # IQ2_XXS: 256 numbers in 66 bytes
    path = gguf_files.write(tmp_path / "iq.gguf", {}, {"odd": (raw, "IQ2_XXS")})
    file = GGUF(path)
    with pytest.raises(Refusal, match="odd is stored as type 16; allowed: F32, F16, Q4_0"):
        file.read("odd")
