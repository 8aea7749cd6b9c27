"""The engine's benchmarks keep their own rules: no speed without agreement, no leak unseen, formulas by hand."""

import importlib
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.models import tiny
from trimaran import Sampling
from trimaran.engine.plain import generate
from trimaran.engine.sampler import Law, draw, key_of, uniform

FOLDER = Path(__file__).parents[2] / "benchmarks"
PROMPT = (5, 6, 7)
GREEDY = Sampling(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def scripts():
    """`engine_cases`, `engine` and `serve_load` as scripts of that folder see them."""
    before, names = list(sys.path), ("engine_cases", "engine", "serve_load")
    sys.path.insert(0, str(FOLDER))
    yield {name: importlib.import_module(name) for name in names}
    sys.path[:] = before
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def cases(scripts) -> ModuleType:
    return scripts["engine_cases"]


@pytest.fixture(scope="module")
def load(scripts) -> ModuleType:
    return scripts["serve_load"]


@pytest.fixture(scope="module")
def model():
    return tiny("latent", torch.float32)


def test_the_same_tokens_agree_and_all_are_counted(cases, model):
    said = generate(model, [PROMPT], GREEDY)[0].tokens
    assert cases.agreement(model, [cases.Text(PROMPT, GREEDY)], [said], [said]) == {"compared": 6, "ties": 0}


@pytest.mark.parametrize("place", [0, 5])
def test_another_token_is_red(cases, model, place):
    said = generate(model, [PROMPT], GREEDY)[0].tokens
    other = [*said[:place], (said[place] + 1) % 97, *said[place + 1 :]]
    with pytest.raises(cases.Red, match=f"token {place}"):
        cases.agreement(model, [cases.Text(PROMPT, GREEDY)], [said], [other])


def test_an_answer_cut_short_and_one_too_few_are_red(cases, model):
    said = generate(model, [PROMPT], GREEDY)[0].tokens
    text = cases.Text(PROMPT, GREEDY)
    with pytest.raises(cases.Red, match="5 tokens"):
        cases.agreement(model, [text], [said[:5]], [said])
    with pytest.raises(cases.Red, match="0 texts"):
        cases.agreement(model, [text], [], [said])


class Even(torch.nn.Module):
    """Two tokens that are as likely as one another, and two that are not likely."""

    def forward(self, tokens):
        return torch.tensor([0.0, 1.0, 1.0 - 5e-5, 0.5]).expand(*tokens.shape, 4)


def test_texts_may_part_where_two_tokens_are_as_likely(cases):
    text = cases.Text(PROMPT, GREEDY)
    assert cases.agreement(Even(), [text], [[1, 1, 2]], [[1, 2, 0]]) == {"compared": 1, "ties": 1}
    with pytest.raises(cases.Red):
        cases.agreement(Even(), [text], [[1, 1]], [[1, 3]])


def test_draws_may_part_at_the_border_of_two_tokens_only(cases, monkeypatch):
    sampling = Sampling(temperature=1.0, seed=3)
    text = cases.Text(PROMPT, sampling)
    law = Law.of([sampling]).probabilities(Even()(torch.zeros(1, 1))[0])
    number = uniform(key_of(3, 0, PROMPT), 0)
    drawn = int(draw(law, [number]))
    assert cases.parting(Even(), text, [], (drawn, drawn)) == 0
    assert cases.parting(Even(), text, [], (drawn, (drawn + 1) % 4)) == 1
    border = float(law[0, :2].sum())  # a number just short of it gives token 1, just past it token 2
    monkeypatch.setattr(cases, "uniform", lambda key, place: border - 1e-5)
    assert cases.parting(Even(), text, [], (1, 2)) == 0
    assert cases.parting(Even(), text, [], (1, 3)) == 1


def test_a_case_that_is_red_tells_no_speed(cases, model):
    texts = [cases.Text(PROMPT, GREEDY)]
    said = generate(model, [PROMPT], GREEDY)[0].tokens
    sides = {"ours": lambda: [said], "right": lambda: [said], "wrong": lambda: [said[::-1]]}
    rows = list(cases.throughput_rows({"concurrent": 1}, model, texts, sides, 2))
    assert {row["peer"]: "red" in row for row in rows} == {"wrong": True, "right": False}
    wrong, right = rows
    assert not {"ours", "theirs", "ratio"} & set(wrong) and right["ours"] > 0 and right["repeats"] == 2


def test_ratios_are_above_one_where_ours_is_quicker(cases):
    ours, theirs = cases.Times([1.0, 9.0, 1.0], [2.0, 2.0, 2.0]), cases.Times([3.0, 3.0, 0.1], [1.0, 1.0, 1.0])
    assert cases.against(ours, theirs) == {"ratio": 3.0, "cpu_ratio": 0.5}


def test_the_formula_of_shared_attention(cases):
    # b = 8, m_c = 512, m_d = 32: 5.67 times less to read
    shared, dense = cases.formula(8, 512, 32, layers=2, key_bytes=10)
    assert shared == 2 * 10 * (512 + 8 * 32) and dense / shared == pytest.approx(5.667, abs=1e-3)
    assert cases.formula(1, 512, 32, 2, 10) == (2 * 10 * 544,) * 2


def test_sharing_reads_what_the_formula_says_and_sees_when_it_does_not(cases, model, monkeypatch):
    prompt = tuple(torch.randint(97, (577,), generator=torch.Generator().manual_seed(0)).tolist())
    row = cases.one_sharing(model, prompt, rows=64, passes=2)
    assert "red" not in row and row["dense_bytes"] > 20 * row["shared_bytes"] and row["compared"] > 64
    monkeypatch.setattr(cases, "formula", lambda *sizes: (1, 1))
    row = cases.one_sharing(model, prompt, rows=2, passes=2)
    assert "red" in row and "shared_ms" not in row


def test_the_two_models_of_the_long_contexts_are_of_one_size(cases):
    from trimaran.model.hybrid import build

    sizes = {
        name: sum(p.numel() for p in build(config, device="meta").parameters()) for name, config in cases.MODELS.items()
    }
    assert sizes["hybrid"] == pytest.approx(sizes["attention"], rel=0.01)
    assert 10e6 < sizes["mixed"] < 30e6


def test_every_case_has_a_panel(scripts):
    assert list(scripts["engine"].PANELS) == list(scripts["engine_cases"].CASES)


# the server under load

PAGE = """# HELP trimaran_running Texts that grow now.
# TYPE trimaran_running gauge
trimaran_running 0
trimaran_waiting 0
trimaran_free_pages 7
trimaran_total_pages 10
trimaran_cached_pages 3
trimaran_free_slots 4
trimaran_total_slots 4
trimaran_free_snapshots 1
trimaran_total_snapshots 2
trimaran_cached_snapshots 1
trimaran_http_answers_total{route="/v1/models",status="200"} 3
"""


def test_a_server_at_rest_has_no_leaks(load):
    found = load.gauges(PAGE)
    assert found["free_pages"] == 7 and not any("answers" in name for name in found)
    assert load.leaks(found, found) == []


@pytest.mark.parametrize("changed", ["running", "waiting", "free_pages", "free_slots", "cached_snapshots"])
def test_a_leak_shows(load, changed):
    start = load.gauges(PAGE)
    assert len(load.leaks(start, start | {changed: start[changed] + 1})) == 1


def test_the_metrics_that_the_load_looks_at_exist(load):
    from trimaran import Engine
    from trimaran.serve.metrics import Metrics

    engine = Engine(tiny("latent", torch.float32))
    found = load.gauges(Metrics().text(engine.stats()))
    assert load.leaks(found, found) == []


def test_memory_that_grows_is_not_flat(load):
    flat = [(float(n), 400 + n % 2) for n in range(300)]
    assert load.fitted(flat)["flat"]
    rising = [(at, size + 0.1 * at) for at, size in flat]
    line = load.fitted(rising)
    assert not line["flat"] and line["slope_mib_per_min"] == pytest.approx(6, rel=0.01)
    warm = [(at, size + (50 if at > 20 else 0)) for at, size in flat]  # once, at the beginning
    assert load.fitted(warm)["flat"]


def test_plans_leave_about_as_often_as_promised(load):
    chance = random.Random(0)
    plans = [load.plan(chance, [("a", "b")]) for _ in range(4000)]
    assert 0.08 < sum(one.leave is not None for one in plans) / len(plans) < 0.12
    assert {(one.chat, one.streamed) for one in plans} == {(a, b) for a in (True, False) for b in (True, False)}
    assert all(one.leave is None for one in plans if one.expected is not None)
    assert any(one.leave == -1 for one in plans) and any(one.leave == 0 for one in plans)


USAGE = {"completion_tokens": 2}


@pytest.mark.parametrize(
    ("text", "reason", "usage"),
    [("b", None, USAGE), ("b", "stop", None), ("b", "stop", {"completion_tokens": 99}), ("c", "stop", USAGE)],
)
def test_a_wrong_answer_is_an_error(load, text, reason, usage):
    one = load.Plan(load.probe_body("a"), chat=True, expected="b")
    load.check(one, "b", "stop", USAGE)
    with pytest.raises(load.Broken):
        load.check(one, text, reason, usage)


def test_every_failure_makes_the_run_red(load):
    at_rest = load.gauges(PAGE)
    good = {"errors": {}, "start": at_rest, "end": at_rest, "exit_code": 0, "tracebacks": 0, "seconds": 300}
    good["memory"] = {"flat": True}
    assert load.failures(good) == []
    for change in ({"errors": {"x": 1}}, {"exit_code": 1}, {"tracebacks": 1}, {"memory": {"flat": False}}):
        assert len(load.failures(good | change)) == 1
