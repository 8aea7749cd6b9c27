"""LoRA: nothing changes at first, every kind of layer learns, merged equals unmerged, and peft agrees."""

import pytest
import torch

from tests.models import KINDS, random_documents, random_tokens, tiny
from trimaran.errors import Refusal
from trimaran.model import hub, lora
from trimaran.model.lora import LoraSettings
from trimaran.ops.loss import cross_entropy
from trimaran.train.optim import adamw, muon

ADAPTABLE = [name for name in KINDS if name != "ngpt"]
SMALL = {"rank": 4, "alpha": 8.0}


def with_adapters(kind, dtype=torch.float64, drawn=True, changes=None, **settings):
    """A tiny model with adapters whose B is far from zero, unless it is to be as `apply` leaves it."""
    model = tiny(kind, dtype, **(changes or {}))
    lora.apply(model, LoraSettings(**{**SMALL, **settings}), seed=5)
    if drawn:
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for module in lora.adapters(model).values():
                module.lora_B.weight.normal_(0, 0.3, generator=generator)
    return model


def all_logits(model, tokens, doc_ids=None):
    with torch.no_grad():
        hidden = model.hidden(tokens, doc_ids)
        found = [model.head(hidden)]
        if model.mtp is not None:
            found.append(model.head(model.mtp(hidden, tokens.roll(-1, 1), doc_ids)))
    return torch.cat(found)


@pytest.mark.parametrize("kind", ADAPTABLE)
def test_fresh_adapters_change_no_bit(kind):
    tokens, documents = random_tokens(2, 63), random_documents(2, 63)
    plain = all_logits(tiny(kind, torch.float32), tokens, documents)
    targets = ("all",) if tiny(kind).config.tie_embeddings else ("all", "head")
    model = with_adapters(kind, torch.float32, drawn=False, targets=targets)
    assert torch.equal(all_logits(model, tokens, documents), plain)


@pytest.mark.parametrize("kind", ADAPTABLE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-3)])
def test_merged_equals_unmerged(kind, dtype, tolerance):
    tokens = random_tokens(2, 63)
    targets = ("all",) if tiny(kind).config.tie_embeddings else ("all", "head")
    model = with_adapters(kind, dtype, targets=targets)
    plain, unmerged = all_logits(tiny(kind, dtype), tokens), all_logits(model, tokens)
    done = lora.merge(model)
    assert len(done.names) == len(lora.kinds(model)) and not lora.adapted(model)
    merged = all_logits(model, tokens)
    assert (merged - plain).abs().max() > 0.1
    close = (merged - unmerged).abs()
    # choosing experts is not continuous: in fp32 a token whose scores nearly tie may go elsewhere
    assert close.max() < tolerance if dtype == torch.float64 else close.median() < tolerance / 100


