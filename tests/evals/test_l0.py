"""L0-Bench as a suite: rows along its axes, figures against their definitions, the verb from folder to picture."""

import json
from functools import cache
from itertools import combinations
from random import Random

import pytest

from trimaran.errors import Refusal
from trimaran.evals.l0 import SLACK, THOUGHT, L0Bench
from trimaran.evals.l0_figures import alive, by_thought, figures, majority, table
from trimaran.evals.run import main
from trimaran.evals.suites import Context, Result, suite
from trimaran.evals.tally import score_of
from trimaran.model import hub
from trimaran.tasks.l0 import BINS, L0
from trimaran.tasks.task import REWARD, Trace
from trimaran.text.tokenizer import Tokenizer

SMALL = L0(steps=13, demonstrations=1)


@cache
def problem(task, number):
    return task.prompt(number, "held_out")


def record(task, number, sample, said, mode="sampled", thought=0):
    """What the runner writes of an answer."""
    prompt = problem(task, number)
    message = {"role": "assistant", "content": said(prompt.secret["trace"])}
    return {
        "mode": mode, "number": number, "sample": sample, "scores": task.score(Trace(prompt, (message,))),
        "finish": "stop", "tokens": 9, "thought_tokens": thought, "prompt": list(prompt.messages), "tools": [],
        "messages": [message], "error": None,
    }  # fmt: skip


def right(trace):
    return "\n".join(["```", *trace, "```"])


def wrong_at(place):
    return lambda trace: "\n".join([*trace[: place - 1], "L1,x:1", *trace[place:]])


def test_figures_of_answers_whose_worth_is_known():
    answers = [
        [right, right, wrong_at(3), wrong_at(3), wrong_at(3)],
        [wrong_at(2), right, right, wrong_at(4), right],
        [lambda trace: "no idea"] * 5,
        [right] * 5,
    ]
    records = [record(SMALL, n, s, said) for n, of in enumerate(answers) for s, said in enumerate(of)]
    found = figures(records[::-1], [1, 2, 3, 5, 15])
    assert found["greedy"] is None and found["n"] == 4
    sampled = found["sampled"]
    assert sampled["cut"] == 0
    assert sampled["accuracy"] == pytest.approx((2 / 5 + 3 / 5 + 0 + 1) / 4)
    assert sampled["samples"] == 5 and sampled["pass_at"].keys() == {1, 2, 3, 5} == sampled["majority"].keys()
    for k, chance in sampled["pass_at"].items():  # over all ways to take k of the five
        worth = [[float(one["scores"][REWARD]) for one in records if one["number"] == n] for n in range(4)]
        assert chance == pytest.approx(sum(max(some) for w in worth for some in combinations(w, k)) / 4 / len(
            list(combinations(range(5), k))))  # fmt: skip
    # first of all | the first of two that differ | two of three | three of five
    assert sampled["majority"] == {1: 2 / 4, 2: 2 / 4, 3: 3 / 4, 5: 2 / 4}
    steps = [one["scores"]["steps_to_error"] for one in records]
    assert sampled["steps_to_error"] == pytest.approx(sum(steps) / 20)
    assert sampled["interval"][0] <= sampled["accuracy"] <= sampled["interval"][1]


def test_votes_are_for_whole_traces_however_they_are_spaced():
    spaced = [right, lambda trace: "Here:\n" + "\n".join(line.replace(",", ", ") for line in trace) + "\n```"]
    others = [wrong_at(2), wrong_at(3), wrong_at(2)]
    records = [record(SMALL, 0, s, said) for s, said in enumerate([*others[:2], *spaced])]
    assert majority(records) == 1 and majority(records[:3]) == 0
    assert majority([record(SMALL, 0, s, said) for s, said in enumerate([*spaced, *others, wrong_at(2)])]) == 0


def test_alive_falls_where_answers_go_wrong():
    said = [right, wrong_at(1), wrong_at(5), wrong_at(5)]
    records = [record(SMALL, number, 0, one) for number, one in enumerate(said)]
    curve = dict(alive(records))
    least = int(min(one["scores"]["steps"] for one in records))
    assert [curve[step] for step in (1, 4, 5, least)] == [3 / 4, 3 / 4, 1 / 4, 1 / 4]
    assert max(curve) == max(one["scores"]["steps"] for one in records)


