"""The suite of RULER's thirteen: figures of the paper, and a real run over a small folder."""

import json

import pytest

from tests.evals.test_suites import saved
from tests.models import tiny
from trimaran.errors import Refusal
from trimaran.evals.interval import mean_interval
from trimaran.evals.ruler import Ruler, effective, shown, weighted
from trimaran.evals.run import main
from trimaran.evals.suites import Context, Result
from trimaran.evals.tally import Score, Tally
from trimaran.tasks.ruler import PUBLISHED, published
from trimaran.text.tokenizer import Tokenizer

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
LLAMA = (96.5, 95.8, 95.4, 94.8, 88.4, 66.6)  # Llama 3.1 70B in the repository of the paper: 85.5 and 93.7, 64k


def test_the_figures_of_a_published_row():
    assert weighted(LLAMA) == 85.48 and weighted(LLAMA[::-1]) == 93.69
    assert effective(dict(zip(LENGTHS, LLAMA)), 85.6) == 65536
    assert effective({4096: 85.6}, 85.6) is None  # strictly above
    assert effective({4096: 90.0, 8192: None}, 85.6) == 4096 and weighted([90.0, None]) == 30.0
    assert [shown(length) for length in (4096, 1 << 20, 1000)] == ["4k", "1M", "1000"]


def of_reward(reward: float) -> Result:
    low, high = mean_interval([reward, reward], 0)
    tally = Tally(2, 1, reward, low, high, {1: reward}, {}, 5.0, 0.0, {"stop": 1.0}, 0)
    return Result(Score(tally, None, 2))


def test_a_report_leaves_out_what_did_not_fit_and_says_so():
    asked = Ruler(lengths=(1024, 2048), tasks=("cwe", "fwe", "qa_1"))
    results = {name: of_reward(0.875) for name in asked.rows(Context("nowhere", trained=1024))}
    results["cwe-1k"] = Result(None, fault=Refusal("1024", "more", "more"))
    results["fwe-2k"] = of_reward(0.5)
    report = asked.report(Context("nowhere", trained=1024), results)
    found = report.document
    assert found["scores"] == {"1024": {"fwe": 87.5, "qa_1": 87.5}, "2048": {"cwe": 87.5, "fwe": 50.0, "qa_1": 87.5}}
    assert found["averages"] == {"1024": 87.5, "2048": 75.0}
    assert found["effective_length"] is None  # at 1024 a task is missing, 2048 is below the baseline
    assert found["increasing"] == 79.17 and found["decreasing"] == 83.33 and list(found["left_out"]) == ["cwe-1k"]
    lines = report.text.splitlines()
    assert all("1k" in line for line in lines[1:5]) and "2/3" in lines[5] and "effective length below 1k" in lines[6]
    assert lines[7].startswith("cwe-1k: 1024") and report.picture is not None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lengths": []}, "lengths"),
        ({"lengths": [2048, 1024]}, "lengths"),
        ({"tasks": []}, "tasks"),
        ({"tasks": ["niah_single"]}, "RULER task 'niah_single'"),
        ({"tasks": ["vt", "vt"]}, "tasks"),
        ({"essay": "a"}, "essay"),
    ],
)
def test_settings_that_make_no_sense(settings, said):
    with pytest.raises(Refusal) as refusal:
        Ruler(**settings)
    assert said in str(refusal.value)


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_folder_is_scored_at_two_lengths(tmp_path, capsys):
    texts = [published(name, 900).prompt(0).messages[0]["content"] for name in PUBLISHED]
    tokenizer = Tokenizer.train(texts, 1024)
    folder = saved(tiny("mamba", vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "run")
    (folder / "recipe.toml").write_text("[data]\nsequence_length = 256\n")
    words = ["n=1", "suites.ruler.tasks=['vt','niah_single_1','qa_1']", "engine.memory_bytes=33554432"]
    assert main(str(folder), words, "ruler", json=True, lengths="300,1k") == 1  # a row that does not fit
    found = json.loads(capsys.readouterr().out)["suites"]["ruler"]
    assert list(found["rows"]) == [
        f"{name}-{length}" for length in ("300", "1k") for name in ("vt", "niah_single_1", "qa_1")
    ]
    assert list(found["left_out"]) == ["vt-300"] and found["scores"]["1024"].keys() == {"vt", "niah_single_1", "qa_1"}
    assert found["trained_length"] == 256 and found["effective_length"] is None and found["averages"]["1024"] == 0
    assert found["rows"]["vt-1k"]["greedy"]["tokens"] <= 33 and found["rows"]["vt-1k"]["sampled"] is None
    (home,) = folder.glob("scores/ruler-*/ruler.png")
    assert home.stat().st_size > 10_000
    records = {path: path.read_bytes() for path in folder.glob("scores/*/records.jsonl")}
    assert main(str(folder), words, "ruler", lengths="300,1k") == 1
    assert records == {path: path.read_bytes() for path in folder.glob("scores/*/records.jsonl")}
    assert "below 300" in capsys.readouterr().out
