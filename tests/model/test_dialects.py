"""Every spelling of config.json is one model, and what we cannot compute is refused by name."""

import contextlib
import itertools
import json
import math

import pytest

from tests.models import KINDS, tiny_config
from trimaran.errors import Refusal
from trimaran.model.dialects import dump_json, model_type, read_config, write_config
from trimaran.model.presets import PRESETS, preset
from trimaran.model.size import ShapeOnly

NANO = {
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "hybrid_override_pattern": "MEM*E-",
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "conv_kernel": 3,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "n_shared_experts": 1,
    "layer_norm_epsilon": 1e-6,
    "time_step_limit": [0.0, math.inf],
    "expand": 2,
    "mamba_ssm_cache_dtype": "float16",
    "rope_theta": 10000,
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
}
WITHOUT_PATTERN = {key: value for key, value in NANO.items() if "pattern" not in key}
LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
QWEN = {"model_type": "qwen3_moe", "num_hidden_layers": 4, "head_dim": 16}


def test_reads_the_hub_dialect():
    config = read_config(NANO)
    assert (config.pattern, config.conv_kernel, config.layer_norm_epsilon) == ("MEM*E-", 3, 1e-6)
    assert config.mtp_pattern == "" and model_type(config) == "nemotron_h"


@pytest.mark.parametrize(
    "kinds",
    [
        ["mamba", "moe", "mamba", "attention", "moe", "mlp"],
        ["linear_attention", "moe", "linear_attention", "full_attention", "moe", "mlp"],
    ],
)
@pytest.mark.parametrize("layers", [{}, {"num_hidden_layers": None}, {"num_hidden_layers": 6}])
@pytest.mark.parametrize("key", ["layers_block_type", "layer_types"])
def test_pattern_as_a_list(kinds, layers, key):
    raw = {k: v for k, v in WITHOUT_PATTERN.items() if k != "num_hidden_layers"}
    assert read_config({**raw, **layers, key: kinds}) == read_config(NANO)


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        ("mamba_n_groups", "n_groups", 2),
        ("mamba_d_conv", "conv_kernel", 3),
        ("mamba_expand", "expand", 2),
        ("mamba_dt_min", "time_step_min", 0.002),
        ("mamba_dt_max", "time_step_max", 0.2),
        ("mamba_dt_limit", "time_step_limit", [0, math.inf]),
        ("mamba_dt_init_floor", "time_step_floor", 1e-5),
        ("mamba_conv_bias", "use_conv_bias", False),
        ("mamba_chunk_size", "chunk_size", 256),
        ("attention_head_dim", "head_dim", 16),
        ("norm_eps", "layer_norm_epsilon", 1e-6),
        ("rms_norm_eps", "layer_norm_epsilon", 1e-6),
        ("num_local_experts", "n_routed_experts", 4),
    ],
)
def test_aliases(alias, name, value):
    raw = {k: v for k, v in NANO.items() if k != name}
    assert read_config(raw | {alias: value}) == read_config(raw | {name: value})
    assert read_config(raw | {alias: value, name: value}) == read_config(raw | {name: value})


@pytest.mark.parametrize(
    "limit", ["[0.0, Infinity]", '[0.0, {"__float__": "Infinity"}]', "[0.0, 3.4028234663852886e+38]", "null"]
)
def test_three_spellings_of_no_clamp(limit, tmp_path):
    raw = {key: value for key, value in NANO.items() if key != "time_step_limit"}
    text = json.dumps(raw)[:-1] + f', "time_step_limit": {limit}}}'
    (tmp_path / "config.json").write_text(text)
    assert read_config(tmp_path) == read_config(NANO) == read_config(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    "spelt",
    [
        {"mtp_hybrid_override_pattern": "*E"},
        {"mtp_layers_block_type": ["attention", "moe"]},
        {"mtp_layers_block_type": ["full_attention", "moe"], "mtp_hybrid_override_pattern": "*E"},
        {},
    ],
)
def test_draft_block(spelt):
    assert read_config(NANO | spelt | {"num_nextn_predict_layers": 1}).mtp_pattern == "*E"
    assert read_config(NANO | spelt | {"num_nextn_predict_layers": 0}).mtp_pattern == ""
    assert read_config(NANO | spelt).mtp_pattern == ""


@pytest.mark.parametrize(("ends", "first", "rest"), [(2, 2, ()), ([2, 11], 2, (11,)), ([7], 7, ()), (None, None, ())])
def test_ends_of_text(ends, first, rest):
    config = read_config(NANO | {"eos_token_id": ends})
    assert (config.eos_token_id, config.stop_token_ids) == (first, rest)
    assert read_config(write_config(config)) == config


def test_llama_and_its_rope():
    config = read_config(LLAMA)
    assert (config.pattern, config.ffn, config.head_dim, config.num_key_value_heads) == ("R-R-", "swiglu", 16, 4)
    assert (config.layer_norm_epsilon, config.rope_theta, config.rope_scaling) == (1e-6, 10000.0, None)
    scaled = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    old = read_config(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaled | {"rope_type": "llama3"}})
    new = read_config(LLAMA | {"rope_parameters": scaled | {"rope_type": "llama3", "rope_theta": 5e5}})
    typed = read_config(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaled | {"type": "llama3"}})
    assert old == new == typed and old.rope_scaling.factor == 8.0


