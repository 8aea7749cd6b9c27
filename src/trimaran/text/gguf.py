"""The tokenizer that a GGUF file carries: its metadata -> a `Tokenizer`, chat template and roles included.

Such a file has tokens, merges and a kind per token; the splitting of text before the merges is named, not written. We
know the names below and guess none. SentencePiece vocabularies (`tokenizer.ggml.model = "llama"`) are refused, since
every tokenizer here is byte-level BPE.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from trimaran.errors import Refusal, nearest_first
from trimaran.text.tokenizer import SPLIT, Tokenizer, byte_of_sign

CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
LLAMA_3 = SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT_2 = {**BYTES, "use_regex": True}  # the library's own pattern is GPT-2's
DIGITS = {"type": "Digits", "individual_digits": True}


def by_pattern(pattern: str) -> list[dict[str, Any]]:
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, BYTES]


# tokenizer.ggml.pre -> the steps before the merges
SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [GPT_2],
    "smollm": [DIGITS, GPT_2],
    "llama-bpe": by_pattern(LLAMA_3),
    "qwen2": by_pattern(SPLIT),
}
WHOLE_WORDS = ("llama-bpe",)  # a word that is a token needs no merges to become it
COMPOSED = ("qwen2",)  # text is brought to NFC first


def tokenizer_of(metadata: Mapping[str, Any], split: str | None = None) -> Tokenizer:
    """The tokenizer of a GGUF file's metadata (numeric arrays as numpy). split: a key of `SPLITS`, for files that name
    none. Raises Refusal for another kind of tokenizer, an unknown split and tables that do not fit together."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        known = "'gpt2', which is byte-level BPE"
        raise Refusal(f"tokenizer.ggml.model = {kind!r}", known, "choose a model with a byte-level tokenizer")
    split = named_split(metadata, split)
    tokens = texts(metadata, "tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type", np.ones(len(tokens), dtype=np.int32))
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        raise damaged("tokenizer.ggml.token_type does not have one number for each token")
    vocabulary = {token: identity for identity, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise damaged("tokenizer.ggml.tokens repeats a token")
    added = [added_token(identity, token, int(kinds[identity])) for token, identity in vocabulary.items()]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token for token in added if token is not None],
        "normalizer": {"type": "NFC"} if split in COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": SPLITS[split]},
        "post_processor": post_processor(metadata, tokens, split),
        "decoder": GPT_2,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": split in WHOLE_WORDS,
            "vocab": vocabulary,
            "merges": merges(metadata, vocabulary),
        },
    }
    check_spelling(document)
    return Tokenizer(document, configuration(metadata, tokens), template_of(metadata))


def named_split(metadata: Mapping[str, Any], split: str | None) -> str:
    found = metadata.get("tokenizer.ggml.pre")
    if found is None and split is None:
        step = "add split=NAME if you know how this model's text is split"
        raise Refusal("the file does not say how text is split (tokenizer.ggml.pre)", ", ".join(SPLITS), step)
    if found is not None and split not in (None, found):
        raise Refusal(f"split = {split!r} but tokenizer.ggml.pre = {found!r}", "one of the two", "leave split out")
    name = found if split is None else split
    if not isinstance(name, str) or name not in SPLITS:
        known = ", ".join(nearest_first(str(name), SPLITS))
        raise Refusal(f"text split as {name!r}", known, "choose a model with one of these")
    return name


def damaged(why: str) -> Refusal:
    return Refusal(why, "tables that fit together", "fetch the file again")


def texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    found = metadata.get(key)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise damaged(f"{key} is no list of texts")
    return found


def added_token(identity: int, content: str, kind: int) -> dict[str, Any] | None:
    """The token as tokenizer.json adds it beside the merges; None for an ordinary one."""
    if kind not in (CONTROL, USER_DEFINED):
        return None
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": identity, "content": content, **plain, "special": kind == CONTROL}


def merges(metadata: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[list[str]]:
    """Pairs of tokens, the first to be merged first; both and what they make are in the vocabulary."""
    pairs = [text.split(" ") for text in texts(metadata, "tokenizer.ggml.merges")]
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise damaged(f"the merge {' '.join(pair)!r} is of no two tokens that make a third")
    return pairs


def check_spelling(document: Mapping[str, Any]) -> None:
    """Every ordinary token is written in the signs that stand for bytes."""
    signs, added = byte_of_sign().keys(), {token["content"] for token in document["added_tokens"]}
    for token in document["model"]["vocab"]:
        if token not in added and not signs >= set(token):
            raise damaged(f"the token {token!r} is not written in the signs of bytes")


def post_processor(metadata: Mapping[str, Any], tokens: list[str], split: str) -> dict[str, Any]:
    """Puts the tokens that begin and end a text round it, where the file asks for them (Llama 3's need not)."""
    begins = metadata.get("tokenizer.ggml.add_bos_token", split == "llama-bpe")
    ends = metadata.get("tokenizer.ggml.add_eos_token", False)
    ids = {name: role(metadata, name, tokens) for name, asked in (("bos", begins), ("eos", ends)) if asked}
    if not ids:
        return BYTES
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    special = {}
    for name, identity in ids.items():
        if identity is None:
            raise damaged(f"tokenizer.ggml.add_{name}_token without tokenizer.ggml.{name}_token_id")
        content = tokens[identity]
        special[content] = {"id": content, "ids": [identity], "tokens": [content]}
        place = 0 if name == "bos" else len(pair)
        for steps in (single, pair):
            steps.insert(place, {"SpecialToken": {"id": content, "type_id": 0}})
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def role(metadata: Mapping[str, Any], name: str, tokens: list[str]) -> int | None:
    """The id of the token with a role such as "eos"; None where the file names none."""
    identity = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if identity is not None and not (isinstance(identity, int) and 0 <= identity < len(tokens)):
        raise damaged(f"tokenizer.ggml.{name}_token_id = {identity!r} of {len(tokens)} tokens")
    return identity


def configuration(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """tokenizer_config.json."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        identity = role(metadata, name, tokens)
        if identity is not None:
            config[key] = tokens[identity]
    return config


def template_of(metadata: Mapping[str, Any]) -> str | None:
    """The chat template; None for a base model without one."""
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise damaged("tokenizer.chat_template is no text")
    return template
