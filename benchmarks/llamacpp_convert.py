"""llama.cpp's own converter, told two things: python llamacpp_convert.py LLAMA_CPP FOLDER OUT.gguf TYPE.

A class that its registry finds for the architecture, derived from its own, says both. The sizes are those of
config.json as written: read through transformers, a dense model gains the keys of experts and is taken for one that has
them. And the vocabulary names its pre-tokenizer, since one trained here is in no table; speeds and logits are of token
ids, so how text is cut does not matter.
"""

import json
import sys
from pathlib import Path
from typing import Any

LLAMA_CPP, FOLDER, OUT, TYPE = sys.argv[1:]
sys.path[:0] = [LLAMA_CPP, f"{LLAMA_CPP}/gguf-py"]

import convert_hf_to_gguf  # noqa: E402
from conversion.base import ModelBase  # noqa: E402
from conversion.nemotron import NemotronHModel  # noqa: E402


@ModelBase.register("NemotronHForCausalLM")
class AsWritten(NemotronHModel):
    model_arch = NemotronHModel.model_arch  # the registry wants it stated again

    def __init__(self, folder: Path, *given: Any, **named: Any):
        hparams = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        super().__init__(folder, *given, hparams=hparams, **named)

    def get_vocab_base_pre(self, tokenizer: Any) -> str:
        return "gpt-2"


sys.argv = ["convert_hf_to_gguf.py", FOLDER, "--outfile", OUT, "--outtype", TYPE]
convert_hf_to_gguf.main()
