"""Adapters as files: ours again bit for bit, peft's with equal outputs in both directions, and refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.test_lora import all_logits, with_adapters
from tests.models import random_tokens, tiny
from trimaran.errors import Refusal
from trimaran.model import adapter, hub, lora


@pytest.mark.parametrize("kind", ["latent", "llama", "qwen", "everything"])
def test_saved_and_loaded_is_the_same(kind, tmp_path):
    model, tokens = with_adapters(kind, torch.float32), random_tokens(2, 40)
    adapter.save(model, tmp_path / "a", base="runs/base")
    again = tiny(kind, torch.float32)
    found = adapter.load(again, tmp_path / "a")
    assert found == lora.touched(model) and again.version > 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(all_logits(again, tokens), all_logits(model, tokens))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    adapter.save(again, tmp_path / "b", base="runs/base")
    assert (tmp_path / "a" / adapter.CONFIG).read_bytes() == (tmp_path / "b" / adapter.CONFIG).read_bytes()
    written = [load_file(tmp_path / one / adapter.WEIGHTS) for one in "ab"]
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())


def test_names_and_shapes_are_the_hubs_one_entry_per_expert(tmp_path):
    tensors = load_file(adapter.save(with_adapters("latent"), tmp_path) / adapter.WEIGHTS)
    experts = {name for name in tensors if ".experts." in name}
    assert "base_model.model.backbone.layers.1.mixer.experts.7.up_proj.lora_A.weight" in experts
    assert len(experts) == 3 * 8 * 2 * 2  # blocks (one of the draft's), experts, maps, A and B
    assert tensors["base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight"].shape == (4, 32)
    assert tensors["base_model.model.backbone.layers.0.mixer.out_proj.lora_B.weight"].shape == (32, 4)


def test_ranks_and_alphas_that_differ_stay_different(tmp_path):
    model = tiny("mamba")
    for number, name in enumerate(lora.kinds(model)):
        module = lora.adapt(model, name, rank=2 + number, scale=0.5 * (number + 1))
        for own in adapter.tensors_of(module).values():
            torch.nn.init.normal_(own)
    again = tiny("mamba")
    adapter.load(again, adapter.save(model, tmp_path))
    assert torch.equal(again(random_tokens(1, 9)), model(random_tokens(1, 9)))
    pairs = [[(m.rank, m.scale) for m in lora.adapters(one).values()] for one in (model, again)]
    assert pairs[0] == pairs[1]


def changed(folder, **settings):
    config = json.loads((folder / adapter.CONFIG).read_text())
    (folder / adapter.CONFIG).write_text(json.dumps({**config, **settings}))
    return folder


def renamed(folder, old, new):
    tensors = load_file(folder / adapter.WEIGHTS)
    save_file({name.replace(old, new): value for name, value in tensors.items()}, folder / adapter.WEIGHTS)
    return folder


def without(folder, part):
    tensors = load_file(folder / adapter.WEIGHTS)
    save_file({name: value for name, value in tensors.items() if part not in name}, folder / adapter.WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: folder / "nowhere", "no adapter_config.json"),
        (lambda folder: changed(folder, use_dora=True), "use_dora"),
        (lambda folder: changed(folder, bias="all"), "bias"),
        (lambda folder: changed(folder, peft_type="IA3"), "IA3"),
        (lambda folder: changed(folder, modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda folder: renamed(folder, "layers.2.", "layers.9."), "has not"),
        (lambda folder: renamed(folder, "q_proj.lora_A", "q_proj.lora_magnitude"), "lora_magnitude"),
        (lambda folder: without(folder, "q_proj.lora_B"), "A and B"),
        (lambda folder: without(folder, "experts.3.up_proj"), "experts without"),
    ],
)
def test_a_folder_that_is_not_understood_is_refused_and_the_model_untouched(spoil, said, tmp_path):
    folder = spoil(adapter.save(with_adapters("latent"), tmp_path))
    model = tiny("latent")
    with pytest.raises(Refusal, match=said):
        adapter.load(model, folder)
    assert not lora.adapted(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_another_width_is_refused(tmp_path):
    folder = adapter.save(with_adapters("mamba"), tmp_path)
    with pytest.raises(Refusal, match=r"is \[\[4, 32\]"):
        adapter.load(tiny("mamba", hidden_size=48), folder)
    (folder / adapter.WEIGHTS).write_bytes(b"none")
    with pytest.raises(Refusal, match="cannot be read"):
        adapter.load(tiny("mamba"), folder)


def test_a_run_is_not_resumed_on_other_frozen_weights(tmp_path):
    model = with_adapters("latent")
    adapter.save(model, tmp_path)
    other = with_adapters("latent", drawn=False)
    adapter.restore(other, tmp_path)
    assert torch.equal(all_logits(other, random_tokens(1, 9)), all_logits(model, random_tokens(1, 9)))
    with torch.no_grad():
        other.backbone.layers[1].mixer.gate.e_score_correction_bias[2] += 1e-3
    with pytest.raises(Refusal, match="other frozen weights"):
        adapter.restore(other, tmp_path)


def test_saving_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(Refusal, match="without adapters"):
        adapter.save(tiny("mamba"), tmp_path)


# peft as the oracle. It refuses Mamba's out_proj in any Nemotron-H, whose kernels there pass the module by, and does
# not know that architecture's experts as parts of a stack; both are left out where it reads or writes.
PEFT_KINDS = {
    "llama": ["all"],
    "qwen": ["attention"],
    "dense": ["attention", "in_proj", "feedforward", "head"],
    "latent": ["attention", "backbone.*.in_proj", "backbone.*.shared_experts.*", "latent", "head"],
}


@pytest.fixture
def peft():
    pytest.importorskip("transformers").logging.set_verbosity_error()
    return pytest.importorskip("peft")


def theirs(folder):
    from transformers import AutoModelForCausalLM

    from tests.identities.test_transformers import unclamped

    return unclamped(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ).eval()


@pytest.mark.parametrize(("kind", "targets"), [*PEFT_KINDS.items(), ("qwen", ["all"])])
def test_peft_opens_ours_and_agrees(kind, targets, peft, tmp_path, recwarn):
    tokens = random_tokens(2, 33)
    hub.save(tiny(kind, torch.float32, mtp_pattern=""), tmp_path / "base")
    model = with_adapters(kind, torch.float32, targets=targets, changes={"mtp_pattern": ""})
    adapter.save(model, tmp_path / "adapter")
    opened = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path / "adapter")
    assert not [str(w.message) for w in recwarn if "adapter" in str(w.message).lower() and "key" in str(w.message)]
    with torch.no_grad():
        found = opened(tokens).logits
    plain = tiny(kind, torch.float32, mtp_pattern="")(tokens)
    assert (found - plain).abs().max() > 0.1
    torch.testing.assert_close(found, model(tokens).detach(), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", PEFT_KINDS)
@pytest.mark.parametrize("rslora", [False, True])
def test_ours_opens_pefts_and_agrees(kind, rslora, peft, tmp_path):
    tokens = random_tokens(2, 33)
    plain = tiny(kind, torch.float32, mtp_pattern="")
    hub.save(plain, tmp_path / "base")
    parts = adapter.parts(plain, lora.chosen(plain, PEFT_KINDS[kind]))
    ends = sorted({adapter.tail(part.hub_name) for part in parts})
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=ends,
        use_rslora=rslora,
        rank_pattern={"k_proj": 5},
        alpha_pattern={"k_proj": 11},
    )
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(theirs(tmp_path / "base"), config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
        wanted = wrapped(tokens).logits
    wrapped.save_pretrained(tmp_path / "adapter")
    found = adapter.load(plain, tmp_path / "adapter")
    assert len(found.names) == len(ends)
    torch.testing.assert_close(plain(tokens).detach(), wanted, rtol=1e-3, atol=2e-3)
