"""An engine whose Mamba states are held in fp16 and rounded by chance."""

import random

import pytest
import torch

from tests.engine.workloads import at_rest, small
from trimaran.engine.engine import Engine
from trimaran.engine.request import EngineSettings, Request
from trimaran.engine.row import Output
from trimaran.engine.sampler import Sampling


def asked(count: int = 5) -> list[Request]:
    dice = random.Random(3)
    sampling = Sampling(temperature=0.8, max_tokens=14, ignore_eos=True, logprobs=True)
    return [
        Request(tuple(dice.randrange(97) for _ in range(length)), sampling.replace(seed=length))
        for length in (1, 17, 33, 60, 90)[:count]
    ]


def half(**chosen: object) -> Engine:
    settings = EngineSettings(**{"rows": 6, "page": 8, "ssm_dtype": "float16", **chosen})
    return Engine(small("everything", 97), settings=settings)


@torch.no_grad()
def distance(engine: Engine, request: Request, output: Output) -> float:
    """The largest distance of the engine's log-probabilities from those of one pass over the text."""
    text = torch.tensor([[*request.prompt, *output.tokens]])
    exact = engine.model(text)[0, len(request.prompt) - 1 : -1].log_softmax(-1)
    exact = exact[range(len(output.tokens)), output.tokens]
    return float((exact - torch.tensor(output.logprobs, dtype=exact.dtype)).abs().max())


def test_answers_do_not_depend_on_company_or_on_a_hit():
    """Chances are drawn by layer and place, and a snapshot is a copy. In fp64, so that sums in another order turn no
    rounding."""
    engine = half()
    together = list(engine.generate(asked()))
    again = list(engine.generate(asked()))
    alone = [next(iter(half(rows=1).generate([one]))) for one in asked()]
    assert [one.cached for one in again] == [len(one.prompt) - 1 for one in asked()]
    for one, hit, other in zip(together, again, alone, strict=True):
        assert one.tokens == hit.tokens == other.tokens
        assert one.logprobs == pytest.approx(hit.logprobs, abs=1e-9)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-9)
    at_rest(engine)


@pytest.mark.parametrize(("drafter", "tokens"), [("none", 512), ("none", 7), ("mtp", 512), ("lookup", 40)])
def test_answers_are_as_near_as_half_precision_is(drafter, tokens):
    """Read in chunks, token by token, drafted or not: only the places where states are rounded differ."""
    engine = half(drafter=drafter, tokens_per_pass=tokens, draft=3 if drafter != "none" else 0)
    outputs = list(engine.generate(asked()))
    off = [distance(engine, *pair) for pair in zip(asked(), outputs, strict=True)]
    assert engine.memory.ssm.dtype is torch.float16
    assert 1e-9 < max(off) < 1e-2, "half a thousandth of a state at every write, seen through all layers"
    exact = Engine(engine.model, settings=engine.settings.replace(ssm_dtype="model"))
    assert exact.memory.unit.ssm == 4 * engine.memory.unit.ssm
    pairs = zip(asked(), exact.generate(asked()), strict=True)
    assert max(distance(exact, *pair) for pair in pairs) < 1e-9
    at_rest(engine)
