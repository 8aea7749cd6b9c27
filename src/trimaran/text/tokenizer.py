"""Words <-> tokens: byte-level BPE, trained here or read from a hub folder.

What holds for every tokenizer:
- any text that UTF-8 can spell survives encode -> decode byte for byte;
- `encode` never lets text forge a control token: "<|im_end|>" inside a document becomes ordinary bytes;
- a token knows its bytes, so bits per byte and streaming need no second decoder.

Tokenizers trained here reserve ids 0-31 (`RESERVED`); those of a hub folder keep the ids they came with.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from trimaran.errors import Refusal, nearest_first
from trimaran.text.folder import (
    GENERATION,
    as_json,
    content_of,
    fill_roles,
    read_generation,
    read_json,
    read_template,
    with_ends,
)
from trimaran.text.template import NEMOTRON_3

TURNS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
NAMED = (*TURNS, "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
RESERVED = NAMED + tuple(f"<|spare_{number:02d}|>" for number in range(len(NAMED), 32))
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>")  # of the families whose folders we open
SMALLEST_VOCABULARY = len(RESERVED) + 256  # every byte is a token of its own

# Qwen2's split, so that other engines have it under a name: words with the sign before them, single digits, runs of
# signs, line ends, white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = re.compile(r"<[^\s<>]+>|\[[A-Z_/]+\]")  # an added token of this shape steers, even where it is not "special"


class Tokenizer:
    """A byte-level BPE tokenizer with named control tokens.

    `pad_id`, `bos_id`, `eos_id` are 0, 1, 2 when trained here. A hub folder without a pad token pads with eos; one
    without a bos token has `bos_id` None. `controls` maps each control token to its id; `template` is the chat
    template (jinja source) or None.
    """

    def __init__(
        self,
        document: dict[str, Any],
        config: dict[str, Any],
        template: str | None,
        generation: dict[str, Any] | None = None,
    ):
        """`document` is tokenizer.json, `config` tokenizer_config.json with its roles filled in (see `load`),
        `generation` what a folder's generation_config.json says."""
        self.document, self.config, self.template, self.generation = document, config, template, generation or {}
        self.plain = backend_of(document)
        self.plain.encode_special_tokens = True  # text can not spell a control token
        added = document.get("added_tokens", [])
        self.controls: dict[str, int] = {token["content"]: token["id"] for token in added if is_control(token)}
        self.added: dict[str, int] = {token["content"]: token["id"] for token in added}
        self.vocab_size = 1 + max(self.plain.get_vocab(with_added_tokens=True).values())
        self.eos_id: int = self.role("eos_token")
        self.bos_id: int | None = self.role("bos_token") if config.get("bos_token") else None
        self.pad_id: int = self.role("pad_token") if config.get("pad_token") else self.eos_id

    def role(self, name: str) -> int:
        """The id of the token that `tokenizer_config.json` names for `name`, such as "eos_token"."""
        token = content_of(self.config.get(name))
        identity = self.plain.token_to_id(token) if isinstance(token, str) else None
        if identity is None:
            raise Refusal(f"{name} = {token!r}", "a token of the vocabulary", f"set {name} in tokenizer_config.json")
        return identity

    def id_of(self, token: str) -> int:
        """The id of a control token such as "<think>"."""
        if token not in self.controls:
            known = nearest_first(token, self.controls)
            raise Refusal(f"control token {token!r}", ", ".join(known[:8]), "use a tokenizer that has it")
        return self.controls[token]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a document or a turn."""
        ends = [self.controls[token] for token in TURN_ENDS if token in self.controls]
        return tuple(dict.fromkeys([self.eos_id, *ends]))

    @cached_property
    def digest(self) -> str:
        """sha256 of tokenizer.json: equal digests give equal ids."""
        return hashlib.sha256(json.dumps(self.document, sort_keys=True).encode()).hexdigest()

    # words to tokens

    @cached_property
    def marked(self) -> tokenizers.Tokenizer:
        return backend_of(self.document)

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Token ids of `text`. With `specials`, control tokens written in the text are read as such."""
        try:
            return (self.marked if specials else self.plain).encode(text, add_special_tokens=False).ids
        except TypeError:
            raise not_unicode(text) from None

    def encode_batch(self, texts: Sequence[str], *, specials: bool = False) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        backend = self.marked if specials else self.plain
        try:
            return [one.ids for one in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:
            raise not_unicode(next((text for text in texts if has_surrogate(text)), "")) from None

    # tokens to words

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for; a control token's are its name's."""
        table = [b""] * self.vocab_size
        signs = byte_of_sign()
        for token, identity in self.plain.get_vocab(with_added_tokens=True).items():
            table[identity] = token.encode() if token in self.added else bytes(signs[sign] for sign in token)
        return table

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of text per id, int64 [vocab_size]; 0 for control tokens, which stand for no text."""
        lengths = np.array([len(piece) for piece in self.token_bytes], dtype=np.int64)
        lengths[list(self.controls.values())] = 0
        return lengths

    def bytes_of(self, ids: Iterable[int]) -> int:
        """How many bytes of text the ids stand for."""
        return int(self.byte_lengths[np.fromiter(ids, dtype=np.int64)].sum())

    def decode(self, ids: Iterable[int], *, skip_specials: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        stream = self.stream(skip_specials=skip_specials)
        return stream.decoder.decode(b"".join(stream.bytes_of(identity) for identity in ids), final=True)

    def stream(self, *, skip_specials: bool = False) -> "Detokenizer":
        """A decoder for tokens that arrive one at a time."""
        return Detokenizer(self, skip_specials)

    # folders

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learns BPE merges from `texts`. Few texts may yield fewer tokens than `vocab_size` asks for."""
        if vocab_size < SMALLEST_VOCABULARY:
            found, allowed = f"vocab_size = {vocab_size}", f"at least {SMALLEST_VOCABULARY} (32 reserved, 256 bytes)"
            raise Refusal(found, allowed, f"set vocab_size to {SMALLEST_VOCABULARY} or more")
        backend = tokenizers.Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in RESERVED],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        if backend.get_vocab_size() == SMALLEST_VOCABULARY < vocab_size:
            raise Refusal("no text to train a tokenizer on", "at least two letters", "give a longer text")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|eos|>",
            "pad_token": "<|pad|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 10**12,  # the model has no positions to run out of
        }
        return cls(json.loads(backend.to_str()), config, NEMOTRON_3.read_text(encoding="utf-8"))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Reads a hub folder: tokenizer.json, and the roles of its tokens from the configurations beside it."""
        folder = Path(folder)
        document = read_json(folder / "tokenizer.json")
        if document is None:
            raise Refusal(
                f"no tokenizer.json in {str(folder)!r}", "a run or hub folder", "give the folder that has one"
            )
        check_document(document)
        config = read_json(folder / "tokenizer_config.json") or {}
        fill_roles(config, document, folder)
        return cls(document, config, read_template(folder, config), read_generation(folder))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json (where texts and
        turns end), which transformers opens as well."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in self.config.items() if key != "chat_template"}
        named = {role: self.role(role) for role in ("bos_token", "pad_token") if config.get(role)}
        texts = {
            "tokenizer.json": as_json(self.document),
            "tokenizer_config.json": as_json(config),
            GENERATION: as_json(with_ends(self.generation, named, self.stop_ids)),
        }
        if self.template is not None:
            texts["chat_template.jinja"] = self.template
        for name, text in texts.items():
            partial = folder / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(folder / name)


class Detokenizer:
    """Text from tokens that arrive one at a time; a character split over tokens is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer, skip_specials: bool):
        self.pieces = tokenizer.token_bytes
        self.hidden = frozenset(tokenizer.controls.values()) if skip_specials else frozenset()
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def bytes_of(self, identity: int) -> bytes:
        if not 0 <= identity < len(self.pieces):
            found, allowed = f"token id {identity}", f"0 to {len(self.pieces) - 1}"
            raise Refusal(found, allowed, "decode with the tokenizer that the model was trained with")
        return b"" if identity in self.hidden else self.pieces[identity]

    def push(self, identity: int) -> str:
        """The text that this token completes, often all of its own, "" while a character is unfinished."""
        return self.decoder.decode(self.bytes_of(identity))

    def finish(self) -> str:
        """What is still held back; an unfinished character becomes U+FFFD."""
        return self.decoder.decode(b"", final=True)


def check_document(document: dict[str, Any]) -> None:
    """Refuses a tokenizer.json that is damaged or of another kind."""
    model, tokens = document.get("model"), document.get("added_tokens", [])
    if not isinstance(tokens, list) or not all(isinstance(token, dict) and "content" in token for token in tokens):
        raise Refusal("tokenizer.json has odd added_tokens", "a list of tables with a content", "copy the file again")
    model = model if isinstance(model, dict) else {}
    splits_bytes = "ByteLevel" in json.dumps(document.get("pre_tokenizer"))
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict) or not splits_bytes:
        kind = f"{model.get('type')} model {'with' if splits_bytes else 'without'} byte-level splitting"
        raise Refusal(f"tokenizer.json holds a {kind}", "byte-level BPE", "use a model with a byte-level tokenizer")


def backend_of(document: dict[str, Any]) -> tokenizers.Tokenizer:
    """The `tokenizers` object of a tokenizer.json, its control tokens all marked as such."""
    added = [{**token, "special": is_control(token)} for token in document.get("added_tokens", [])]
    try:
        return tokenizers.Tokenizer.from_str(json.dumps({**document, "added_tokens": added}))
    except Exception as problem:  # the library raises plain Exception for whatever it can not read
        if type(problem) is not Exception:
            raise
        raise Refusal(f"tokenizer.json: {problem}", "what `tokenizers` reads", "copy the file again") from None


def is_control(token: dict[str, Any]) -> bool:
    return bool(token.get("special")) or CONTROL.fullmatch(token["content"]) is not None


def byte_of_sign() -> dict[str, int]:
    """Byte-level BPE writes each byte as one sign: itself where printable, else the next from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def has_surrogate(text: str) -> bool:
    return any("\ud800" <= sign <= "\udfff" for sign in text)


def not_unicode(text: str) -> Refusal:
    found = "a text with half a surrogate pair" if has_surrogate(text) else f"{type(text).__name__} to encode"
    return Refusal(found, "a str that UTF-8 can spell", "decode the text with errors='replace'")
