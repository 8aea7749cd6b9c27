"""Small models and machines for the planner's tests."""

from trimaran.model.config import ModelConfig
from trimaran.plan.costs import Job
from trimaran.plan.hardware import Hardware, Reach
from trimaran.plan.practice import TRIMARAN, Practice


def model(pattern: str = "ME*E", **changes) -> ModelConfig:
    fields = {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 4,
        "chunk_size": 16,
        "intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 64,
    }
    return ModelConfig(pattern=pattern, **{**fields, **changes})


def machine(memory: float = 1e9, **changes) -> Hardware:
    fields = {
        "name": "small",
        "peak": {"fp32": 1e11, "bf16": 2e11},
        "memory": memory,
        "bandwidth": 1e10,
        "link": 4e9,
        "domain": 4,
        "network": 1e9,
        "latency": (2e-6, 1e-5),
        "reach": Reach(launch=1e-6, step=0.0, tile=8),
    }
    return Hardware(**{**fields, **changes})


def job(pattern: str = "ME*E", rows: int = 8, sequence: int = 64, practice: Practice = TRIMARAN, **changes) -> Job:
    hardware = changes.pop("hardware", machine())
    precision = changes.pop("precision", "bf16")
    return Job(model(pattern, **changes), sequence, rows, hardware, precision, practice)
