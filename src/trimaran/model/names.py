"""Parameter names: the model's to the hub's.

Inside the model the names are the hub's own, with two exceptions: experts are stacked here and one file entry each
there (`experts.up_proj.weight[3]` is `experts.3.up_proj.weight`), and Llama-shaped checkpoints count one layer where a
pattern has two letters.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

STACKED = re.compile(r"(.*\.experts)\.((?:up|down|gate)_proj\.weight)")
LAYER = re.compile(r"backbone\.layers\.(\d+)\.(norm|mixer)\.(.*)")
LLAMA_OUTSIDE = {
    "backbone.embeddings.weight": "model.embed_tokens.weight",
    "backbone.norm_f.weight": "model.norm.weight",
}
LLAMA_INSIDE = {
    ("norm", 0): "input_layernorm",
    ("mixer", 0): "self_attn",
    ("norm", 1): "post_attention_layernorm",
    ("mixer", 1): "mlp",
}


@dataclass(frozen=True)
class Piece:
    """One tensor of a checkpoint: where it lives in the model (`expert` selects a row of a stack) and its shape."""

    hub_name: str
    name: str
    expert: int | None
    shape: tuple[int, ...]


def pieces(name: str, shape: tuple[int, ...], model_type: str) -> Iterator[Piece]:
    """The checkpoint tensors that hold the model's tensor `name`."""
    stacked = STACKED.fullmatch(name)
    if stacked is None:
        yield Piece(hub_name(name, model_type), name, None, shape)
        return
    experts, rest = stacked.groups()
    for expert in range(shape[0]):
        yield Piece(hub_name(f"{experts}.{expert}.{rest}", model_type), name, expert, shape[1:])


def hub_name(name: str, model_type: str) -> str:
    """The hub's name of an unstacked tensor."""
    if model_type in ("nemotron_h", "trimaran"):
        return name
    layer = LAYER.fullmatch(name)
    if layer is None:
        return LLAMA_OUTSIDE.get(name, name)
    index, half = divmod(int(layer[1]), 2)
    return f"model.layers.{index}.{LLAMA_INSIDE[layer[2], half]}.{layer[3]}"
