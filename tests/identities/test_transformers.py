"""transformers as the oracle: the same weights give the same logits, and checkpoints go both ways unchanged.

Its Nemotron-H mixer clamps dt from below in the full forward and not in the single step; the limit is lifted on its
mixers before comparing, and one test shows that we never clamp.
"""

import math

import pytest
import torch
from safetensors.torch import load_file

from tests.models import SIZES, random_tokens, tiny, tiny_config
from trimaran.model import hub
from trimaran.model.names import pieces

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SHARED = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads")}
SHARED |= {"head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 512, "pad_token_id": 0}
MAMBA = {
    name: SIZES[name] for name in ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "chunk_size")
}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
SHARED_EXPERT = {"moe_shared_expert_intermediate_size": 40, "routed_scaling_factor": 2.5}
QWEN = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "num_hidden_layers": 3}
LLAMA_ROPE = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500.0, "original_max_position_embeddings": 32}
LLAMA_ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def hybrid(pattern, **changes):
    kinds = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
    listed = [kinds[letter] for letter in pattern]
    fields = {**SHARED, **MAMBA, **EXPERTS, **SHARED_EXPERT, **changes}
    return transformers.NemotronHConfig(layers_block_type=listed, **fields)


THEIRS = {
    "dense": lambda: hybrid("M-M*-M-"),
    "no conv bias": lambda: hybrid("M*-", use_conv_bias=False, conv_kernel=3),
    "moe": lambda: hybrid("MEM*E"),
    "grouped moe": lambda: hybrid("MEM*E", n_group=4, topk_group=2),
    "unnormalised moe": lambda: hybrid("ME*E", norm_topk_prob=False),
    "latent moe": lambda: hybrid("MEM*E-", moe_latent_size=16),
    "llama": lambda: transformers.LlamaConfig(num_hidden_layers=2, rope_parameters=LLAMA_ROPE, **SHARED),
    "tied llama": lambda: transformers.LlamaConfig(num_hidden_layers=2, tie_word_embeddings=True, **SHARED),
    "qwen3": lambda: transformers.Qwen3Config(num_hidden_layers=2, **SHARED),
    "qwen3 moe": lambda: transformers.Qwen3MoeConfig(norm_topk_prob=True, **QWEN, **SHARED),
    "qwen3 moe and dense": lambda: transformers.Qwen3MoeConfig(mlp_only_layers=[1], **QWEN, **SHARED),
}
OURS = ("dense", "moe", "grouped-moe", "latent", "llama", "qwen")
every_theirs = pytest.mark.parametrize("name", THEIRS)


