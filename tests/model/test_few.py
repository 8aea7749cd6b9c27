"""Whole blocks of a few tokens: the same as their steps, never past a module that somebody changed or listens to."""

import pytest
import torch

from tests.models import KINDS, tiny
from trimaran.engine.paged import Segment
from trimaran.engine.pages import Memory
from trimaran.model.few import few
from trimaran.model.layout import lay_out
from trimaran.ops import backend, native, native_blocks

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


@pytest.mark.parametrize("letter", "M*E-")
def test_each_kind_of_block_goes_through_its_kernel(letter, monkeypatch):
    model = tiny("everything", torch.float32, **SIZES, n_group=1, topk_group=1, qk_norm=False)
    block = next(b for b in model.backbone.layers if b.letter == letter)
    state, x = model.new_state(2), torch.randn(2, 1, 32)
    model(torch.zeros(2, 3, dtype=torch.long), state=state)
    memory = state.layers[list(model.backbone.layers).index(block)]
    layout = state.lay_out(1, None)
    assert few(block, x, layout, memory, 4) is not None
    with backend.using("-native.blocks"):
        assert few(block, x, layout, memory, 4) is None
    with torch.enable_grad():
        assert few(block, x, layout, memory, 4) is None
    assert few(block, x.double(), layout, memory, 4) is None
    assert few(block, torch.randn(2, 40, 32), lay_out(2, 40, x.device), memory, 40) is None


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


def test_scratch_is_large_enough():
    """Odd sizes under guard: NaN behind the room that a kernel was given stays NaN."""
    given = []
    arena = native_blocks.arena

    def guarded(numbers):
        room = arena(numbers)
        given.append((room, torch.cat([room, room.new_full((64,), 7)])))
        return given[-1][1]

    native_blocks.arena = guarded
    try:
        model = tiny("latent", torch.bfloat16, **SIZES)
        for rows in (1, 3, 9, 32):
            tokens = torch.zeros(rows, 12, dtype=torch.long)
            state = model.new_state(rows)
            model(tokens[:, :10], state=state)
            model(tokens[:, :1], state=state)
    finally:
        native_blocks.arena = arena
    assert given and all(bool((whole[len(room) :] == 7).all()) for room, whole in given)
