"""The keys of config.json: what each dialect calls a setting, what it assumes when silent, what changes nothing."""

from typing import Any


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ARCHITECTURES = {
    "nemotron_h": "NemotronHForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "trimaran": "TrimaranForCausalLM",
}

# Keys that say nothing about the mathematics of a decoder: file bookkeeping, training notes, generation defaults.
BOOKKEEPING = frozenset(
    words("""
    model_type architectures auto_map dtype torch_dtype transformers_version use_cache return_dict tokenizer_class
    output_attentions output_hidden_states output_router_logits
    id2label label2id num_labels problem_type finetuning_task
    task_specific_params prefix pruned_heads torchscript use_bfloat16 tie_encoder_decoder is_decoder is_encoder_decoder
    add_cross_attention cross_attention_hidden_size decoder_start_token_id sep_token_id unk_token_id
    chunk_size_feed_forward device_map unsloth_fixed unsloth_version pretraining_tp router_aux_loss_coef
    temperature top_k top_p typical_p do_sample max_length min_length num_beams num_beam_groups num_return_sequences
    repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size early_stopping
    bad_words_ids begin_suppress_tokens suppress_tokens exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id output_scores remove_invalid_values return_dict_in_generate tf_legacy_loss
    """)
)

# nemotron_h keys without effect there: it has no positions, never reads `expand`, and the rest are kernel choices,
# initialisation or the precision of a cache that we hold in fp32.
NEMOTRON_IGNORED = frozenset(
    words("""
    expand rope_theta rope_scaling rope_parameters partial_rotary_factor use_mamba_kernels mamba_ssm_cache_dtype
    mamba_dt_rank time_step_rank rescale_prenorm_residual num_logits_to_keep moe_shared_expert_overlap
    mtp_use_repeated_layer mtp_hybrid_override_pattern mtp_layers_block_type
    """)
)

ALIASES = {
    "nemotron_h": {
        "mamba_n_groups": "n_groups",
        "mamba_d_conv": "conv_kernel",
        "mamba_expand": "expand",
        "mamba_dt_min": "time_step_min",
        "mamba_dt_max": "time_step_max",
        "mamba_dt_limit": "time_step_limit",
        "mamba_dt_init_floor": "time_step_floor",
        "mamba_conv_bias": "use_conv_bias",
        "mamba_chunk_size": "chunk_size",
        "attention_head_dim": "head_dim",
        "norm_eps": "layer_norm_epsilon",
        "rms_norm_eps": "layer_norm_epsilon",
        "num_local_experts": "n_routed_experts",
        "layer_types": "layers_block_type",
    },
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "trimaran": {},
}

# Keys that would change the mathematics: the only values we compute. A value outside them is refused.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "nemotron_h": {
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_bias": (False,),
        "mamba_proj_bias": (False,),
        "attention_dropout": (0,),
        "hidden_dropout": (0,),
        "mlp_hidden_act": ("relu2",),
        "mamba_hidden_act": ("silu", "swish"),
        "sliding_window": (None,),
        "residual_in_fp32": (False,),
        "n_shared_experts": (1,),
        "quantization_config": (None,),
    },
    "llama": {
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "attention_dropout": (0, None),
        "hidden_act": ("silu", "swish"),
        "partial_rotary_factor": (1,),
        "quantization_config": (None,),
    },
    "qwen3": {
        "attention_bias": (False,),
        "attention_dropout": (0,),
        "hidden_act": ("silu", "swish"),
        "use_sliding_window": (False,),
        "partial_rotary_factor": (1,),
        "quantization_config": (None,),
    },
}
FIXED["qwen3_moe"] = FIXED["qwen3"] | {
    "qkv_bias": (False,),
    "use_qk_norm": (True,),
    "shared_expert_intermediate_size": (0, None),
}
FIXED["trimaran"] = {}

NEMOTRON_FIELDS = words("""
    vocab_size hidden_size num_attention_heads num_key_value_heads head_dim mamba_num_heads mamba_head_dim
    ssm_state_size n_groups conv_kernel use_conv_bias chunk_size time_step_min time_step_max time_step_floor
    intermediate_size layer_norm_epsilon initializer_range max_position_embeddings
""")
MOE_FIELDS = words("""
    n_routed_experts num_experts_per_tok moe_intermediate_size moe_shared_expert_intermediate_size moe_latent_size
    norm_topk_prob routed_scaling_factor n_group topk_group
""")
ROTARY_FIELDS = words("""
    vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads initializer_range
    max_position_embeddings
""")

# What transformers assumes for an absent key, where it differs from ModelConfig's own default.
ABSENT: dict[str, dict[str, Any]] = {
    "nemotron_h": {"hidden_size": 4096, "num_key_value_heads": 8},
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "max_position_embeddings": 2048,
        "pad_token_id": None,
    },
    "qwen3": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "trimaran": {},
}
ABSENT["qwen3_moe"] = ABSENT["qwen3"] | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "head_dim": None,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
}

SPELLINGS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
    "mlp": "-",
}
NEWEST = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
PLAIN_ROPE = ("default", None)
