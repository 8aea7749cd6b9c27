"""Whole blocks of a few tokens: the same as their steps, never past a module that somebody changed or listens to."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.models import KINDS, tiny
from trimaran.engine.paged import Segment
from trimaran.engine.pages import Memory
from trimaran.model.few import Join, know
from trimaran.ops import backend, native, native_stack

pytestmark = pytest.mark.skipif(native.library() is None, reason=str(native.missing()))
SIZES = {"head_dim": 16, "ssm_state_size": 16}  # that fill the kernels' lanes
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def without_gradient():
    with torch.no_grad():
        yield


def logits(model, tokens, setting):
    """A prompt, then single tokens."""
    with backend.using(setting):
        state = model.new_state(len(tokens))
        return torch.cat(
            [model(tokens[:, :20], state=state), *(model(tokens[:, n : n + 1], state=state) for n in range(20, 31))], 1
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3])
def test_decoding_is_the_same(kind, dtype, rows):
    model = tiny(kind, dtype, **SIZES, initializer_range=0.1)
    tokens = torch.randint(0, 97, (rows, 31), generator=torch.Generator().manual_seed(5))
    expected, found = logits(model, tokens, "-native.blocks"), logits(model, tokens, "auto")
    apart = (found - expected).abs().amax(-1) / expected.abs().max()
    # A choice of experts may turn over where rounding decides: rare, and only in bf16.
    turned = (apart > TOLERANCE[dtype]).float().mean()
    assert turned <= (0.05 if "moe" in kind or kind in ("latent", "everything") else 0) * (dtype == torch.bfloat16)


def took(model, tokens, state, monkeypatch):
    """Which parts of a pass went to the kernel: letters, n for the norm, j for a join."""
    words, letters = [], dict(enumerate("-M*Ejn"))
    stack = native_stack.stack

    def noted(x, beside, parts, first, last, *rest):
        words.extend(parts[n * native_stack.WORDS] for n in range(first, last))
        return stack(x, beside, parts, first, last, *rest)

    monkeypatch.setattr(native_stack, "stack", noted)
    out = model.hidden(tokens, state=state)
    monkeypatch.undo()
    return "".join(letters[word] for word in words), out


SEEN = {"n_group": 1, "topk_group": 1, "qk_norm": False}  # what the kernel knows


def test_a_pass_goes_through_the_kernel(monkeypatch):
    model = tiny("everything", torch.float32, **SIZES, **SEEN)
    one, pattern = torch.zeros(2, 1, dtype=torch.long), model.config.pattern
    state = model.new_state(2)
    model(torch.zeros(2, 3, dtype=torch.long), state=state)
    known = "".join(letter for letter in pattern if letter in "M*E-")
    assert set("M*E-") <= set(known)
    assert took(model, one, state, monkeypatch)[0] == known + "n"
    with backend.using("-native.blocks"):
        assert took(model, one, state, monkeypatch)[0] == ""
    with torch.enable_grad():
        assert took(model, one, model.new_state(2), monkeypatch)[0] == ""
    with torch.autocast("cpu", torch.bfloat16):
        assert took(model, one, model.new_state(2), monkeypatch)[0] == ""
    assert took(model.double(), one, model.new_state(2), monkeypatch)[0] == ""


def test_many_tokens_take_ordinary_steps(monkeypatch):
    model = tiny("everything", torch.float32, **SIZES, **SEEN)
    assert took(model, torch.zeros(2, 40, dtype=torch.long), model.new_state(2), monkeypatch)[0] == ""


INNER = {"M": ["", "in_proj", "norm"], "*": ["k_proj"], "-": ["", "down_proj"]}
INNER["E"] = ["experts", "gate", "shared_experts", "fc1_latent_proj"]


@pytest.mark.parametrize(("letter", "inner"), [(letter, one) for letter, names in INNER.items() for one in names])
def test_whoever_listens_is_heard(letter, inner):
    model = tiny("everything", torch.float32, **SIZES, n_group=1, topk_group=1, qk_norm=False)
    block = next(b for b in model.backbone.layers if b.letter == letter)
    heard = []
    block.mixer.get_submodule(inner).register_forward_hook(lambda *_: heard.append(1))
    state = model.new_state(1)
    model(torch.zeros(1, 3, dtype=torch.long), state=state)
    heard.clear()
    model(torch.zeros(1, 1, dtype=torch.long), state=state)
    assert heard


def test_a_rewritten_map_counts():
    """A subclass in a map's place is not passed by."""
    from trimaran.model.linear import Linear

    class Doubled(Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny("dense", torch.float32, **SIZES)
    for block in model.backbone.layers:
        name = {"M": "out_proj", "-": "down_proj", "*": "o_proj"}[block.letter]
        old = getattr(block.mixer, name)
        new = Doubled(old.in_features, old.out_features)
        new.weight = old.weight
        setattr(block.mixer, name, new)
    tokens = torch.randint(0, 97, (1, 31), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(logits(model, tokens, "auto"), logits(model, tokens, "-native"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_trials_in_pages(dtype):
    """Steps, drafts and what is kept of them, in slots that are no neighbours, against the torch forms."""
    model = tiny("dense", dtype, **SIZES, initializer_range=0.1)

    def run(setting):
        with backend.using(setting):
            memory = Memory(model, rows=6, pages=40, page=16)
            opened = [memory.open() for _ in range(4)]
            memory.close(opened[1])
            own = [opened[2], opened[0]]
            outs = []
            for n, (counts, trial, kept) in enumerate([((9, 4), False, (9, 4)), ((1, 1), False, (1, 1)),
                                                      ((3, 3), True, (2, 0)), ((1, 1), False, (1, 1))]):  # fmt: skip
                for sequence, count in zip(own, counts, strict=True):
                    assert memory.reserve(sequence, count)
                view = memory.view([Segment(s, c, trial=trial) for s, c in zip(own, counts, strict=True)])
                tokens = torch.randint(0, 97, (1, sum(counts)), generator=torch.Generator().manual_seed(n))
                outs.append(model(tokens, state=view)[0])
                if trial:
                    view.keep(kept)
            return torch.cat(outs)

    expected, found = run("-native"), run("auto")
    assert (found - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def changes():
    """Changes of a model between two passes, each with what must be true of it."""

    def moved(model):
        up = model.backbone.layers[1].mixer.up_proj
        up.weight.data = up.weight.data.clone() * 2

    def replaced(model):
        norm = model.backbone.layers[0].norm
        norm.weight = torch.nn.Parameter(torch.full_like(norm.weight, 3.0))

    def in_place(model):
        model.backbone.layers[0].mixer.out_proj.weight.mul_(3)

    def epsilon(model):
        model.backbone.layers[0].norm.eps = 2.0

    def forward(model):
        down = model.backbone.layers[1].mixer.down_proj
        down.forward = lambda x: x[..., : down.out_features] * 0.5

    def shorter(model):
        model.backbone.layers[0].mixer.out_proj.weight.zero_()
        model.backbone.layers[1].mixer.down_proj.weight.zero_()

    def klass(model):
        from trimaran.model.linear import Linear

        class Halved(Linear):
            def forward(self, x):
                return super().forward(x) / 2

        model.backbone.layers[1].mixer.down_proj.__class__ = Halved

    def parametrized(model):
        class Doubled(torch.nn.Module):
            def forward(self, weight):
                return weight * 2

        torch.nn.utils.parametrize.register_parametrization(model.backbone.layers[1].mixer.up_proj, "weight", Doubled())

    return [moved, replaced, in_place, epsilon, forward, shorter, klass, parametrized]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_a_change_between_passes_is_seen(change):
    """What the stack keeps of a model never outlives what it was taken from."""
    model = tiny("dense", torch.float32, **SIZES, initializer_range=0.1)
    tokens = torch.randint(0, 97, (1, 31), generator=torch.Generator().manual_seed(5))
    before = logits(model, tokens, "auto")
    change(model)
    found, expected = logits(model, tokens, "auto"), logits(model, tokens, "-native")
    assert (found - before).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_copies_know_their_own_weights():
    model = tiny("dense", torch.float32, **SIZES, initializer_range=0.1)
    tokens = torch.randint(0, 97, (1, 31), generator=torch.Generator().manual_seed(5))
    before = logits(model, tokens, "auto")
    twin = copy.deepcopy(model)
    assert twin.backbone.few.known is None
    for weight in twin.parameters():
        weight.mul_(1.5)
    assert (logits(twin, tokens, "auto") - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, tokens, "auto"), before, rtol=0, atol=0)


def test_two_threads_share_a_model():
    """Nothing of a pass is kept where another could write it."""
    model = tiny("dense", torch.float32, **SIZES, initializer_range=0.1)
    prompts = [torch.randint(0, 97, (rows, 31), generator=torch.Generator().manual_seed(rows)) for rows in (1, 2, 3, 4)]
    expected = [logits(model, tokens, "auto") for tokens in prompts]

    def run(n):
        with torch.no_grad():
            state = model.new_state(len(prompts[n]))
            steps = [model(prompts[n][:, :20], state=state)]
            steps += [model(prompts[n][:, t : t + 1], state=state) for t in range(20, 31)]
            return torch.cat(steps, 1)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, [0, 1, 2, 3] * 5))
    for n, out in enumerate(found):
        torch.testing.assert_close(out, expected[n % 4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 9])
def test_the_draft_block_is_a_stack_too(dtype, rows):
    model = tiny("latent", dtype, **SIZES, initializer_range=0.1)
    assert model.mtp is not None
    generator = torch.Generator().manual_seed(3)
    hidden, following = torch.randn(rows, 6, 32, generator=generator).to(dtype), torch.randint(0, 97, (rows, 6))

    def run(setting):
        with backend.using(setting):
            state = model.new_state(rows)
            first = model.mtp(hidden[:, :5], following[:, :5], state=state.mtp)
            return torch.cat([first, model.mtp(hidden[:, 5:], following[:, 5:], state=state.mtp)], 1)

    expected, found = run("-native"), run("auto")
    assert (found - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    known = know([Join(model.mtp.layers[0]), *model.mtp.layers], dtype)
    assert known.known[0] is not None


def test_scratch_is_large_enough():
    """Odd sizes under guard: NaN behind the room that a kernel was given stays NaN."""
    given = []
    scratch = native_stack.scratch

    def guarded(numbers):
        room = scratch(numbers)
        given.append((room, torch.cat([room, room.new_full((64,), 7)])))
        return given[-1][1]

    native_stack.scratch = guarded
    try:
        model = tiny("latent", torch.bfloat16, **SIZES)
        for rows in (1, 3, 9, 32):
            tokens = torch.zeros(rows, 12, dtype=torch.long)
            state = model.new_state(rows)
            model(tokens[:, :10], state=state)
            model(tokens[:, :1], state=state)
    finally:
        native_stack.scratch = scratch
    assert given and all(bool((whole[len(room) :] == 7).all()) for room, whole in given)
