"""Trimaran: Nemotron-3-style hybrid language models through their whole life.

Importing this package imports neither torch nor transformers nor triton; the functions below do when called.
"""

from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimaran.model.hybrid import HybridModel
    from trimaran.text.tokenizer import Tokenizer

__all__ = ["load", "load_tokenizer"]


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


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("trimaran")
    raise AttributeError(f"module 'trimaran' has no attribute {name!r}")
