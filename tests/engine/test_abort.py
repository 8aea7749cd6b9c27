"""Whatever is cut short gives back all that it held, and nobody else notices."""

import random

import pytest

from tests.engine.workloads import at_rest, compare, oracle, requests, small, squeezed
from trimaran.engine.engine import Engine
from trimaran.engine.request import EngineSettings


@pytest.mark.parametrize("drafter", ["none", "mtp"])
def test_requests_aborted_anywhere(drafter):
    """250 without drafts and 250 with: before the first token, within a prompt, while decoding, preempted, or with
    samples that wait."""
    dice, model = random.Random(7), small("latent", 7)
    chosen = EngineSettings(rows=6, tokens_per_pass=40, page=4, snapshots=6, drafter=drafter, draft=2)
    engine = Engine(model, settings=squeezed(chosen, model, 60))
    waiting = requests(dice, 7, 250 + 40)
    kept = waiting[250:]
    expected = {(kept[output.prompt].id, output.sample): output.tokens for output in oracle(model, kept)}
    spared = {one.id for one in kept}
    dice.shuffle(waiting)
    outputs = {}
    alive: list[str] = []
    stages = set()
    while waiting or not engine.idle:
        while waiting and len(alive) < 12:
            alive.append(engine.submit(waiting.pop()))
        for piece in engine.step():
            assert piece.error is None
            if piece.output is not None and piece.request in spared:
                outputs[piece.request, piece.sample] = piece.output.tokens
        alive = [one for one in alive if one in engine.jobs]
        doomed = [one for one in alive if one not in spared]
        for one in dice.sample(doomed, dice.randint(0, min(3, len(doomed)))):
            stages |= {stage(job) for job in engine.jobs[one]}
            assert engine.abort(one) and not engine.abort(one)
        if dice.random() < 0.05:
            assert not engine.faults()
    assert stages == {"waits", "reads", "writes"}
    assert outputs == expected
    at_rest(engine)
    after = requests(dice, 7, 6)
    compare(engine.generate(after), oracle(model, after))


def stage(job) -> str:
    if job.sequence is None:
        return "waits"
    return "writes" if job.row.output.tokens else "reads"


def test_leaving_generate_early_aborts_the_rest():
    model = small("dense", 97)
    engine = Engine(model)
    outputs = engine.generate(requests(random.Random(3), 97, 6))
    next(outputs)
    outputs.close()
    at_rest(engine)


@pytest.mark.parametrize("place", [0, 1, 7])
def test_a_pass_that_raises_can_be_recovered_from(place):
    """Wherever the model breaks: in its first layer, in its last, or on the way out."""
    dice, model = random.Random(place), small("everything", 7)
    chosen = EngineSettings(rows=4, tokens_per_pass=24, page=4, drafter="mtp", snapshots=4)
    engine = Engine(model, settings=squeezed(chosen, model, 60))
    asked = requests(dice, 7, 12)
    for one in asked:
        engine.submit(one)
    for _ in range(5):
        engine.step()
    layer = [*model.backbone.layers, model.backbone.norm_f][place]

    def break_down(*_):
        raise MemoryError("out of memory")

    handle = layer.register_forward_hook(break_down)
    with pytest.raises(MemoryError):
        engine.step()
    handle.remove()
    failed = engine.recover()
    assert failed and not engine.faults()
    rest = [one for one in asked if one.id in engine.jobs]
    assert rest and not set(failed) & {one.id for one in rest}
    outputs = {}
    while not engine.idle:
        outputs |= {(p.request, p.sample): p.output.tokens for p in engine.step() if p.output is not None}
    for output in oracle(model, rest):
        key = rest[output.prompt].id, output.sample
        assert outputs.get(key, output.tokens) == output.tokens
    at_rest(engine)
