"""The extension stage: weights and tokenizer of the start, lengths that take turns, what is measured and refused."""

import json
import random
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

import trimaran
from tests.models import tiny
from tests.train.runs import WORDS, command, environment, read_recipe
from trimaran import cli, config
from trimaran.errors import Refusal
from trimaran.model.hub import read_config
from trimaran.report import read_metrics
from trimaran.tasks.recall import Recall
from trimaran.text.tokenizer import Tokenizer
from trimaran.train import pretrain
from trimaran.train.extend import Extension
from trimaran.train.extend_recipe import ExtendRecipe
from trimaran.train.loop import fit
from trimaran.train.recall import recalled

LENGTHS = {"phases": [{"lengths": [{"sequence_length": 32}, {"sequence_length": 128, "share": 3}]}]}
RECALL = {"far": {"words": 60, "facts": 4, "repeats": 6, "names": 8, "count": 60}}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A run folder of pretraining in rows of 32."""
    folder = tmp_path_factory.mktemp("start")
    assert pretrain.main(read_recipe(folder, steps=4)) == 0
    return folder / "run"


@pytest.fixture
def book(tmp_path) -> Path:
    """A few long documents, and one to hold out."""
    chance = random.Random(1)
    texts = [" ".join(chance.choices(WORDS, k=400)) for _ in range(6)]
    (tmp_path / "book.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return tmp_path / "book.jsonl"


def recipe(start: Path, book: Path, *overrides: str) -> ExtendRecipe:
    tables = {
        "stage": "extend",
        "start": str(start),
        "run": str(book.parent / "run"),
        "data": {
            "path": str(book),
            "sequence_length": 32,
            "held_out": 0.2,
            "mixture": LENGTHS,
            "recall": RECALL,
        },
        "train": {"steps": 8, "batch_size": 8, "lr": 1e-4, "checkpoint_every": 4},
    }
    tables["data"]["held_out_recall"] = 3
    return ExtendRecipe(**config.override(tables, overrides))


def test_a_run_begins_with_the_weights_and_the_tokenizer_of_its_start(start, book):
    (book.parent / "run").mkdir()
    run = Extension(recipe(start, book)).begin()
    old = trimaran.load(start).state_dict()
    assert all(torch.equal(tensor, old[name]) for name, tensor in run.model.state_dict().items())
    assert not run.optimizer.state and run.step == 0
    assert run.tokenizer.digest == trimaran.load_tokenizer(start).digest


def test_lengths_take_turns_at_constant_tokens_and_a_constant_rate(start, book):
    """Two rows of 128 or eight of 32: never both in a step."""
    extension = Extension(recipe(start, book))
    (book.parent / "run").mkdir()
    run = extension.begin()
    shapes = Counter(tuple(next(run.loader).tokens_BT.shape) for _ in range(8))
    assert shapes == {(8, 32): 2, (2, 128): 6}
    assert {run.settings.schedule()(step) for step in range(8)} == {1e-4}


def test_the_command_leaves_a_model_that_knows_how_long_it_was_trained(start, book, capsys):
    path = book.parent / "long.toml"
    config.write(recipe(start, book), path)
    for _ in range(2):  # the second time it is finished
        with pytest.raises(SystemExit) as left:
            cli.main(["train", str(path)])
        assert left.value.code in (0, None)
    out = capsys.readouterr().out
    assert "rows of 128" in out and "is finished" in out
    folder = book.parent / "run"
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["tokens"] for line in lines] == [256 * step for step in range(1, 9)]
    assert {line["lr"] for line in lines} == {1e-4}
    result = json.loads((folder / "result.json").read_text())
    for when in ("before", "after"):
        assert result[when]["text"].keys() == {"32", "128"} and result[when]["recall"].keys() == {"far"}
    assert result["before"] == json.loads((folder / "before.json").read_text())
    assert result["before"]["text"] != result["after"]["text"]
    assert result["after"]["text"]["32"] == pytest.approx(lines[-1]["bits_per_byte"])
    assert read_config(start).max_position_embeddings == 4096 == read_config(folder).max_position_embeddings
    old, new = trimaran.load(start).state_dict(), trimaran.load(folder).state_dict()
    assert old.keys() == new.keys() and any(not torch.equal(old[name], new[name]) for name in old)


def test_the_longest_row_is_noted_where_it_is_longer_than_the_model_was_for(start, book):
    short = book.parent / "short"
    shutil.copytree(start, short)
    written = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(written | {"max_position_embeddings": 64}))
    (book.parent / "run").mkdir()
    assert Extension(recipe(short, book)).begin().model.config.max_position_embeddings == 128


def test_a_run_that_stopped_ends_as_one_that_did_not(start, book):
    one = recipe(start, book)
    (book.parent / "run").mkdir()
    whole = Extension(one).begin()
    assert fit(whole) == 0
    (whole.checkpoints / "LATEST").write_text("step-4\n")
    shutil.rmtree(whole.checkpoints / "step-8")
    again = Extension(one).begin()
    assert fit(again) == 0 and again.step == 8
    pairs = zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["start=nowhere"], "start = 'nowhere' is no folder"),
        (["data.recall={}", "data.path=LINES"], "but the longest document has"),
        (["data.mixture.phases.0.lengths.1.sequence_length=96"], "does not divide a step of 256"),
        (["data.mixture.weights.far=1", "data.mixture.weights.near=1"], "unknown source 'near'"),
        (["data.recall.text={count=3}"], "recall.text beside text of that name"),
        (["data.recall.far.count=0"], "data.recall.far.count = 0"),
        (["data.recall.far.facts=9"], "2 to names = 8"),
        (["parallel.fsdp=4"], "2 rows of 128 in a step; allowed: a multiple of replicate x fsdp = 4"),
        (["tokenizer.vocab_size=9"], "unknown key 'tokenizer"),
    ],
)
def test_what_cannot_be_extended_is_refused(start, book, overrides, told):
    lines = book.with_name("lines.jsonl")
    lines.write_text("".join(f'{{"text": "{word}"}}\n' for word in WORDS * 9))
    (book.parent / "run").mkdir()
    with pytest.raises(Refusal, match=told.replace("'", ".")):
        Extension(recipe(start, book, *(word.replace("LINES", str(lines)) for word in overrides))).begin()


# key recall, read at its end


def test_what_a_model_says_is_compared_with_the_value():
    """A model that says one word whatever it reads is right where that is the value."""
    task = Recall(words=30, facts=2, repeats=2, names=2)
    tokenizer = Tokenizer.train([task.document(number) for number in range(50)], 400)
    values = [task.prompt(number, "held_out").secret["value"] for number in range(20)]
    model = tiny("dense", torch.float32, pattern="--", vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        model.backbone.embeddings.weight.fill_(1.0)  # all tokens alike, so that the hidden vector is always the same
        for value in sorted(set(values)):
            [said] = tokenizer.encode(f" {value}")
            model.lm_head.weight.zero_()[said] = model.hidden(torch.tensor([[0]]))[0, 0]
            assert recalled(model, tokenizer, task, 20) == values.count(value) / 20
    assert len(set(values)) == 2


@pytest.mark.slow
def test_two_processes_end_where_one_does(start, book):
    """The same command with parallel.fsdp=2: the same text, order and, but for rounding, weights."""
    path = book.parent / "long.toml"
    config.write(recipe(start, book), path)
    for name, words in (("one", ()), ("two", ("parallel.fsdp=2",))):
        told = subprocess.run(
            [*command(path, f"run={book.parent / name}", *words)], capture_output=True, text=True, env=environment()
        )
        assert told.returncode == 0, told.stderr
    one, two = (trimaran.load(book.parent / name).state_dict() for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
    result = json.loads((book.parent / "two" / "result.json").read_text())
    assert "after" not in result and "measured on one process" in told.stdout
