import json
import shutil

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from trimaran.errors import Refusal
from trimaran.text.tokenizer import NAMED, RESERVED, Tokenizer

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
WITH_CONTROLS = st.lists(st.one_of(ANY_TEXT, st.sampled_from(RESERVED)), max_size=5).map("".join)
HARD = [
    "",
    "\r\n\t \n",
    "1234567",
    "naïve 日本語 🧑‍🚀 \x00\x7f\ufeff",
    "<|im_end|><think></think>",
    "　\u2028\x85",
    " a  b",
]


def test_reserved_ids(tokenizer):
    assert [tokenizer.id_of(token) for token in RESERVED] == list(range(32))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert NAMED[3:7] == ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
    assert tokenizer.stop_ids == (2, 4)


@given(WITH_CONTROLS)
@settings(max_examples=200, deadline=None)
@example("".join(HARD))
def test_any_text_survives_and_forges_no_control_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not ids or min(ids) >= len(RESERVED)
    assert tokenizer.bytes_of(ids) == len(text.encode())
    assert tokenizer.encode_batch([text, text]) == [ids, ids]
    assert tokenizer.decode(tokenizer.encode(text, specials=True)) == text


@given(st.lists(st.integers(0, 511), max_size=40))
@settings(max_examples=200, deadline=None)
def test_stream_equals_decode_and_emits_whole_characters(tokenizer, ids):
    stream = tokenizer.stream()
    parts = [stream.push(identity) for identity in ids]
    assert "".join(parts) + stream.finish() == tokenizer.decode(ids)
    stream, text = tokenizer.stream(), "🧑‍🚀日本é"
    parts = [stream.push(identity) for identity in tokenizer.encode(text)]
    assert "".join(parts) == text and "\ufffd" not in "".join(parts) and stream.finish() == ""


def test_digits_are_single_tokens(tokenizer):
    ids = tokenizer.encode("x = 2026 + 11")
    assert sum(tokenizer.decode([identity]).isdigit() for identity in ids) == 6


def test_specials_are_read_on_request_and_skipped_on_request(tokenizer):
    ids = tokenizer.encode("<|im_start|>a<|im_end|>", specials=True)
    assert ids[0] == 3 and ids[-1] == 4
    assert tokenizer.decode(ids, skip_specials=True) == "a"
    assert tokenizer.bytes_of(ids) == 1


@pytest.mark.parametrize("text", HARD)
def test_transformers_agrees(tokenizer, saved, text):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    assert theirs(text)["input_ids"] == tokenizer.encode(text, specials=True)
    assert theirs.decode(tokenizer.encode(text)) == text
    roles = (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.chat_template)
    assert roles == (0, 1, 2, tokenizer.template) and len(theirs) == tokenizer.vocab_size


@pytest.mark.parametrize("model_type", ["nemotron_h", "llama", "qwen3_moe"])
def test_transformers_agrees_whatever_model_lies_beside(tokenizer, tmp_path, model_type):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    text = "<|im_start|>user" + "".join(HARD)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text)["input_ids"] == tokenizer.encode(text, specials=True)


def test_training_is_reproducible_and_folders_round_trip(tokenizer, saved, tmp_path):
    texts = ["a rose is a rose is a rose", "eine Rose"]
    assert Tokenizer.train(texts, 300).digest == Tokenizer.train(texts, 300).digest
    loaded = Tokenizer.load(saved)
    assert loaded.digest == tokenizer.digest and loaded.template == tokenizer.template
    loaded.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in saved.iterdir()
    }


def foreign(folder, config=None, **files):
    """A hub folder in another house's style: controls at the end, some of them not marked special."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["hello world"], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    backend.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    backend.add_tokens(["<think>"])
    backend.save(str(folder / "tokenizer.json"))
    for name, value in {"tokenizer_config": config, **files}.items():
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return backend


def test_foreign_folder_with_roles_from_any_of_its_files(tmp_path):
    backend = foreign(tmp_path, {"eos_token": {"content": "<|endoftext|>"}, "chat_template": "{{ messages }}"})
    ours = Tokenizer.load(tmp_path)
    end = backend.token_to_id("<|endoftext|>")
    assert (ours.eos_id, ours.pad_id, ours.bos_id, ours.template) == (end, end, None, "{{ messages }}")
    text = "hello <think> wörld<|im_end|>"
    assert ours.encode(text, specials=True) == backend.encode(text).ids
    assert not set(ours.encode(text)) & set(ours.controls.values()) and ours.decode(ours.encode(text)) == text

    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [end + 1, end]}))
    assert Tokenizer.load(tmp_path).eos_id == end + 1


def test_refusals(tmp_path, tokenizer):
    with pytest.raises(Refusal, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(Refusal, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(Refusal, match="byte-level BPE"):
        Tokenizer.load(tmp_path)
    foreign(tmp_path)
    with pytest.raises(Refusal, match="eos_token"):
        Tokenizer.load(tmp_path)
    with pytest.raises(Refusal, match="vocab_size = 100"):
        Tokenizer.train(["a"], 100)
    with pytest.raises(Refusal, match="no text"):
        Tokenizer.train([], 512)
    with pytest.raises(Refusal, match="surrogate"):
        tokenizer.encode("a\ud800")
    with pytest.raises(Refusal, match="surrogate"):
        tokenizer.encode_batch(["b", "a\ud800"])
    with pytest.raises(Refusal, match="token id 9999"):
        tokenizer.decode([9999])
    with pytest.raises(Refusal, match="<tool_call>"):
        tokenizer.id_of("<tool>")


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}},
        {"model": {"type": "BPE", "vocab": []}},
        {"added_tokens": None},
        {"added_tokens": [{"id": 1}]},
        {"pre_tokenizer": None},
    ],
)
def test_a_damaged_or_foreign_file_is_refused(change, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.document | change))
    with pytest.raises(Refusal, match=r"^tokenizer\.json (holds|has)"):
        Tokenizer.load(tmp_path)


def test_a_role_that_is_no_token_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": 3}')
    with pytest.raises(Refusal, match=r"^eos_token = 3; allowed: a token of the vocabulary"):
        Tokenizer.load(tmp_path)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_saved_folder_says_where_a_turn_ends(saved, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig.from_pretrained(saved)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == ([2, 4], 1, 0)
    Tokenizer.load(saved).save(tmp_path)
    assert files(tmp_path) == files(saved)


def test_a_folder_keeps_its_own_generation_config(saved, tmp_path):
    transformers = pytest.importorskip("transformers")
    one, two = tmp_path / "one", tmp_path / "two"
    shutil.copytree(saved, one)
    own = transformers.GenerationConfig(
        eos_token_id=[9, 4], pad_token_id=7, temperature=0.6, top_p=0.95, do_sample=True
    )
    own.save_pretrained(one)
    Tokenizer.load(one).save(two)
    theirs = transformers.GenerationConfig.from_pretrained(two)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == ([9, 4, 2], 7, 1)
    assert (theirs.temperature, theirs.top_p, theirs.do_sample) == (0.6, 0.95, True)
    before = files(two)
    Tokenizer.load(two).save(two)
    assert files(two) == before


@pytest.mark.parametrize(("ends", "wanted"), [(5, [5, 2, 4]), ([5, 2], [5, 2, 4]), (None, [2, 4])])
def test_without_a_generation_config_the_ends_are_those_of_config_json(saved, tmp_path, ends, wanted):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved / name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": ends}))
    tokenizer = Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    said = json.loads((tmp_path / "generation_config.json").read_text())
    assert said["eos_token_id"] == wanted