@torch.no_grad()
def randomised(config):
    """Their model with weights that make every part matter."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(0, 0.3)
        elif tensor.ndim >= 2:
            tensor.normal_(0, 0.15)
        elif "inv_freq" not in name:
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return unclamped(model)


def unclamped(model):
    mixers = [module for module in model.modules() if hasattr(module, "time_step_limit")]
    for mixer in mixers:
        mixer.time_step_limit = (0.0, math.inf)
    return model


def opened(folder):
    """Their reading of a folder, with a report of every tensor it did not find or use."""
    read = transformers.AutoModelForCausalLM.from_pretrained
    model, told = read(folder, attn_implementation="eager", output_loading_info=True)
    return unclamped(model.eval()), told


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """name -> (their model, ours read from what they saved, the folder); made once per name."""
    made = {}

    def pair(name):
        if name not in made:
            theirs, folder = randomised(THEIRS[name]()), tmp_path_factory.mktemp("theirs")
            theirs.save_pretrained(folder)
            made[name] = theirs, hub.load(folder), folder
        return made[name]

    return pair


@every_theirs
@pytest.mark.parametrize("length", [1, 63, 100])
@torch.no_grad()
def test_same_logits(name, length, pairs):
    theirs, ours, _ = pairs(name)
    tokens = random_tokens(2, length)
    close(ours(tokens), theirs(tokens).logits)


@every_theirs
@torch.no_grad()
def test_cached_decoding(name, pairs):
    theirs, ours, _ = pairs(name)
    tokens = random_tokens(2, 24)
    state, cache = ours.new_state(batch=2), None
    for piece in (tokens[:, :17], *tokens[:, 17:].split(1, dim=1)):
        out = theirs(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        close(ours(piece, state=state), out.logits)


@every_theirs
@torch.no_grad()
def test_left_padding(name, pairs):
    theirs, ours, _ = pairs(name)
    tokens, pad = random_tokens(3, 21), torch.tensor([0, 5, 13])
    real = torch.arange(21) >= pad[:, None]
    out = theirs(tokens, attention_mask=real.long(), position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits
    close(ours(tokens, doc_ids=torch.where(real, 0, -1))[real], out[real])


@every_theirs
def test_their_checkpoint_saved_again(name, pairs, tmp_path):
    _, ours, folder = pairs(name)
    hub.save(ours, tmp_path)
    before, after = load_file(folder / hub.WEIGHTS), load_file(tmp_path / hub.WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    first, second = (transformers.AutoConfig.from_pretrained(place).to_dict() for place in (folder, tmp_path))
    ignored = {"transformers_version", "_name_or_path", "architectures"}
    if "E" not in ours.config.pattern:
        ignored |= {key for key in first if "expert" in key or "moe" in key or "rout" in key}
    differing = {
        key: (first[key], second.get(key)) for key in first if key not in ignored and first[key] != second[key]
    }
    assert not differing


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 9000])
@torch.no_grad()
def test_our_checkpoint_opens_there(kind, shard_bytes, tmp_path):
    ours = tiny(kind, torch.float32, initializer_range=0.15)
    hub.save(ours, tmp_path, shard_bytes=shard_bytes)
    theirs, told = opened(tmp_path)
    assert not told["missing_keys"] and not told["mismatched_keys"]
    assert all(name.startswith("mtp.") for name in told["unexpected_keys"])  # it has no draft block
    tokens = random_tokens(2, 37)
    close(ours(tokens), theirs(tokens).logits)


@torch.no_grad()
def test_tied_embeddings_open_there(tmp_path):
    """Their Nemotron-H never ties, whatever its config says, so the file repeats the embedding as the head."""
    ours = tiny("dense", torch.float32, initializer_range=0.15, tie_embeddings=True)
    hub.save(ours, tmp_path)
    theirs, told = opened(tmp_path)
    assert not told["missing_keys"]
    close(ours(random_tokens(2, 9)), theirs(random_tokens(2, 9)).logits)
    again = hub.load(tmp_path)
    assert again.config.tie_embeddings and "lm_head.weight" not in again.state_dict()


@torch.no_grad()
def test_the_draft_block_survives_beside_them(tmp_path):
    """They drop it when they save; ours keeps it, and refuses their copy with the reason."""
    ours = tiny("latent", torch.float32)
    hub.save(ours, tmp_path / "ours")
    opened(tmp_path / "ours")[0].save_pretrained(tmp_path / "theirs")
    draft = {name for name in load_file(tmp_path / "ours" / hub.WEIGHTS) if name.startswith("mtp.")}
    wanted = {
        p.hub_name for n, t in ours.mtp.state_dict().items() for p in pieces(f"mtp.{n}", tuple(t.shape), "nemotron_h")
    }
    assert draft == wanted
    with pytest.raises(hub.Refusal, match="num_nextn_predict_layers to 0"):
        hub.load(tmp_path / "theirs")


@torch.no_grad()
def test_greedy_generation_agrees(tmp_path):
    ours = tiny("dense", torch.float32, initializer_range=0.15, eos_token_id=None)
    hub.save(ours, tmp_path)
    theirs = opened(tmp_path)[0]
    tokens = random_tokens(1, 5)
    out = theirs.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)
    for _ in range(12):
        tokens = torch.cat([tokens, ours(tokens)[:, -1:].argmax(-1)], 1)
    assert tokens.tolist() == out.tolist()


@torch.no_grad()
def test_small_steps_are_never_clamped(tmp_path):
    """With dt far below time_step_min = 0.001, their full forward departs from the recurrence; ours does not."""
    ours = tiny("dense", torch.float32, initializer_range=0.15)
    for block in ours.backbone.layers:
        if block.letter == "M":
            block.mixer.dt_bias.fill_(-9.0)  # softplus(-9) = 0.00012
            block.mixer.A_log.fill_(math.log(16.0))
    hub.save(ours, tmp_path)
    tokens = random_tokens(2, 60)
    free, clamped = opened(tmp_path)[0], transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    close(ours(tokens), free(tokens).logits)
    assert (ours(tokens) - clamped(tokens).logits).abs().max() > 1e-3


def test_reads_the_oldest_dialect_too(tmp_path):
    """transformers reads our pattern string, and we read what it makes of it."""
    config = tiny_config("latent")
    hub.save(tiny("latent", torch.float32), tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.hybrid_override_pattern == config.pattern == "ME*E" and theirs.num_hidden_layers == 4
    theirs.save_pretrained(tmp_path / "again")
    assert hub.read_config(tmp_path / "again") == hub.read_config(tmp_path)
