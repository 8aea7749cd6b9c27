"""config.json, in the spellings found on the hub, to ModelConfig and back.

Reading takes `nemotron_h` in all its dialects, `llama`, `qwen3`, `qwen3_moe` and our own `trimaran`. Nothing is dropped
in silence: a key is copied, or holds the one value our mathematics has, or is bookkeeping listed here; any other key is
refused by name. Writing picks the hub's architecture where one exists and `trimaran` where none does.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from trimaran.config import Settings
from trimaran.errors import Refusal, nearest_first
from trimaran.model.config import ModelConfig, RopeScaling
from trimaran.model.config_keys import (
    ABSENT,
    ALIASES,
    ARCHITECTURES,
    BOOKKEEPING,
    FIXED,
    MOE_FIELDS,
    NEMOTRON_FIELDS,
    NEMOTRON_IGNORED,
    NEWEST,
    PLAIN_ROPE,
    ROTARY_FIELDS,
    SPELLINGS,
)


class Structure(Settings):
    """The keys that readers take apart themselves, checked first; all others are checked as fields of ModelConfig."""

    num_hidden_layers: int | None = Field(None, gt=0, le=10_000)
    num_attention_heads: int | None = Field(None, gt=0)
    hidden_size: int | None = Field(None, gt=0)
    hybrid_override_pattern: str | None = None
    mtp_hybrid_override_pattern: str | None = None
    layers_block_type: list[str] | None = None
    mtp_layers_block_type: list[str] | None = None
    layer_types: list[str] | None = None
    mlp_only_layers: list[int] | None = None
    decoder_sparse_step: int = Field(1, gt=0)
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool | None = None


def read_config(source: str | Path | Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes: a folder, the file, or its content."""
    raw = dict(source) if isinstance(source, Mapping) else read_json(Path(source))
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = ", ".join(nearest_first(str(model_type), ARCHITECTURES))
        raise Refusal(f"model_type {model_type!r} in config.json", known, "choose a checkpoint of one of these")
    keys = {key: value for key, value in raw.items() if key not in BOOKKEEPING and not key.startswith("_")}
    keys = ABSENT[model_type] | merge_aliases(keys, ALIASES[model_type])
    Structure(**{key: value for key, value in keys.items() if key in Structure.model_fields})
    for key, allowed in FIXED[model_type].items():
        require(key, keys.pop(key, allowed[0]), allowed)
    return READERS[model_type](keys)