def test_by_thought_parts_the_answers_in_quarters():
    order = Random(0).sample(range(8), 8)
    records = [record(SMALL, n, 0, right if n > 3 else wrong_at(2), thought=100 * n) for n in order]
    assert by_thought(records) == [(50, 0), (250, 0), (450, 1), (650, 1)]
    assert by_thought([record(SMALL, n, 0, right) for n in range(8)]) == []


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    return str(tmp_path)


def test_rows_differ_in_one_thing_and_none_is_there_twice(folder, tokenizer):
    bench = L0Bench(
        demonstrations=[1, 4], depths=[2], lists=[[2, 4]], lines=[[20, 50]], budgets=[50], thinking=True, max_tokens=9
    )
    rows = bench.rows(Context(folder))
    base = rows["steps-80"].task
    assert list(rows) == [*(f"steps-{steps}" for steps in BINS), "demonstrations-1", "lines-20-50", "depth-2",
                          "lists-2-4", "budget-50"]  # fmt: skip
    changed = {"demonstrations-1": "demonstrations", "depth-2": "depth", "lists-2-4": "lists", "lines-20-50": "lines"}
    for name, field in changed.items():
        task = rows[name].task
        assert [one for one in L0.model_fields if getattr(task, one) != getattr(base, one)] == [field]
    assert rows["budget-50"].task == base and rows["budget-50"].play["budget"] == 50
    plain = L0Bench(bins=[13], task=SMALL).rows(Context(folder))["steps-13"]
    assert plain.play["thinking"] is False and plain.task.thinking is False


def test_answers_have_room_for_their_traces_and_thoughts_for_twenty(folder, tokenizer):
    bench = L0Bench(bins=[80, 246], task=SMALL)
    plain, thoughtful = (one.rows(Context(folder)) for one in (bench, bench.replace(thinking=True)))
    for name, row in plain.items():
        room = row.play["max_tokens"]
        assert thoughtful[name].play["max_tokens"] - SLACK == THOUGHT * (room - SLACK)
        for number in range(8, 16):  # others than those that were measured
            assert len(tokenizer.encode(row.task.gold(problem(row.task, number))[0]["content"])) < room


def test_a_report_has_all_rows_and_says_which_failed(folder):
    bench = L0Bench(bins=[13, 16], at=13, task=SMALL, demonstrations=[1, 2], lists=[[2, 4]], votes=[1, 3], max_tokens=9)
    rows, results = bench.rows(Context(folder)), {}
    for number, (name, row) in enumerate(rows.items()):
        records = [
            record(row.task, n, s, right if (n + s) % (number + 2) else wrong_at(4), mode, 10 * n * s)
            for n in range(4)
            for mode, samples in (("greedy", 1), ("sampled", 3))
            for s in range(samples)
        ]
        results[name] = Result(score_of(name, records, 0), records)
    broken = record(SMALL, 9, 0, right, "greedy") | {"error": "Traceback: a leak", "scores": {}}
    records = [*results["steps-13"].records, broken]
    results["steps-13"] = Result(score_of("steps-13", records, 0), records)
    fault = Refusal("too long a prompt", "less", "more memory")
    report = bench.report(Context(folder), results | {"steps-16": Result(None, fault=fault)})
    document = json.loads(json.dumps(report.document))
    assert document["axes"]["demonstrations"] == [{"value": "1", "row": "steps-13"},
                                                  {"value": "2", "row": "demonstrations-2"}]  # fmt: skip
    assert document["figures"].keys() == {"steps-13", "demonstrations-2", "lists-2-4"}
    assert document["figures"]["steps-13"]["failed"] == 1 and document["figures"]["steps-13"]["n"] == 4
    assert "too long" in document["faults"]["steps-16"] and "steps-16: too long a prompt" in report.text
    assert len(report.text.splitlines()) == 1 + 4 + 1  # a header, a line for each point, a fault
    titles = [axes.get_title(loc="left") for axes in report.picture.axes]
    assert len(titles) == 6 and sum(axes.has_data() for axes in report.picture.axes) >= 5
    nothing = bench.report(Context(folder), {name: Result(None, fault=fault) for name in rows})
    assert nothing.picture is None and nothing.text.count("too long") == len(rows)


