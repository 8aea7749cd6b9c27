"""Small GGUF files, written with the `gguf` package as llama.cpp's converter writes them."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimaran.text.tokenizer import RESERVED, Tokenizer

gguf = pytest.importorskip("gguf", reason="the extra hf has the writer")

WIDTH, HEADS, GROUPS, INNER, LAYERS = 256, 4, 2, 512, 2  # rows of whole blocks of 256
VOCABULARY = 330
TEXT = "the boat sails at dawn, the boat rests at dusk; 12 boats, 3 hulls, one wind from the north\n" * 20
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"


def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], vocab_size=VOCABULARY)


def words(source: Tokenizer) -> dict[str, Any]:
    """The metadata of a tokenizer trained here, whose split is Qwen2's."""
    model = source.document["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in RESERVED else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }


def sizes(vocabulary: int, **changed: Any) -> dict[str, Any]:
    """The metadata of a tiny Llama."""
    return {
        "general.name": "tiny",
        "llama.block_count": LAYERS,
        "llama.context_length": 512,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": GROUPS,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": WIDTH // HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": vocabulary,
    } | {f"llama.{key.replace('__', '.')}": value for key, value in changed.items()}


def shapes(vocabulary: int, tied: bool = True) -> dict[str, tuple[int, ...]]:
    narrow = WIDTH // HEADS * GROUPS
    layer = {
        "attn_norm": (WIDTH,),
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (narrow, WIDTH),
        "attn_v": (narrow, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_norm": (WIDTH,),
        "ffn_gate": (INNER, WIDTH),
        "ffn_up": (INNER, WIDTH),
        "ffn_down": (WIDTH, INNER),
    }
    whole = {"token_embd.weight": (vocabulary, WIDTH), "output_norm.weight": (WIDTH,)}
    whole |= {} if tied else {"output.weight": (vocabulary, WIDTH)}
    inner = {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()}
    return whole | inner


def blocks(form: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random blocks of a format whose numbers stay small: the bytes are anything, the scales are not."""
    kind = gguf.GGMLQuantizationType[form]
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (int(np.prod(shape)) // elements, nbytes), dtype=np.uint8)
    if elements == 1:  # a plain format: the bytes of small numbers
        drawn = (rng.standard_normal(shape) * 0.06).astype({"F16": "<f2", "F64": "<f8"}.get(form, "<f4"))
        return drawn.view(np.uint8) if form != "BF16" else np.ascontiguousarray(drawn.view("<u2")[..., 1::2]).view("u1")
    places = {"Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q4_1": (0, 2), "Q5_1": (0, 2)}.get(form, (0,))
    small = 4e-6 if form == "Q6_K" else 3e-5 if form.endswith("_K") else 5e-3
    for place in places:
        scale = (small * (1 + rng.random(len(raw)))).astype("<f2")
        raw[:, place : place + 2] = scale[:, None].view(np.uint8)
    return raw.reshape(*shape[:-1], shape[-1] // elements * nbytes)


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[np.ndarray, str]]) -> Path:
    """tensors: name -> (values or raw blocks, format)."""
    writer = gguf.GGUFWriter(path, arch="llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str | float):
            (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
        else:
            writer.add_uint32(key, value)
    for name, (values, form) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[form])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(vocabulary: int, formats: tuple[str, ...] = ("F32",), tied: bool = True, seed: int = 0) -> dict:
    """Random tensors of a tiny Llama, the matrices in `formats` by turns."""
    rng = np.random.default_rng(seed)
    found, turns = {}, itertools.cycle(formats)
    for name, shape in shapes(vocabulary, tied).items():
        if len(shape) == 1:
            found[name] = (1 + 0.3 * rng.standard_normal(shape)).astype(np.float32), "F32"
        else:
            form = next(turns)
            found[name] = blocks(form, shape, rng), form
    return found


def tiny_llama(path: Path, formats: tuple[str, ...] = ("F32",), tied: bool = True, **changed: Any) -> Path:
    """A whole file: random weights, and the tokenizer of `tokenizer()`."""
    source = tokenizer()
    return write(
        path,
        sizes(source.vocab_size, **changed) | words(source),
        weights(source.vocab_size, formats, tied),
    )
