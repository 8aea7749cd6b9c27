"""The tokenizer in a GGUF file gives the ids of the one that was put in, splits as its name says, and tables that do
not fit together are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import gguf_files
from trimaran.errors import Refusal
from trimaran.text.chat import render
from trimaran.text.gguf import tokenizer_of
from trimaran.text.tokenizer import Tokenizer


def metadata(**changed):
    """As the reader gives it: numeric arrays as numpy."""
    found = gguf_files.words(gguf_files.tokenizer())
    found |= {f"tokenizer.{key.replace('__', '.')}": value for key, value in changed.items()}
    found["tokenizer.ggml.token_type"] = np.array(found["tokenizer.ggml.token_type"], dtype=np.int32)
    return {key: value for key, value in found.items() if value is not None}


SOURCE, IMPORTED = gguf_files.tokenizer(), tokenizer_of(metadata())


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_ids_are_those_of_the_tokenizer_that_was_put_in(text):
    ids = IMPORTED.encode(text)
    composed = IMPORTED.plain.normalizer.normalize_str(text)  # Qwen2's split comes with NFC
    assert ids == SOURCE.encode(composed)
    assert IMPORTED.decode(ids) == composed


def test_roles_controls_and_template_come_along(tmp_path):
    assert (IMPORTED.bos_id, IMPORTED.eos_id, IMPORTED.pad_id) == (1, 2, 0)
    assert IMPORTED.controls == SOURCE.controls and IMPORTED.stop_ids == SOURCE.stop_ids
    assert IMPORTED.encode("<|im_end|>") != [4] == IMPORTED.encode("<|im_end|>", specials=True)
    assert render([{"role": "user", "content": "a"}], template=IMPORTED.template) == "<|im_start|>a<|im_end|>"
    IMPORTED.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.digest == IMPORTED.digest and again.template == IMPORTED.template
    assert (again.bos_id, again.eos_id, again.pad_id) == (1, 2, 0)


def test_transformers_opens_the_saved_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    IMPORTED.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the boat sails", "12 hulls, ⛵\n\n  x", "<|im_end|> <think>"):
        assert theirs(text, add_special_tokens=False).input_ids == IMPORTED.encode(text, specials=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize(
    ("split", "pieces"),
    [
        ("gpt-2", ["don", "'t", " pay", " 1234", " ", " 5", "€"]),
        ("smollm", ["don", "'t", " pay", " ", "1", "2", "3", "4", "  ", "5", "€"]),
        ("llama-bpe", ["don", "'t", " pay", " ", "123", "4", " ", " ", "5", "€"]),
        ("qwen2", ["don", "'t", " pay", " ", "1", "2", "3", "4", " ", " ", "5", "€"]),
    ],
)
def test_text_is_split_as_the_name_says(split, pieces):
    tokenizer = tokenizer_of(metadata(ggml__pre=split))
    text = "don't pay 1234  5€"
    found = tokenizer.plain.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in found] == pieces
    assert tokenizer.plain.model.ignore_merges == (split == "llama-bpe")


@pytest.mark.parametrize(
    ("changed", "around"),
    [
        ({}, ([], [])),
        ({"ggml__add_bos_token": True}, ([1], [])),
        ({"ggml__add_bos_token": True, "ggml__add_eos_token": True}, ([1], [2])),
        ({"ggml__pre": "llama-bpe"}, ([1], [])),
        ({"ggml__pre": "llama-bpe", "ggml__add_bos_token": False}, ([], [])),
    ],
)
def test_what_stands_round_a_text_is_what_the_file_asks_for(changed, around):
    tokenizer = tokenizer_of(metadata(**changed))
    before, after = around
    assert tokenizer.marked.encode("the boat", add_special_tokens=True).ids == [
        *before,
        *tokenizer.encode("the boat"),
        *after,
    ]


def test_a_split_may_be_told_where_the_file_names_none():
    unnamed = metadata(ggml__pre=None)
    assert tokenizer_of(unnamed, "qwen2").digest == IMPORTED.digest
    with pytest.raises(Refusal, match="does not say how text is split"):
        tokenizer_of(unnamed)
    with pytest.raises(Refusal, match=r"split = 'smollm' but tokenizer\.ggml\.pre = 'qwen2'"):
        tokenizer_of(metadata(), "smollm")


def changed_list(key, change):
    found = list(metadata()[f"tokenizer.ggml.{key}"])
    change(found)
    return {f"ggml__{key}": found}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"ggml__model": "llama"}, "tokenizer.ggml.model = 'llama'"),
        ({"ggml__model": None}, "tokenizer.ggml.model = None"),
        ({"ggml__pre": "qwen"}, "split as 'qwen'; allowed: qwen2"),
        ({"ggml__tokens": "abc"}, "tokenizer.ggml.tokens is no list"),
        ({"ggml__tokens": ["a", "a"]}, "token_type does not have one number"),
        (changed_list("tokens", lambda tokens: tokens.__setitem__(40, tokens[41])), "repeats a token"),
        (changed_list("tokens", lambda tokens: tokens.__setitem__(40, "two words")), "signs of bytes"),
        (changed_list("merges", lambda merges: merges.append("a b c")), "the merge 'a b c'"),
        (changed_list("merges", lambda merges: merges.append("q q")), "the merge 'q q'"),
        ({"ggml__eos_token_id": 999}, "eos_token_id = 999"),
        ({"ggml__eos_token_id": None}, "eos_token"),
        ({"ggml__bos_token_id": None, "ggml__add_bos_token": True}, "add_bos_token without"),
        ({"chat_template": 3}, "chat_template is no text"),
    ],
)
def test_tables_that_do_not_fit_together_are_refused(changed, told):
    with pytest.raises(Refusal) as refusal:
        tokenizer_of(metadata(**changed))
    assert told in str(refusal.value)
