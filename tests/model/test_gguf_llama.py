"""Llama-family GGUF files: the imported model's logits are transformers' own for the same file, every tensor is used
once, and what does not fit is refused by name."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import trimaran
from tests import gguf_files
from tests.gguf_files import HEADS, VOCABULARY, WIDTH, gguf
from tests.models import random_tokens
from trimaran.errors import Refusal
from trimaran.model.config import RopeScaling
from trimaran.model.gguf import GGUF
from trimaran.model.gguf_llama import save_llama, unpermuted
from trimaran.ops.rope import rope_frequencies

EVERY_FORMAT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32")
HEAD_DIM = WIDTH // HEADS


def written(path, metadata=None, tensors=None, **changed):
    """A file without a tokenizer."""
    return gguf_files.write(path, gguf_files.sizes(VOCABULARY, **changed) | (metadata or {}), tensors or full())


def full():
    return gguf_files.weights(VOCABULARY)


def imported(path, folder, **options):
    save_llama(GGUF(path), folder, **options)
    return trimaran.load(folder)


def theirs(path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers reads GGUF with it")
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@torch.no_grad()
def agree(path, model):
    oracle = theirs(path)
    names = {name: tensor for name, tensor in oracle.state_dict().items() if name != "lm_head.weight"}
    assert sum(t.numel() for t in names.values()) == sum(
        t.numel() for name, t in model.state_dict().items() if name != "lm_head.weight"
    )
    tokens = random_tokens(2, 63, VOCABULARY)
    ours, expected = model(tokens), oracle(tokens).logits
    assert expected.std() > 0.3
    assert torch.allclose(ours, expected, rtol=1e-4, atol=2e-4), (ours - expected).abs().max()


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers(tied, tmp_path):
    path = gguf_files.tiny_llama(tmp_path / "tiny.gguf", EVERY_FORMAT, tied=tied)
    assert set(GGUF(path).formats()) == set(EVERY_FORMAT)
    agree(path, imported(path, tmp_path / "out"))


def test_llama_3_1_keeps_its_rescaled_frequencies(tmp_path):
    scaling = RopeScaling(factor=8.0)
    plain = rope_frequencies(HEAD_DIM, 5e5, torch.device("cpu"))
    factors = plain / rope_frequencies(HEAD_DIM, 5e5, torch.device("cpu"), scaling.model_dump())
    assert factors.max() == 8 and factors.min() == 1
    tensors = full() | {"rope_freqs.weight": (factors.numpy(), "F32")}
    path = written(tmp_path / "a.gguf", tensors=tensors, rope__freq_base=5e5)
    model = imported(path, tmp_path / "out")
    assert model.config.rope_scaling == scaling and model.config.rope_theta == 5e5
    other = full() | {"rope_freqs.weight": (np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32), "F32")}
    with pytest.raises(Refusal, match=r"rope_freqs\.weight .* follows another rule"):
        imported(written(tmp_path / "b.gguf", tensors=other), tmp_path / "other")


@given(heads=st.integers(1, 4), half=st.integers(1, 8), width=st.integers(1, 3))
def test_unpermuting_undoes_what_the_converter_did(heads, half, width):
    weight = torch.arange(heads * 2 * half * width).view(-1, width)
    interleaved = weight.view(heads, 2, half, width).transpose(1, 2).reshape(-1, width)  # llama.cpp's permute
    assert torch.equal(unpermuted(interleaved, heads), weight)


def test_fp32_keeps_every_number_and_bf16_rounds_it(tmp_path):
    path = written(tmp_path / "a.gguf", tensors=gguf_files.weights(VOCABULARY, ("Q4_1",)))
    exact, rounded = imported(path, tmp_path / "fp32"), imported(path, tmp_path / "bf16", dtype=torch.bfloat16)
    values = torch.from_numpy(GGUF(path).read("blk.1.ffn_down.weight"))
    name = "backbone.layers.3.mixer.down_proj.weight"
    assert torch.equal(exact.state_dict()[name], values)
    assert torch.equal(rounded.state_dict()[name], values.bfloat16().float()) and not torch.equal(
        rounded.state_dict()[name], values
    )
    assert (tmp_path / "bf16" / "model.safetensors").stat().st_size < 300_000 + 2 * values.numel() * 20


def test_shards_hold_the_same(tmp_path):
    path = written(tmp_path / "a.gguf")
    one, many = imported(path, tmp_path / "one"), imported(path, tmp_path / "many", shard_bytes=1_000_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), many.state_dict().values()))


def without(name):
    return {key: value for key, value in full().items() if key != name}


def spoiled(value):
    tensors = full()
    tensors["blk.0.attn_v.weight"][0].view(np.float32)[3, 4] = value
    return tensors


WRONG_TENSORS = {
    r"1 tensors missing: blk\.1\.ffn_up": lambda: without("blk.1.ffn_up.weight"),
    r"1 tensors unexpected: blk\.0\.attn_q\.bias": lambda: (
        full() | {"blk.0.attn_q.bias": (np.zeros(WIDTH, dtype=np.float32), "F32")}
    ),
    r"misshapen: blk\.0\.attn_k\.weight is \[64, 256\] instead of \[128, 256\]": lambda: (
        full() | {"blk.0.attn_k.weight": (np.zeros((64, WIDTH), dtype=np.float32), "F32")}
    ),
    r"blk\.0\.attn_k\.weight is stored as type 16": lambda: (
        full() | {"blk.0.attn_k.weight": (np.zeros((128, 66), dtype=np.uint8), "IQ2_XXS")}
    ),
    r"blk\.0\.attn_v\.weight .* not finite": lambda: spoiled(np.nan),
    r"no matrix token_embd\.weight": lambda: without("token_embd.weight"),
}


@pytest.mark.parametrize("told", WRONG_TENSORS)
def test_a_tensor_that_does_not_fit_is_named(told, tmp_path):
    path = written(tmp_path / "a.gguf", tensors=WRONG_TENSORS[told]())
    with pytest.raises(Refusal, match=told):
        imported(path, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"attention__sliding_window": 128}, "sets llama.attention.sliding_window"),
        ({"expert_count": 8}, "llama.expert_count = 8; allowed: 0"),
        ({"rope__scaling__type": "linear"}, "llama.rope.scaling.type = 'linear'"),
        ({"rope__dimension_count": 32}, "llama.rope.dimension_count = 32; allowed: 64"),
        ({"vocab_size": 7}, "llama.vocab_size = 7; allowed: 330"),
        ({"attention__head_count": 0}, "llama.attention.head_count = 0"),
        ({"attention__head_count": [4, 4]}, "llama.attention.head_count = array"),
        ({"block_count": 2**31}, "num_hidden_layers = 2147483648 by the metadata"),
        ({"embedding_length": 2**31}, "hidden_size = 2147483648 by the metadata"),
        ({"attention__key_length": 300, "attention__head_count": 300}, "head_dim = 300 by the metadata"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon = nan"),
    ],
)
def test_a_setting_that_we_do_not_compute_is_refused(changed, told, tmp_path):
    with pytest.raises(Refusal) as refusal:
        imported(written(tmp_path / "a.gguf", **changed), tmp_path / "out")
    assert told in str(refusal.value)


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"tokenizer.ggml.eos_token_id": 330}, "tokenizer.ggml.eos_token_id = 330; allowed: 0 to 329"),
        ({"tokenizer.ggml.eos_token_id": "two"}, "tokenizer.ggml.eos_token_id = 'two'"),
    ],
)
def test_a_role_without_a_token_is_refused(metadata, told, tmp_path):
    with pytest.raises(Refusal) as refusal:
        imported(written(tmp_path / "a.gguf", metadata), tmp_path / "out")
    assert told in str(refusal.value)


def test_all_ends_of_a_text_are_kept(tmp_path):
    ends = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 4, "tokenizer.ggml.bos_token_id": 1}
    config = imported(written(tmp_path / "a.gguf", ends), tmp_path / "out").config
    assert (config.eos_token_id, config.stop_token_ids, config.bos_token_id, config.pad_token_id) == (2, (4,), 1, None)


def test_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", arch="mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(Refusal, match="architecture 'mamba'; allowed: 'llama'"):
        imported(tmp_path / "a.gguf", tmp_path / "out")
