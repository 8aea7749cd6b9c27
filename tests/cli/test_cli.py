"""The command line as its users meet it: help without torch, one-line refusals, exit codes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trimaran import cli
from trimaran.cli import STAGES, VERBS, Option, Stage, Verb
from trimaran.errors import Refusal

HEAVY = {"torch", "numpy", "transformers", "triton", "matplotlib", "tokenizers", "safetensors", "pydantic"}


def trimaran(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "trimaran", *words], capture_output=True, text=True, **options)


def imported_by(*arguments: str) -> set[str]:
    """Top-level packages that a Python process imports, read from -X importtime."""
    ran = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True)
    names = re.findall(r"^import time:[^|]*\|[^|]*\|\s*(\S+)$", ran.stderr, re.MULTILINE)
    assert "trimaran" in names
    return {name.split(".")[0] for name in names}


def test_help_and_import_bring_in_nothing_heavy():
    assert not imported_by("-m", "trimaran", "--help") & HEAVY
    assert not imported_by("-c", "import trimaran; trimaran.__version__") & HEAVY


def test_help_lists_every_verb_whole():
    shown = trimaran("--help", env={**os.environ, "COLUMNS": "80"})
    assert shown.returncode == 0
    for name, verb in VERBS.items():
        assert f"  {name} " in shown.stdout
        assert verb.summary in shown.stdout, "the summary must fit its line"
    assert trimaran().stdout.startswith("Usage: trimaran")
    assert re.fullmatch(r"trimaran \d+\.\d+\.\d+\n", trimaran("--version").stdout)


def run_main(capsys, *words: str) -> tuple[int, str, str]:
    """The command line inside this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


@pytest.mark.parametrize("name", VERBS)
def test_help_of_every_verb_ends_with_two_examples(capsys, name):
    code, out, _ = run_main(capsys, name, "-h")
    last = out.rstrip().splitlines()[-2:]
    assert code == 0
    assert [line.strip() for line in last] == list(VERBS[name].examples)
    assert all(line.strip().startswith(f"trimaran {name}") for line in last)


@pytest.mark.parametrize("name", VERBS)
def test_summaries_are_sentences(name):
    assert len(VERBS[name].summary) <= 66
    assert VERBS[name].summary.endswith(".") and VERBS[name].about.endswith(".")


def test_an_unknown_verb_gets_the_nearest():
    ran = trimaran("trian", "x.toml")
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("trimaran: unknown verb 'trian'; allowed: train, ")
    assert "did you mean: trimaran train?" in ran.stderr


SEEN: list = []


def record(target, overrides, *args, **flags):
    SEEN.append((target, overrides, args, flags))
    return 7 if target == "seven" else None


def refuses(target, overrides):
    raise Refusal("a red\nboat", "a blue one", "paint it")


def breaks(target, overrides):
    raise RuntimeError("a bug")


def interrupted(target, overrides):
    raise KeyboardInterrupt


@pytest.fixture
def verbs(monkeypatch):
    """A few verbs of this file's own, in the real table."""
    rows = {
        "note": Verb(f"{__name__}:record", "Note.", "", ("", ""), "PLACE", ("WORD",), {"json": "As JSON."}),
        "alone": Verb(f"{__name__}:record", "Alone.", "", ("", "")),
        "sized": Verb(f"{__name__}:record", "Sized.", "", ("", ""), options={"at-most": Option("N", "So many.")}),
        "refuses": Verb(f"{__name__}:refuses", "Refuse.", "", ("", "")),
        "breaks": Verb(f"{__name__}:breaks", "Break.", "", ("", "")),
        "interrupted": Verb(f"{__name__}:interrupted", "Stop.", "", ("", "")),
    }
    SEEN.clear()
    for name, row in rows.items():
        monkeypatch.setitem(VERBS, name, row)


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["note", "here"], ("here", [], (), {"json": False})),
        (["note", "here", "a.b=1", "c==d", "--json"], ("here", ["a.b=1"], ("c==d",), {"json": True})),
        (["note", "a.b=-1", "here", "c=2"], ("here", ["a.b=-1", "c=2"], (), {"json": False})),
        (["note", "here", "a=1", "--", "--json"], ("here", ["a=1"], ("--json",), {"json": False})),
        (["note", "here", "--", "a=1"], ("here", [], ("a=1",), {"json": False})),
        (["alone", "a=1"], (None, ["a=1"], (), {})),
        (["sized"], (None, [], (), {"at_most": None})),
        (["sized", "--at-most", "tp=2,pp=1", "a=1"], (None, ["a=1"], (), {"at_most": "tp=2,pp=1"})),
    ],
)
def test_words_are_sorted_by_their_shape(capsys, verbs, words, seen):
    code, _, err = run_main(capsys, *words)
    assert (code, err) == (0, "")
    assert len(SEEN) == 1 and SEEN[0] == seen


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["note"], "PLACE"),
        (["note", "a=1"], "trimaran: note without a target; allowed: trimaran note PLACE"),
        (["note", "here", "one", "two"], "trimaran: 'two' after trimaran note; allowed: dotted.key=value or one WORD"),
        (["alone", "word"], "trimaran: 'word' after trimaran alone; allowed: dotted.key=value"),
        (["note", "here", "--jsn"], "--json"),
        (["sized", "--at-most"], "--at-most"),
        (["refuses"], "trimaran: a red boat; allowed: a blue one; next: paint it\n"),
    ],
)
def test_what_cannot_be_sorted_or_done_exits_2(capsys, verbs, words, said):
    code, out, err = run_main(capsys, *words)
    assert (code, out) == (2, "")
    assert said in err
    assert SEEN == []