def test_qwen3_moe_layers():
    assert read_config(QWEN).pattern == "RERERERE"
    assert read_config(QWEN | {"mlp_only_layers": [0]}).pattern == "R-RERERE"
    assert read_config(QWEN | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}).pattern == "R-RER-R-"
    config = read_config(QWEN | {"num_local_experts": 16, "sliding_window": 4096, "max_window_layers": 4})
    assert (config.n_routed_experts, config.router, config.norm_topk_prob) == (16, "softmax", False)
    assert config.qk_norm and config.moe_shared_expert_intermediate_size == 0
    assert read_config({"model_type": "qwen3", "num_hidden_layers": 3}).pattern == "R-R-R-"


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (NANO | {"attention_bias": True}, "attention_bias"),
        (NANO | {"mlp_bias": True}, "mlp_bias"),
        (NANO | {"mlp_hidden_act": "silu"}, "mlp_hidden_act"),
        (NANO | {"attention_dropout": 0.1}, "attention_dropout"),
        (NANO | {"sliding_window": 128}, "sliding_window"),
        (NANO | {"residual_in_fp32": True}, "residual_in_fp32"),
        (NANO | {"n_shared_experts": 2}, "n_shared_experts"),
        (NANO | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (NANO | {"time_step_limit": [0.001, math.inf]}, "time_step_limit"),
        (NANO | {"time_step_limit": [0.0, 0.1]}, "time_step_limit"),
        (NANO | {"num_hidden_layers": 7}, "num_hidden_layers"),
        (NANO | {"layers_block_type": ["moe"]}, "hybrid_override_pattern"),
        (NANO | {"layers_block_type": ["conv"]}, "'conv'"),
        (NANO | {"hybrid_override_pattern": "MEM*EX"}, "'X'"),
        (NANO | {"norm_eps": 1e-3}, "norm_eps"),
        (NANO | {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
        (NANO | {"logit_softcap": 30.0, "alibi": True}, "alibi, logit_softcap"),
        (WITHOUT_PATTERN, "layer pattern"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA | {"sliding_window": 128}, "sliding_window"),
        (LLAMA | {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        (QWEN | {"use_sliding_window": True}, "use_sliding_window"),
        (QWEN | {"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"model_type": "bert"}, "'bert'"),
        ({}, "model_type"),
        ({"model_type": "trimaran", "hidden_size": 64, "hybrid_override_pattern": "MW", "spin": 1}, "spin"),
    ],
)
def test_refuses_by_name(raw, named):
    with pytest.raises(Refusal) as refusal:
        read_config(raw)
    assert named in str(refusal.value)


@pytest.mark.parametrize("text", ["", "[1]", "{'a': 1}", "\x00"])
def test_damaged_json(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(Refusal, match="JSON"):
        read_config(tmp_path)


def test_no_config(tmp_path):
    with pytest.raises(Refusal, match=r"no config\.json"):
        read_config(tmp_path)


NATIVE = {
    "mamba": "nemotron_h",
    "dense": "nemotron_h",
    "moe": "nemotron_h",
    "grouped-moe": "nemotron_h",
    "latent": "nemotron_h",
    "llama": "llama",
    "qwen": "qwen3_moe",
}


@pytest.mark.parametrize("kind", KINDS)
def test_written_and_read_again(kind):
    config = tiny_config(kind, eos_token_id=3, stop_token_ids=(5,), pad_token_id=None, max_position_embeddings=77)
    content = write_config(config, "bfloat16")
    assert content["model_type"] == NATIVE.get(kind, "trimaran" if kind != "attention" else "nemotron_h")
    again = read_config(json.loads(dump_json(content)))
    assert write_config(again, "bfloat16") == content
    for name, value in meaningful(config).items():
        assert getattr(again, name) == value, name


def meaningful(config):
    """The fields that the layers of `config` use."""
    fields, letters = config.model_dump(), set(config.pattern + config.mtp_pattern)
    unused = set()
    if "E" not in letters:
        unused |= {name for name in fields if "expert" in name or "moe" in name or "topk" in name or "rout" in name}
        unused |= {"n_group"}
    if not letters & set("RW"):
        unused |= {name for name in fields if "rope" in name}
    if not letters & set("*RW"):
        unused |= {"qk_norm"}
    if "M" not in letters:
        unused |= {name for name in fields if name.startswith(("mamba", "time_step", "ssm", "conv", "use_conv"))}
        unused |= {"n_groups", "chunk_size"}
    if not letters & set("-E"):
        unused |= {"ffn"}
    if "W" not in letters:
        unused |= {"sliding_window"}
    return {name: getattr(config, name) for name in fields if name not in unused}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive(name):
    config = preset(name)
    if not isinstance(config, ShapeOnly):
        again = read_config(write_config(config))
        assert {name: getattr(again, name) for name in meaningful(config)} == meaningful(config)


def test_a_dense_model_names_no_experts():
    """llama.cpp's converter takes the key num_experts_per_tok for experts."""
    assert not [key for key in write_config(tiny_config("dense")) if "expert" in key or "moe" in key]
    assert write_config(tiny_config("moe"))["num_experts_per_tok"] == 3


WRONG = [None, "x", "false", -1, 0, 1.5, True, [], {}, [1], {"a": 1}, "32"]


@pytest.mark.parametrize("kind", ["latent", "llama", "qwen", "window"])
def test_any_value_in_any_key_is_read_or_refused(kind):
    """Never another exception, and never text taken for truth."""
    whole = write_config(tiny_config(kind)) | ({"time_step_limit": [0.0, 1e39]} if kind == "latent" else {})
    for key, value in itertools.product(whole, WRONG):
        with contextlib.suppress(Refusal):
            read_config({**whole, key: value})
    with pytest.raises(Refusal, match=r"^tie_word_embeddings = 'false'|^tie_embeddings = 'false'"):
        read_config({**whole, "tie_embeddings" if kind == "window" else "tie_word_embeddings": "false"})
