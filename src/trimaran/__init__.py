"""Trimaran: Nemotron-3-style hybrid language models through their whole life.

Importing this package imports neither torch nor transformers nor triton; the functions below do when called.
"""

import importlib
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimaran.engine.engine import Engine
    from trimaran.engine.request import EngineSettings, Request
    from trimaran.engine.sampler import Sampling
    from trimaran.model.hybrid import HybridModel
    from trimaran.text.tokenizer import Tokenizer

__all__ = ["Engine", "EngineSettings", "Request", "Sampling", "load", "load_tokenizer"]
HOMES = {
    "Engine": "engine.engine",
    "EngineSettings": "engine.request",
    "Request": "engine.request",
    "Sampling": "engine.sampler",
}


def load(path_or_preset: "str | PathLike[str]", **placement: Any) -> "HybridModel":
    """The model in a folder of config.json and safetensors, whoever wrote it; `dtype=` and `device=` place it.

    Defaults: torch.float32 on the CPU. Raises `Refusal` when the folder is no model or any tensor is missing,
    unexpected or misshapen.
    """
    from trimaran.model import hub

    return hub.load(path_or_preset, **placement)


def load_tokenizer(path: "str | PathLike[str]") -> "Tokenizer":
    """The tokenizer in a run folder or any folder with a tokenizer.json."""
    from trimaran.text.tokenizer import Tokenizer

    return Tokenizer.load(path)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("trimaran")
    if name in HOMES:
        return getattr(importlib.import_module(f"trimaran.{HOMES[name]}"), name)
    raise AttributeError(f"module 'trimaran' has no attribute {name!r}")