def test_the_functions_answer_is_the_exit_code(capsys, verbs):
    assert run_main(capsys, "note", "seven")[0] == 7


def test_a_reader_that_leaves_is_no_error():
    """`trimaran show … | head -1`: no traceback, and the exit code that shells give a closed pipe."""
    command = f"{sys.executable} -u -m trimaran show super-3 --json"
    process = subprocess.Popen(command.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(), err) == (141, "")


def test_an_interrupt_exits_130_with_a_plain_line(capsys, verbs):
    code, _, err = run_main(capsys, "interrupted")
    assert (code, err.strip()) == (130, "trimaran: interrupted")


def test_a_full_disk_is_told_on_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "trimaran", "show", "nano-3", "--json"]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith("trimaran: the disk is full at the output; allowed: ")


def test_a_bug_keeps_its_traceback(verbs):
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["breaks"])


def test_a_real_interrupt_of_a_real_process(tmp_path):
    (tmp_path / "waits.py").write_text(
        "import sys, time\n"
        "from trimaran.cli import VERBS, Verb, main\n"
        "def wait(target, overrides):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "VERBS['wait'] = Verb('__main__:wait', '', '', ('', ''))\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, tmp_path / "waits.py", "wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits deafness
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err.strip()) == (130, "trimaran: interrupted")


RECIPE = """stage = "note"
run = "here"
[train]
steps = 3
"""
STAGE = """from trimaran.config import Settings

class Train(Settings):
    steps: int = 1

class Recipe(Settings):
    stage: str
    run: str
    train: Train = Train()

def main(recipe):
    print(recipe.model_dump_json())
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "note_stage.py").write_text(STAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(STAGES, "note", Stage("note_stage:Recipe", "note_stage:main"))
    return tmp_path / "recipe.toml"


def test_train_reads_its_recipe_and_picks_the_stage(capsys, recipe):
    code, out, _ = run_main(capsys, "train", str(recipe), "train.steps=9")
    assert code == 0
    assert json.loads(out) == {"stage": "note", "run": "here", "train": {"steps": 9}}
    assert run_main(capsys, "train", str(recipe.parent))[0] == 0, "a folder that holds a recipe.toml"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepz=9", "unknown key 'train.stepz'; allowed: steps; next: did you mean train.steps?"),
        ("train.steps=many", "train.steps = 'many'; allowed: an integer;"),
        ("stage=pretrian", "unknown stage 'pretrian'; allowed: pretrain, "),
    ],
)
def test_train_refuses_before_anything_is_started(capsys, recipe, override, said):
    code, out, err = run_main(capsys, "train", str(recipe), override)
    assert (code, out) == (2, "")
    assert said in err and err.count("\n") == 1


def test_train_refuses_what_is_no_recipe(capsys, tmp_path, recipe):
    code, _, err = run_main(capsys, "train", str(tmp_path / "recip.toml"))
    assert code == 2 and "did you mean" in err and "recipe.toml?" in err
    recipe.write_text('run = "here"\n')
    code, _, err = run_main(capsys, "train", str(recipe))
    assert code == 2 and "has no stage" in err
