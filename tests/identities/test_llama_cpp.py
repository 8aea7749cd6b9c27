"""llama.cpp as the second oracle: its converter opens a folder written here, and its logits agree.

Slow: the first run builds llama-cpp-python from its source distribution (about ten minutes) into a cache folder,
`$TRIMARAN_LLAMA_CPP` or `~/.cache/trimaran/llama-cpp-VERSION`, which later runs use again.
"""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models import random_tokens, tiny
from trimaran.model import hub
from trimaran.text.tokenizer import Tokenizer

VERSION = "0.3.36"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# Two things the converter must be told. A vocabulary trained here has no entry in its table of pre-tokenizers, so that
# one is named (how text is cut does not touch the logits, which are compared on token ids). And it reads config.json
# through transformers, which fills in expert keys that a dense model does not have and the converter then believes, so
# it is given the file as written.
CONVERT = """
import json, pathlib, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import convert_hf_to_gguf
from conversion.base import ModelBase, TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
read = lambda folder, *_, **__: json.loads((pathlib.Path(folder) / "config.json").read_text())
ModelBase.load_hparams = staticmethod(read)
sys.argv = ["convert_hf_to_gguf.py", sys.argv[2], "--outfile", sys.argv[3], "--outtype", "f32"]
convert_hf_to_gguf.main()
"""
EVALUATE = """
import json, sys
import numpy as np
from llama_cpp import Llama
llama = Llama(sys.argv[1], n_ctx=512, n_batch=512, n_ubatch=512, logits_all=True, n_threads=1, verbose=False)
llama.eval(json.loads(sys.argv[2]))
np.save(sys.argv[3], np.array(llama.scores[: llama.n_tokens]))
"""


@pytest.fixture(scope="session")
def llama_cpp() -> tuple[Path, Path]:
    """The source tree of llama.cpp and a folder to import the built bindings from."""
    default = Path.home() / ".cache" / "trimaran" / f"llama-cpp-{VERSION}"
    root = Path(os.environ.get("TRIMARAN_LLAMA_CPP", default))
    source, built = root / f"llama_cpp_python-{VERSION}", root / "built"
    if not (built / "done").exists():
        root.mkdir(parents=True, exist_ok=True)
        pip, wanted = [sys.executable, "-m", "pip"], f"llama-cpp-python=={VERSION}"
        subprocess.run([*pip, "download", "--no-deps", "--no-binary", ":all:", "-d", str(root), wanted], check=True)
        archive = root / f"llama_cpp_python-{VERSION}.tar.gz"
        with tarfile.open(archive) as packed:
            packed.extractall(root, filter="data")
        parts = ("TOOLS", "TESTS", "EXAMPLES", "SERVER")
        flags = " ".join(["-DLLAVA_BUILD=OFF", "-DLLAMA_CURL=OFF", *(f"-DLLAMA_BUILD_{part}=OFF" for part in parts)])
        # The converter of Llama-shaped models imports sentencepiece before it looks for tokenizer.json.
        install = [*pip, "install", "--target", str(built), str(archive), "sentencepiece"]
        subprocess.run(install, check=True, env={**os.environ, "CMAKE_ARGS": flags})
        (built / "done").touch()
    return source / "vendor" / "llama.cpp", built


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([Path(__file__).read_text(), Path(subprocess.__file__).read_text()], 400)


# llama.cpp's kernels want widths in multiples of 32, and its SSM states of 16, 32, 64, 128 or 256 channels.
WIDE = {"hidden_size": 64, "head_dim": 32, "mamba_head_dim": 32, "ssm_state_size": 128, "n_groups": 2}
WIDE |= {"intermediate_size": 128, "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 96}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("dense", {}),
        ("moe", {}),
        ("latent", {"moe_latent_size": 32}),
        ("latent", {"moe_latent_size": 32, "mtp_pattern": ""}),
        ("llama", {"num_key_value_heads": 4}),
    ],
    ids=["dense", "moe", "latent-mtp", "latent", "llama"],
)
def test_llama_cpp_opens_what_we_write_and_agrees(kind, changes, llama_cpp, tokenizer, tmp_path):
    source, built = llama_cpp
    model = tiny(kind, torch.float32, **WIDE, **changes, vocab_size=tokenizer.vocab_size, initializer_range=0.08)
    folder, gguf, scores = tmp_path / "model", tmp_path / "model.gguf", tmp_path / "scores.npy"
    hub.save(model, folder)
    tokenizer.save(folder)
    paths = {**os.environ, "PYTHONPATH": str(built)}
    converted = subprocess.run(
        [sys.executable, "-c", CONVERT, str(source), str(folder), str(gguf)], capture_output=True, text=True, env=paths
    )
    assert converted.returncode == 0, converted.stderr[-2000:]
    tokens = random_tokens(1, 100, tokenizer.vocab_size)
    evaluated = subprocess.run(
        [sys.executable, "-c", EVALUATE, str(gguf), json.dumps(tokens[0].tolist()), str(scores)],
        capture_output=True,
        text=True,
        env=paths,
    )
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    with torch.no_grad():
        ours = model(tokens)[0].numpy()
    theirs = np.load(scores)[:, : tokenizer.vocab_size]
    np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(ours).max())
