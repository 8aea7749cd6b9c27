"""Llama-family GGUF -> a hub folder: sizes from the metadata; tensors renamed, decoded, queries and keys un-permuted.

GGUF keeps rotary pairs side by side (2i, 2i + 1), the hub half a head apart (i, i + K/2). So the rows of `attn_q` and
`attn_k`, [heads, K/2, 2] there, become [heads, 2, K/2] here.

Every tensor of the file is used once: what is missing, left over, misshapen or stored in a format that we do not decode
is refused by name, and so is a setting whose meaning we do not know.
"""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimaran.errors import Refusal, nearest_first
from trimaran.model import hub
from trimaran.model.config import ModelConfig, RopeScaling
from trimaran.model.dialects import read_config
from trimaran.model.gguf import GGUF
from trimaran.model.hybrid import HybridModel, build
from trimaran.model.names import LAYER, Piece
from trimaran.ops.rope import rope_frequencies

ARCHITECTURE = "llama"
SIZES = {  # keys of the metadata, after "llama." -> config.json's
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
NUMBERS = {"rope.freq_base": "rope_theta", "attention.layer_norm_rms_epsilon": "rms_norm_eps"}
REPEATED = ("rope.dimension_count", "attention.value_length", "vocab_size")  # follow from the others: see `repeated`
FIXED = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.type": "none", "attention.causal": True}
ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
TURN_ENDS = ("eot", "eom")  # further ids that end a text

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
OUTSIDE = {
    "backbone.embeddings.weight": EMBEDDING,
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": HEAD,
}
INSIDE = {  # which letter of a layer's two, norm or mixer, and the rest of the name
    (0, "norm", "weight"): "attn_norm",
    (0, "mixer", "q_proj.weight"): "attn_q",
    (0, "mixer", "k_proj.weight"): "attn_k",
    (0, "mixer", "v_proj.weight"): "attn_v",
    (0, "mixer", "o_proj.weight"): "attn_output",
    (1, "norm", "weight"): "ffn_norm",
    (1, "mixer", "gate_proj.weight"): "ffn_gate",
    (1, "mixer", "up_proj.weight"): "ffn_up",
    (1, "mixer", "down_proj.weight"): "ffn_down",
}


def save_llama(
    file: GGUF,
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 5_000_000_000,
) -> hub.Saved:
    """Writes the weights of `file` and their config.json into `folder`, a tensor at a time.

    dtype: fp32 keeps every decoded number as it is. Raises Refusal for another architecture, unknown settings, tensors
    that do not match them, formats that we do not decode, and numbers that are not finite.
    """
    config = llama_config(file)
    model = build(config, "meta", dtype)
    check(file, model)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    def read(piece: Piece) -> Tensor:
        name = gguf_name(piece.name)
        values = file.read(name)
        if not np.isfinite(values).all():
            raise Refusal(f"{name} in {file.path} has numbers that are not finite", "finite weights", "fetch it again")
        count = heads.get(name.split(".")[-2])
        weights = torch.from_numpy(values)
        return (weights if count is None else unpermuted(weights, count)).to(dtype)

    return hub.save(model, folder, shard_bytes=shard_bytes, read=read)


def unpermuted(weight_QD: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs side by side to pairs half a head apart."""
    return weight_QD.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def gguf_name(name: str) -> str:
    """The file's name of the model's tensor `name`."""
    layer = LAYER.fullmatch(name)
    if layer is None:
        return OUTSIDE[name]
    index, letter = divmod(int(layer[1]), 2)
    return f"blk.{index}.{INSIDE[letter, layer[2], layer[3]]}.weight"


def llama_config(file: GGUF) -> ModelConfig:
    """The model that the metadata describe, their sizes compared with the embedding's shape first."""
    architecture = file.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        known = f"{ARCHITECTURE!r}: Llama, SmolLM, Mistral and what else has their layers"
        raise Refusal(f"{file.path} has the architecture {architecture!r}", known, "choose a model of this family")
    given = settings_of(file)
    file.check_formats(file.tensors)
    if EMBEDDING not in file.tensors or len(file.tensors[EMBEDDING].shape) != 2:
        raise Refusal(f"{file.path} has no matrix {EMBEDDING}", "an embedding", "fetch the file again")
    vocabulary = file.tensors[EMBEDDING].shape[0]
    keys: dict[str, Any] = {ours: size(given, theirs) for theirs, ours in SIZES.items() if theirs in given}
    missing = [theirs for theirs, ours in SIZES.items() if ours not in (*keys, "head_dim", "num_key_value_heads")]
    if missing:
        found = f"{file.path} has no {ARCHITECTURE}.{missing[0]}"
        raise Refusal(found, ", ".join(f"{ARCHITECTURE}.{name}" for name in SIZES), "fetch the file again")
    keys.setdefault("num_key_value_heads", keys["num_attention_heads"])
    keys.setdefault("head_dim", max(1, keys["hidden_size"] // keys["num_attention_heads"]))
    check_sizes(file, keys)
    keys |= {ours: number(given, theirs) for theirs, ours in NUMBERS.items() if theirs in given}
    repeated(given, {REPEATED[0]: keys["head_dim"], REPEATED[1]: keys["head_dim"], REPEATED[2]: vocabulary})
    keys |= {"model_type": ARCHITECTURE, "vocab_size": vocabulary, "tie_word_embeddings": HEAD not in file.tensors}
    config = read_config(keys | roles(file.metadata, vocabulary))
    return config.model_copy(update={"rope_scaling": rope_scaling(file, config)})


def settings_of(file: GGUF) -> dict[str, Any]:
    """The metadata that say what is computed, without their prefix. Raises Refusal for one of unknown meaning."""
    prefix = f"{ARCHITECTURE}."
    given = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    known = [*SIZES, *NUMBERS, *REPEATED, *FIXED]
    for key, value in given.items():
        if key not in known:
            near = ", ".join(prefix + name for name in nearest_first(key, known)[:4])
            raise Refusal(f"{file.path} sets {prefix}{key}", f"known settings, such as {near}", "import another model")
        if key in FIXED and value != FIXED[key]:
            raise Refusal(f"{prefix}{key} = {value!r}", repr(FIXED[key]), "this model computes what we do not")
    return given


def size(given: dict[str, Any], key: str) -> int:
    value = given[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Refusal(f"{ARCHITECTURE}.{key} = {value!r}", "a whole number above 0", "fetch the file again")
    return value


def number(given: dict[str, Any], key: str) -> float:
    """A number of the file, fp32 there: the shortest decimal with that value, which is what was meant."""
    value = given[key]
    if not isinstance(value, float) or not 0 < value < float("inf"):
        raise Refusal(f"{ARCHITECTURE}.{key} = {value!r}", "a finite number above 0", "fetch the file again")
    return float(str(np.float32(value)))


def repeated(given: dict[str, Any], implied: dict[str, int]) -> None:
    for key, value in implied.items():
        if given.get(key, value) != value:
            raise Refusal(f"{ARCHITECTURE}.{key} = {given[key]!r}", str(value), "this model computes what we do not")


def check_sizes(file: GGUF, keys: dict[str, int]) -> None:
    """Refuses sizes that no tensor of the file can have, before a model is made of them."""
    stored = min(1 << 30, max(max(tensor.shape) for tensor in file.tensors.values()))
    bounds = dict.fromkeys(keys, stored) | {"num_hidden_layers": len(file.tensors), "max_position_embeddings": 1 << 40}
    bounds["head_dim"] = stored // keys["num_attention_heads"]
    for key, bound in bounds.items():
        if keys[key] > bound:
            raise Refusal(f"{key} = {keys[key]} by the metadata of {file.path}", f"at most {bound}", "fetch it again")


def roles(metadata: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Token ids as config.json names them; those without a role are null."""
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in (*ROLES, *TURN_ENDS)}
    for name, identity in ids.items():
        if identity is not None and not (isinstance(identity, int) and 0 <= identity < vocabulary):
            found = f"tokenizer.ggml.{name}_token_id = {identity!r}"
            raise Refusal(found, f"0 to {vocabulary - 1}", "fetch the file again")
    keys = {ours: ids[theirs] for theirs, ours in ROLES.items()}
    ends = list(dict.fromkeys(ids[name] for name in ("eos", *TURN_ENDS) if ids[name] is not None))
    return keys | ({"eos_token_id": ends} if len(ends) > 1 else {})


def rope_scaling(file: GGUF, config: ModelConfig) -> RopeScaling | None:
    """Llama-3.1's rescaling, which the file keeps as what each frequency is divided by [K/2], and nothing else."""
    if ROPE_FACTORS not in file.tensors:
        return None
    found_K = torch.from_numpy(file.read(ROPE_FACTORS))
    scaling = RopeScaling(factor=max(1.0, float(found_K.max()))) if found_K.isfinite().all() else None
    if scaling is not None:
        cpu, width, theta = torch.device("cpu"), config.head_dim, config.rope_theta
        scaled_K = rope_frequencies(width, theta, cpu, scaling.model_dump())
        implied_K = rope_frequencies(width, theta, cpu) / scaled_K
        if found_K.shape == implied_K.shape and torch.allclose(found_K.float(), implied_K, rtol=1e-4):
            return scaling
    known = "the factors of Llama 3.1's rule, frequencies kept above 4 turns in 8192 tokens"
    raise Refusal(f"{ROPE_FACTORS} in {file.path} follows another rule", known, "this model computes what we do not")


def check(file: GGUF, model: HybridModel) -> None:
    """One refusal for all tensors that do not match."""
    wanted = {gguf_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tensor for name, tensor in file.tensors.items() if name != ROPE_FACTORS}
    odd = [
        f"{name} is {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    kinds = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "misshapen": odd,
    }
    told = "; ".join(f"{len(names)} tensors {kind}: {hub.listed(names)}" for kind, names in kinds.items() if names)
    if told:
        raise Refusal(f"{file.path}: {told}", f"the {len(wanted)} tensors its metadata imply", "import another model")