def test_a_table_shows_greedy_answers_first():
    records = [record(SMALL, 0, 0, right, "greedy"), record(SMALL, 0, 0, wrong_at(2))]
    text = table({"steps": [{"value": "20", "row": "a"}]}, {"a": {**figures(records, [1]), "failed": 0}})
    assert text.splitlines()[1].split()[2:5] == [str(len(problem(SMALL, 0).secret["trace"])), "1", "100.0%"]


@pytest.mark.parametrize(("settings", "said"), [
    ({"budgets": [5]}, "thinking"), ({"votes": [0]}, "votes"), ({"bins": []}, "bins"), ({"bin": [5]}, "bin"),
    ({"task": {"step": 4}}, "step"), ({"votes": [1], "thinking": True, "budgets": [-1]}, "budgets"),
])  # fmt: skip
def test_settings_that_are_refused(settings, said):
    with pytest.raises(Refusal, match=said):
        suite("l0", settings)


def test_without_a_tokenizer_the_length_of_answers_has_to_be_said(tmp_path):
    with pytest.raises(Refusal, match="no tokenizer"):
        L0Bench(bins=[13], task=SMALL).rows(Context(str(tmp_path)))
    rows = L0Bench(bins=[13], task=SMALL, max_tokens=77).rows(Context(str(tmp_path)))
    assert rows["steps-13"].play["max_tokens"] == 77


def test_rows_that_no_program_meets_are_faults_of_their_own(folder):
    bench = L0Bench(bins=[13, 80, 3], depths=[0], lines=[[60, 90]], at=75)
    rows = bench.rows(Context(folder))
    faults = {name: str(row.task) for name, row in rows.items() if isinstance(row.task, Refusal)}
    assert faults.keys() == {"steps-3", "depth-0", "lines-60-90"}  # by the settings alone, and by drawing
    assert "steps" in faults["steps-3"] and "without loops" in faults["depth-0"] and "lines" in faults["lines-60-90"]
    assert rows["steps-80"].play["max_tokens"] > SLACK


def test_the_verb_from_folder_to_picture(model, tmp_path, capsys):
    tokenizer = Tokenizer.train(
        ["L2,x:1\nL3,\nL4,lst_x:[1,2]\nfunction(x=1, cond_a=True)"] * 5, model.config.vocab_size
    )
    hub.save(model, tmp_path)
    tokenizer.save(tmp_path)
    words = ["n=2", "samples=2", "suites.l0.max_tokens=4", "dtype=float64", "engine.memory_bytes=33554432"]
    words += [
        "suites.l0.bins=[13]",
        "suites.l0.at=13",
        "suites.l0.demonstrations=[0]",
        "suites.l0.task.demonstrations=1",
    ]
    words += ["suites.l0.votes=[1,2]"]
    assert main(str(tmp_path), words, "l0", json=True) == 0
    found = json.loads(capsys.readouterr().out)["suites"]["l0"]
    assert found["rows"].keys() == {"steps-13", "demonstrations-0"}
    assert found["figures"]["steps-13"]["sampled"]["majority"].keys() == {"1", "2"}
    assert found["figures"]["steps-13"]["n"] == 2 and len(list(tmp_path.glob("scores/l0-*/l0.png"))) == 1
    before = {path: path.read_bytes() for path in tmp_path.glob("scores/*/records.jsonl")}
    assert len(before) == 2 and main(str(tmp_path), words, "l0") == 0
    assert {path: path.read_bytes() for path in tmp_path.glob("scores/*/records.jsonl")} == before
    assert "steps to error" in capsys.readouterr().out
    assert main(str(tmp_path), [*words, "suites.l0.depths=[0]", "suites.l0.lines=[[20,23]]"], "l0", json=True) == 1
    found = json.loads(capsys.readouterr().out)["suites"]["l0"]
    assert found["faults"].keys() == {"lines-20-23"} and "steps" in found["rows"]["lines-20-23"]["error"]