def read_json(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise Refusal(f"no config.json in {path}", "a folder with config.json and safetensors", "check the path")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise Refusal(f"{file} is not JSON ({problem})", "a JSON object", "fetch the file again") from None
    if not isinstance(content, dict):
        raise Refusal(f"{file} holds a {type(content).__name__}", "a JSON object", "fetch the file again")
    return content


def merge_aliases(keys: dict[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Each key under its newest name. Two spellings of one setting must agree."""
    merged = {key: value for key, value in keys.items() if key not in aliases}
    for alias, name in aliases.items():
        if alias not in keys:
            continue
        if merged.get(name) is not None and merged[name] != keys[alias]:
            raise Refusal(f"{alias} = {keys[alias]!r} but {name} = {merged[name]!r}", "one value", f"remove {alias}")
        merged[name] = keys[alias]
    return merged


def require(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        shown = " or ".join(repr(choice) for choice in allowed)
        raise Refusal(f"{key} = {value!r} in config.json", shown, "this model computes something we do not implement")


def take(keys: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Removes `names` from `keys`; the values of those that are there. Null stands for the default."""
    found = {name: keys.pop(name) for name in names if name in keys}
    return {name: value for name, value in found.items() if value is not None}


def take_shared(keys: dict[str, Any]) -> dict[str, Any]:
    """What every dialect spells alike: tied embeddings and token ids (null: no such token; a list of ends)."""
    fields: dict[str, Any] = {"tie_embeddings": bool(keys.pop("tie_word_embeddings", False))}
    for name in ("pad_token_id", "bos_token_id"):
        if name in keys:
            fields[name] = keys.pop(name)
    if "eos_token_id" in keys:
        ends = keys.pop("eos_token_id")
        first, *others = ends if isinstance(ends, list) and ends else [None if isinstance(ends, list) else ends]
        fields |= {"eos_token_id": first, "stop_token_ids": tuple(others)}
    return fields


def refuse_rest(keys: Mapping[str, Any], known: Iterable[str], model_type: str) -> None:
    if keys:
        names = ", ".join(sorted(keys))
        near = nearest_first(min(keys), known)[:5]
        raise Refusal(
            f"config.json ({model_type}) has keys of unknown meaning: {names}",
            f"known keys, such as {', '.join(near)}",
            "remove them if they change nothing in the mathematics",
        )


def read_nemotron(keys: dict[str, Any]) -> ModelConfig:
    check_no_clamp(keys.pop("time_step_limit", None))
    pattern = one_pattern(keys, "hybrid_override_pattern", "layers_block_type")
    if not pattern:
        raise Refusal("config.json has no layer pattern", "hybrid_override_pattern or layers_block_type", "add one")
    layers = keys.pop("num_hidden_layers", None)
    if layers not in (None, len(pattern)):
        raise Refusal(f"num_hidden_layers = {layers}", f"{len(pattern)}, the pattern's length", "correct one of them")
    fields = take(keys, (*NEMOTRON_FIELDS, *MOE_FIELDS)) | take_shared(keys)
    if fields.get("num_experts_per_tok") == 0 and "E" not in pattern:
        del fields["num_experts_per_tok"]
    fields.setdefault("num_key_value_heads", fields.get("num_attention_heads", 32))
    depth = keys.pop("mtp_depth", 1)
    modules = keys.pop("num_nextn_predict_layers", None) or 0
    require("num_nextn_predict_layers", modules, (0, 1))  # one stored block, shared by every depth
    if modules:
        # transformers writes this list whether or not there is a draft block, so only now does it mean something.
        draft = one_pattern(keys, "mtp_hybrid_override_pattern", "mtp_layers_block_type") or "*E"
        fields |= {"mtp_pattern": draft, "mtp_depth": depth}
    rest = {key: value for key, value in keys.items() if key not in NEMOTRON_IGNORED}
    refuse_rest(rest, [*NEMOTRON_FIELDS, *MOE_FIELDS, *ALIASES["nemotron_h"], *FIXED["nemotron_h"]], "nemotron_h")
    return ModelConfig(pattern=pattern, **fields)


def one_pattern(keys: dict[str, Any], string_key: str, list_key: str) -> str:
    """The pattern spelt as a string, as a list, or as both alike; empty when neither is there."""
    written, listed = keys.pop(string_key, None), keys.pop(list_key, None)
    if listed is None:
        return written or ""
    unknown = [kind for kind in listed if kind not in SPELLINGS]
    if unknown:
        raise Refusal(f"{list_key} names {unknown[0]!r}", ", ".join(SPELLINGS), "correct the name in config.json")
    spelt = "".join(SPELLINGS[kind] for kind in listed)
    if written and written != spelt:
        raise Refusal(f"{string_key} {written!r} but {list_key} {spelt!r}", "one pattern", "remove the wrong one")
    return spelt


def check_no_clamp(limit: Any) -> None:
    """dt is never clamped here, so only (0, infinity) is accepted, in any of its three spellings."""
    if limit is None:
        return
    try:
        low, high = (number(end) for end in limit)
    except (TypeError, ValueError, KeyError):
        raise Refusal(f"time_step_limit = {limit!r}", "[0, Infinity]", "correct it in config.json") from None
    if not (low <= 0 and high >= 3e38):
        raise Refusal(f"time_step_limit = {limit!r}", "[0, Infinity]", "this model clamps dt, which we never do")


def number(value: Any) -> float:
    """A float, also in the spelling {"__float__": "Infinity"} of newer transformers."""
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def read_llama(keys: dict[str, Any]) -> ModelConfig:
    layers = depth(keys)
    fields = take_rotary(keys)
    refuse_rest(keys, [*ROTARY_FIELDS, *FIXED["llama"], "rope_theta", "rms_norm_eps"], "llama")
    return ModelConfig(pattern="R-" * layers, **fields)


def read_qwen3(keys: dict[str, Any]) -> ModelConfig:
    layers = depth(keys)
    for ignored in ("sliding_window", "max_window_layers"):  # meaningless without use_sliding_window
        keys.pop(ignored, None)
    for kind in keys.pop("layer_types", None) or []:
        require("layer_types entry", kind, ("full_attention",))
    fields = take_rotary(keys)
    refuse_rest(keys, [*ROTARY_FIELDS, *FIXED["qwen3"], "rope_theta", "rms_norm_eps"], "qwen3")
    return ModelConfig(pattern="R-" * layers, qk_norm=True, **fields)


def read_qwen3_moe(keys: dict[str, Any]) -> ModelConfig:
    layers = depth(keys)
    for ignored in ("sliding_window", "max_window_layers"):
        keys.pop(ignored, None)
    dense = set(keys.pop("mlp_only_layers", None) or [])
    step: int = keys.pop("decoder_sparse_step", 1)
    pattern = "".join("R-" if i in dense or (i + 1) % step else "RE" for i in range(layers))
    experts = take(keys, ["num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"])
    experts["n_routed_experts"] = keys.pop("num_experts")
    fields = take_rotary(keys) | experts | {"moe_shared_expert_intermediate_size": 0, "router": "softmax"}
    refuse_rest(keys, [*ROTARY_FIELDS, *FIXED["qwen3_moe"], "num_experts", "mlp_only_layers"], "qwen3_moe")
    return ModelConfig(pattern=pattern, qk_norm=True, **fields)


def depth(keys: dict[str, Any]) -> int:
    layers: int | None = keys.pop("num_hidden_layers")
    if layers is None:
        raise Refusal("num_hidden_layers = null in config.json", "an integer > 0", "write how many layers there are")
    return layers


def take_rotary(keys: dict[str, Any]) -> dict[str, Any]:
    """The fields that Llama and Qwen3 share."""
    head_dim = keys.pop("head_dim", None)
    fields = take(keys, ROTARY_FIELDS) | take_shared(keys) | take_rope(keys) | {"ffn": "swiglu"}
    heads = fields.setdefault("num_attention_heads", 32)
    fields.setdefault("num_key_value_heads", heads)
    fields["head_dim"] = fields["hidden_size"] // heads if head_dim is None else head_dim
    fields["layer_norm_epsilon"] = keys.pop("rms_norm_eps", 1e-6)
    return fields


def take_rope(keys: dict[str, Any]) -> dict[str, Any]:
    """Frequencies from `rope_parameters` (new) or `rope_theta` with `rope_scaling` (old); both must agree."""
    old = dict(keys.pop("rope_scaling", None) or {})
    if "rope_theta" in keys:
        old["rope_theta"] = keys.pop("rope_theta")
    new = dict(keys.pop("rope_parameters", None) or {})
    if "type" in old:
        old.setdefault("rope_type", old.pop("type"))
    for key in old.keys() & new.keys():
        require(f"rope_parameters.{key}", new[key], (old[key],))
    rope = old | new
    require("partial_rotary_factor", rope.pop("partial_rotary_factor", 1), (1,))
    theta, kind = rope.pop("rope_theta", 10000.0), rope.pop("rope_type", None)
    if kind in PLAIN_ROPE:
        refuse_rest(rope, ["rope_type"], "rope_parameters")
        return {"rope_theta": theta}
    require("rope_type", kind, ("default", "llama3"))
    return {"rope_theta": theta, "rope_scaling": RopeScaling(**rope)}


def read_own(keys: dict[str, Any]) -> ModelConfig:
    pattern, layers = keys.pop("hybrid_override_pattern", None) or "", keys.pop("num_hidden_layers", None)
    if layers not in (None, len(pattern)):
        raise Refusal(f"num_hidden_layers = {layers}", f"{len(pattern)}, the pattern's length", "correct one of them")
    return ModelConfig(pattern=pattern, **keys)


READERS = {
    "nemotron_h": read_nemotron,
    "llama": read_llama,
    "qwen3": read_qwen3,
    "qwen3_moe": read_qwen3_moe,
    "trimaran": read_own,
}


def model_type(config: ModelConfig) -> str:
    """The hub architecture that computes exactly this model, or `trimaran` when none does."""
    if config.residual == "ngpt":
        return "trimaran"
    letters = set(config.pattern + config.mtp_pattern)
    experts, dense = "E" in letters, "-" in letters
    if letters <= set("M*E-"):
        plain_ffn = config.ffn == "relu2" or not (experts or dense)
        known_router = config.router == "sigmoid" and config.moe_shared_expert_intermediate_size > 0
        fits = plain_ffn and (known_router or not experts) and not (config.qk_norm and "*" in letters)
        return "nemotron_h" if fits else "trimaran"
    if not re.fullmatch("(R[-E])+", config.pattern) or config.mtp_pattern or config.ffn != "swiglu":
        return "trimaran"
    if not experts:
        divides = config.hidden_size % config.num_attention_heads == 0  # transformers insists for llama
        return "qwen3" if config.qk_norm else "llama" if divides else "trimaran"
    plain_router = (config.router, config.n_group, config.routed_scaling_factor) == ("softmax", 1, 1.0)
    no_extras = config.moe_shared_expert_intermediate_size == 0 and config.moe_latent_size is None
    return "qwen3_moe" if config.qk_norm and plain_router and no_extras else "trimaran"


def write_config(config: ModelConfig, dtype: str | None = None) -> dict[str, Any]:
    """The content of config.json for `config`, in the architecture `model_type` chooses; `dtype` as in "bfloat16"."""
    kind = model_type(config)
    content: dict[str, Any] = {"architectures": [ARCHITECTURES[kind]], "model_type": kind}
    if dtype is not None:
        content["dtype"] = dtype
    return content | WRITERS[kind](config)


def shared_keys(config: ModelConfig) -> dict[str, Any]:
    ends = [config.eos_token_id, *config.stop_token_ids]
    return {
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
    }


def write_nemotron(config: ModelConfig) -> dict[str, Any]:
    """Both spellings of the pattern: llama.cpp's converter reads the string, the newest transformers the list.

    A model without experts has no expert keys, since that converter takes their presence for experts.
    """
    content = {"hybrid_override_pattern": config.pattern, "num_hidden_layers": len(config.pattern)}
    content |= {"layers_block_type": [NEWEST[letter] for letter in config.pattern]}
    content |= {name: getattr(config, name) for name in NEMOTRON_FIELDS} | shared_keys(config)
    content |= {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu"}
    if "E" in config.pattern + config.mtp_pattern:
        content |= {name: getattr(config, name) for name in MOE_FIELDS} | {"n_shared_experts": 1}
    if config.mtp_pattern:
        content |= {
            "num_nextn_predict_layers": 1,
            "mtp_hybrid_override_pattern": config.mtp_pattern,
            "mtp_layers_block_type": [NEWEST[letter] for letter in config.mtp_pattern],
            "mtp_depth": config.mtp_depth,
        }
    return content


def write_rotary(config: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {"rope_type": "llama3"} | config.rope_scaling.model_dump()
    content = {name: getattr(config, name) for name in ROTARY_FIELDS} | shared_keys(config)
    return content | {
        "num_hidden_layers": len(config.pattern) // 2,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.layer_norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "attention_bias": False,
    }


def write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    return write_rotary(config) | {
        "num_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, letter in enumerate(config.pattern[1::2]) if letter == "-"],
    }


def write_own(config: ModelConfig) -> dict[str, Any]:
    content = config.model_dump(mode="json")
    pattern = content.pop("pattern")
    return {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)} | content


WRITERS = {
    "nemotron_h": write_nemotron,
    "llama": write_rotary,
    "qwen3": write_rotary,
    "qwen3_moe": write_qwen3_moe,
    "trimaran": write_own,
}


def dump_json(content: Mapping[str, Any]) -> str:
    """Strict JSON: our files never hold a bare Infinity."""
    assert all(not isinstance(v, float) or math.isfinite(v) for v in content.values())
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