def test_merging_gives_back_the_plain_model_and_its_names(tmp_path):
    model = with_adapters("latent", torch.float32, targets=("all", "head"))
    with pytest.raises(Refusal, match="differs from its configuration"):
        hub.save(model, tmp_path / "unmerged")
    before = model.version
    lora.merge(model)
    assert model.version > before
    assert list(model.state_dict()) == list(tiny("latent").state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    hub.save(model, tmp_path)
    tokens = random_tokens(1, 20)
    assert torch.equal(all_logits(hub.load(tmp_path), tokens), all_logits(model, tokens))
    with pytest.raises(Refusal, match="without adapters"):
        lora.merge(model)


def loss_of(model, tokens):
    hidden = model.hidden(tokens)
    weights = torch.ones(tokens.numel()) / tokens.numel()
    loss = cross_entropy(hidden.flatten(0, 1), model.head, tokens.roll(-1, 1).flatten(), weights)
    if model.mtp is not None:
        ahead = model.mtp(hidden, tokens.roll(-1, 1))
        loss = loss + cross_entropy(ahead.flatten(0, 1), model.head, tokens.roll(-2, 1).flatten(), weights)
    return loss


@pytest.mark.parametrize("kind", ["mamba", "latent", "qwen", "everything"])
def test_adapters_alone_learn_and_all_of_them_do(kind):
    model = with_adapters(kind, targets=("all", "head")).train()
    loss_of(model, random_tokens(2, 30)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_A." in name or ".lora_B." in name), name
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == parameter.requires_grad, name


def test_gradients_are_those_of_the_merged_weight():
    """dL/dB = scale dL/dW A^T and dL/dA = scale B^T dL/dW, where W is the merged weight."""
    model, tokens = with_adapters("latent"), random_tokens(2, 30)
    loss_of(model, tokens).backward()
    found = lora.adapters(model)
    lora.merge(model)
    loss_of(model, tokens).backward()
    for name, module in found.items():
        whole = model.get_submodule(name).weight.grad
        A, B = module.lora_A.weight, module.lora_B.weight
        torch.testing.assert_close(B.grad, module.scale * whole @ A.mT, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(A.grad, module.scale * B.mT @ whole, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizers_move_adapters_and_nothing_else(optimizer):
    model, tokens = with_adapters("latent", torch.float32, drawn=False).train(), random_tokens(4, 30)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shared = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    if optimizer == "adamw":
        steps = adamw(model, **shared)
    else:
        steps = muon(model, times=1.0, momentum=0.9, dtype=torch.float32, **shared)
    losses = []
    for _ in range(4):
        steps.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        steps.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] * 0.98
    for name, tensor in model.state_dict().items():
        moved = not torch.equal(tensor, before[name])
        assert moved == (".lora_A." in name or ".lora_B." in name), name


def test_state_carried_through_adapters_gives_what_one_pass_gives():
    model, tokens = with_adapters("everything"), random_tokens(2, 40)
    state, found = model.new_state(batch=2), []
    with torch.no_grad():
        for start, stop in ((0, 17), (17, 18), (18, 40)):
            found.append(model(tokens[:, start:stop], state=state))
        torch.testing.assert_close(torch.cat(found, 1), model(tokens), rtol=1e-9, atol=1e-9)


KIND_OF_PART = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mamba": ("in_proj", "out_proj"),
    "latent": ("fc1_latent_proj", "fc2_latent_proj"),
    "experts": ("up_proj", "down_proj"),
    "shared": ("up_proj", "down_proj"),
    "feedforward": ("up_proj", "down_proj"),
    "draft": ("eh_proj",),
    "head": ("lm_head",),
}


@pytest.mark.parametrize("kind", KIND_OF_PART)
def test_a_kind_is_its_maps_wherever_they_are(kind):
    model = tiny("everything")
    names = lora.chosen(model, [kind])
    assert {name.rpartition(".")[2] for name in names} == set(KIND_OF_PART[kind])
    assert lora.chosen(model, ["all"]) == [name for name in lora.kinds(model) if name != "lm_head"]
    if kind in ("experts", "shared"):
        assert all(kind in name for name in names)


def test_no_map_is_without_a_kind():
    for kind in KINDS:
        model = tiny(kind)
        plain = {
            name for name, module in model.named_modules() if isinstance(module, (lora.Linear, lora.StackedLinear))
        }
        assert set(lora.kinds(model)) == plain
        assert not any("gate.weight" in name or name.endswith("mixer.gate") for name in plain)  # no router


def test_globs_match_whole_names_and_their_ends():
    model = tiny("latent")
    assert lora.chosen(model, ["q_proj"]) == lora.chosen(model, ["*.q_proj"])
    assert lora.chosen(model, ["backbone.layers.0.*"]) == [
        "backbone.layers.0.mixer.in_proj",
        "backbone.layers.0.mixer.out_proj",
    ]
    assert set(lora.chosen(model, ["mamba", "q_proj"])) == {
        *lora.chosen(model, ["mamba"]),
        *lora.chosen(model, ["q_proj"]),
    }


@pytest.mark.parametrize(
    ("kind", "target", "said"),
    [
        ("latent", "atention", "attention"),
        ("latent", "feedforward", "nothing"),
        ("llama", "head", "nothing"),
        ("latent", "*.qproj", "*.q_proj"),
        ("latent", "gate", "nothing"),
        ("mamba", "in_projj", "in_proj"),
    ],
)
def test_a_target_that_matches_nothing_is_refused(kind, target, said):
    model = tiny(kind)
    with pytest.raises(Refusal, match=r"matches nothing") as refused:
        lora.apply(model, LoraSettings(targets=("all", target)))
    assert said in str(refused.value)
    assert not lora.adapted(model) and all(p.requires_grad for p in model.parameters())


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(Refusal, match="ngpt"):
        lora.apply(tiny("ngpt"), LoraSettings())
    with pytest.raises(Refusal, match="has adapters"):
        lora.apply(with_adapters("mamba"), LoraSettings())
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"targets": ()}, {"dropout": 1.0}):
        with pytest.raises(Refusal):
            LoraSettings(**wrong)


def test_dropout_acts_in_training_only():
    model, tokens = with_adapters("mamba", dropout=0.5), random_tokens(1, 20)
    assert torch.equal(all_logits(model, tokens), all_logits(model, tokens))
    model.train()
    assert not torch.equal(all_logits(model, tokens), all_logits(model, tokens))


def test_adapters_of_bf16_weights_are_fp32():
    model = with_adapters("latent", torch.bfloat16, targets=("all", "head"))
    module = lora.adapters(model)["backbone.layers.0.mixer.in_proj"]
    assert module.lora_A.weight.dtype == torch.float32 and module.weight.dtype == torch.bfloat16
    assert model(random_tokens(1, 20)).isfinite().all()
    lora.merge(model)
    assert model.dtype == torch.bfloat16
