"""`trimaran plan` as its users meet it."""

import json
import re
import tomllib

import pytest

from tests.cli.test_cli import run_main
from trimaran.model.presets import PRESETS
from trimaran.parallel.settings import ParallelSettings
from trimaran.plan.layout import factorings
from trimaran.plan.request import rows_of, source
from trimaran.plan.write import with_section

NAMED = ("--gpus", "8", "--given", "tp=1,pp=1,ep=8,fsdp=8,micro_batch=4", "--global-batch", "512", "--seq", "4096")
RECIPE = """# trimaran train THIS
stage = "pretrain"
run = "runs/x"

[tokenizer]
vocab_size = 512

[model]
size = "150m"   # a comment

[data]
path = "notes"
sequence_length = 512

[train]
steps = 10
batch_size = 64      # rows
accumulate = 2       # ours
lr = 1e-3
precision = "bf16"

[parallel]
tp = 4
"""


def planned(capsys, *words) -> dict:
    code, out, err = run_main(capsys, "plan", *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_one_named_layout_in_json(capsys):
    content = planned(capsys, "nano-3", *NAMED, "--precision", "bf16", "--hardware", "h100")
    assert content["layout"]["ep"] == 8 and content["micro_batches"] == 16
    tokens = 512 * 4096
    assert content["tokens_per_s_per_gpu"] == pytest.approx(tokens / content["step_seconds"] / 8)
    assert sum(content["time"].values()) == pytest.approx(content["step_seconds"])
    assert sum(content["memory"].values()) == content["bytes_per_gpu"]
    assert content["fits"] == (content["bytes_per_gpu"] <= content["usable_bytes"])
    # NeMo AutoModel 26.02 measured 16,789 tokens/s and 328 TFLOP/s there; no figure of this model was fitted.
    assert content["tokens_per_s_per_gpu"] == pytest.approx(16789, rel=0.1)
    assert content["model_tflops_per_gpu"] == pytest.approx(328, rel=0.1)


def test_tables_say_best_next_best_parts_and_reasons(capsys):
    code, out, _ = run_main(capsys, "plan", "nemotron-h-8b", "--gpus", "8", "--seq", "4096", "--global-batch", "32")
    assert code == 0
    content = planned(capsys, "nemotron-h-8b", "--gpus", "8", "--seq", "4096", "--global-batch", "32")
    words = re.sub(r"\s+", " ", out)
    for row in (content, *content["alternatives"]):
        assert f"{row['step_seconds']:.4g}" in words
    for text in ("where a step's time goes", "where a device's memory goes", "why the rest fell out", "together"):
        assert text in words
    times = [row["step_seconds"] for row in (content, *content["alternatives"])]
    assert times == sorted(times) and len(times) == 5
    assert all(row["fits"] for row in (content, *content["alternatives"]))
    assert {row["reason"] for row in content["fell_out"]} >= {"does not fit in memory"}


def test_more_devices_and_better_ones_are_quicker(capsys):
    words = ("nemotron-h-8b", "--seq", "4096", "--global-batch", "16")
    seconds = [planned(capsys, *words, "--gpus", gpus)["step_seconds"] for gpus in ("8", "16")]
    assert seconds == sorted(seconds, reverse=True)
    machines = ("a100", "h100", "b200", "gb200")
    seconds = [planned(capsys, *words, "--gpus", "8", "--hardware", name)["step_seconds"] for name in machines]
    assert seconds == sorted(seconds, reverse=True)


def test_a_recipe_is_planned_and_its_copy_keeps_the_rest(capsys, tmp_path):
    recipe, copy, picture = tmp_path / "r.toml", tmp_path / "planned.toml", tmp_path / "p.png"
    recipe.write_text(RECIPE)
    content = planned(capsys, str(recipe), "--gpus", "4", "--write", str(copy), "--picture", str(picture))
    assert (content["rows"], content["sequence"], content["precision"]) == (64, 512, "bf16")
    tables = tomllib.loads(copy.read_text())
    before = tomllib.loads(RECIPE)
    assert tables["model"] == before["model"] and tables["data"] == before["data"]
    assert "# a comment" in copy.read_text()
    found = ParallelSettings(**tables["parallel"])
    assert found.world == 4
    assert {name: getattr(found, name) for name in ("fsdp", "tp", "ep", "pp", "cp", "replicate")}.items() <= (
        content["layout"].items()
    )
    assert tables["train"]["accumulate"] * max(1, found.micro_batches) == content["micro_batches"]
    assert tables["train"]["recompute"] == content["layout"]["recompute"]
    assert tables["train"] == before["train"] | {key: tables["train"][key] for key in ("accumulate", "recompute")}
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = planned(capsys, str(recipe), "--gpus", "4", "model.size=2m", "train.batch_size=32", "--seq", "1024")
    assert (again["rows"], again["sequence"]) == (32, 1024)


def test_a_preset_leaves_the_sections_alone(capsys, tmp_path):
    given = "pp=2,fsdp=4,micro_batch=2,recompute=full"
    words = ("nano-3", "--gpus", "8", "--given", given, "--global-batch", "64", "--write", str(tmp_path / "w.toml"))
    planned(capsys, *words)
    tables = tomllib.loads((tmp_path / "w.toml").read_text())
    assert tables["parallel"]["micro_batches"] == 8 and tables["train"]["accumulate"] == 1
    assert tables["train"]["recompute"] == "ME*" and set(tables) == {"parallel", "train"}


def test_a_recipe_from_a_folder_that_is_not_here(capsys, tmp_path):
    recipe = tmp_path / "sft.toml"
    recipe.write_text('stage = "sft"\nstart = "models/none"\n[data]\nsequence_length = 4096\n[train]\nbatch_size = 8\n')
    code, _, err = run_main(capsys, "plan", str(recipe), "--gpus", "8")
    assert code == 2 and "name the model: model.preset=" in err
    assert planned(capsys, str(recipe), "--gpus", "8", "model.preset=nemotron-h-8b")["rows"] == 8


def test_rows_of_several_lengths_are_planned_for_the_longest(request):
    recipes = request.config.rootpath / "recipes" / "cluster"
    for name, longest in (("nano", 524288), ("super", 1048576), ("ultra", 1048576)):
        path = recipes / f"{name}-long.toml"
        tables = tomllib.loads(path.read_text())
        found = source(str(path), [f"model.preset={name}-3"])
        assert found.sequence == longest
        assert found.rows * longest == tables["train"]["batch_size"] * tables["data"]["sequence_length"]


def test_the_cluster_recipes_that_pretrain_are_accepted(capsys, request):
    for path in sorted((request.config.rootpath / "recipes" / "cluster").glob("*.toml")):
        tables = tomllib.loads(path.read_text())
        if "sequence_length" in tables.get("data", {}):
            more = () if "model" in tables else ("model.preset=nano-3",)
            code, _, err = run_main(capsys, "plan", str(path), "--gpus", "8", *more, "--json")
            assert code == 0 or "no layout fits" in err or "no legal layout" in err, err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nano-3", "--gpus", "0"), "--gpus 0; allowed: a number from 1 on"),
        (("nano-3", "--gpus", "many"), "--gpus many; allowed: a number"),
        (("nano-3", "--hardware", "h10"), "unknown hardware 'h10'; allowed: h100, "),
        (("nano-3", "--precision", "fp9"), "--precision fp9; allowed: "),
        (("nano-3", "--tokens-per-step", "lots"), "--tokens-per-step lots; allowed: a number that may end with k, M"),
        (("nano-3", "--tokens-per-step", "1M", "--global-batch", "3"), "allowed: one of the two"),
        (("nano", "--gpus", "8"), "unknown model 'nano'"),
        (("deepseek-v3", "--gpus", "8"), "shape-only preset (multi-head latent attention)"),
        (("nano-3", "--gpus", "4", "--given", "tp=2"), "2 devices; allowed: a product of --gpus 4"),
        (("nano-3", "--gpus", "3", "--given", "tp=3"), "tp does not divide the vocabulary"),
        (("nano-3", "--gpus", "16", "--given", "tp=16"), "tp leaves the node"),
        (("nano-3", "--gpus", "16", "--given", "fsdp=16,ep=3"), "ep does not divide the experts"),
        (("llama3-8b", "--gpus", "8", "--given", "fsdp=8,ep=8"), "ep without experts"),
        (("nano-3", "--gpus", "64", "--given", "pp=64"), "pp has more stages than there are layers"),
        (("nano-3", "--gpus", "8", "--given", "fsdp=8", "--global-batch", "12"), "does not divide the rows of a step"),
        (("nano-3", "--gpus", "8", "--given", "fsdp=8,micro=2"), "'micro=2' in --given; allowed: name=value with"),
        (("nano-3", "--gpus", "8", "--given", "fsdp=8,tp=two"), "'tp=two' in --given; allowed: a number"),
        (("nano-3", "--gpus", "8", "--given", "fsdp=8,recompute=MX"), "letters among ME*"),
        (("ultra-3", "--gpus", "8"), "no layout fits on 8 x h100: the closest, "),
        (("nowhere.toml", "--gpus", "8"), "no file 'nowhere.toml'"),
        (("nano-3", "--measure", "mine"), "allowed: a file whose name ends with .json"),
    ],
)
def test_refusals(capsys, words, said):
    code, out, err = run_main(capsys, "plan", *words)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert said in err


def test_a_picture_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "file").touch()
    words = ("nano-3", *NAMED, "--picture", str(tmp_path / "file" / "p.png"))
    code, _, err = run_main(capsys, "plan", *words, "--json")
    assert code == 2 and "cannot write" in err


def test_round_tokens_become_round_rows():
    assert rows_of(25e6, 8192) == 3072
    assert rows_of(4096 * 48, 4096) == 48
    assert rows_of(100, 8192) == 1
    assert rows_of(5e4, 8192) == 6


def test_sections_are_replaced_and_added():
    text = "a = 1\n\n[train]\nsteps = 3  # few\nlr = 1\n\n[data]\npath = 'x'\n"
    changed = with_section(text, "train", {"lr": 2, "recompute": "M"})
    assert tomllib.loads(changed) == {
        "a": 1,
        "train": {"steps": 3, "lr": 2, "recompute": "M"},
        "data": {"path": "x"},
    }
    assert "# few" in changed
    assert tomllib.loads(with_section("", "parallel", {"tp": 2})) == {"parallel": {"tp": 2}}


def test_a_pipeline_left_behind_leaves_no_micro_batches():
    text = "[parallel]\npp = 2\nmicro_batches = 8\ntp = 1\n"
    changed = tomllib.loads(with_section(text, "parallel", {"pp": 1, "micro_batches": None}))
    assert changed == {"parallel": {"pp": 1, "tp": 1}}


SMALL = """
[model]
pattern = "M*"
hidden_size = 64
vocab_size = 256
[data]
sequence_length = 64
"""


@pytest.mark.parametrize(
    "ours", ["[train]\nbatch_size = 4\nodd = [\n[1],\n]\n", "train = {batch_size = 4}\n[parallel]\ntp = 1\n"]
)
def test_a_recipe_that_lines_cannot_be_put_into_is_refused_and_left_alone(capsys, tmp_path, ours):
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out.toml"
    recipe.write_text(ours + SMALL if ours.startswith("train") else SMALL + ours)
    code, _, err = run_main(capsys, "plan", str(recipe), "--gpus", "1", "--write", str(out))
    assert code == 2 and "spells [parallel] or [train] in other ways" in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ("phases = 3", "data.mixture.phases is int; allowed: a list of tables"),
        ("phases = [{lengths = [{sequence_length = 'x'}]}]", "sequence_length = 'x'; allowed: a number from 1 on"),
        ("phases = [{lengths = [4]}]", "a row of data.mixture.lengths is int"),
    ],
)
def test_a_recipe_with_a_malformed_mixture_is_refused(capsys, tmp_path, mixture, said):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"{SMALL}[data.mixture]\n{mixture}\n[train]\nbatch_size = 4\n")
    code, _, err = run_main(capsys, "plan", str(recipe), "--gpus", "1")
    assert code == 2 and said in err


def test_a_folder_named_as_hardware_is_refused(capsys, tmp_path):
    (tmp_path / "mine.json").mkdir()
    code, _, err = run_main(capsys, "plan", "nano-3", "--hardware", str(tmp_path / "mine.json"))
    assert code == 2 and "cannot be read: is a directory" in err


def test_factorings_are_all_there():
    found = [tuple(sizes[name] for name in sorted(sizes)) for sizes in factorings(12)]
    every = {
        (a, b, c, d, e)
        for a in range(1, 13) for b in range(1, 13) for c in range(1, 13) for d in range(1, 13) for e in range(1, 13)
        if a * b * c * d * e == 12
    }  # fmt: skip
    assert len(found) == len(set(found)) and set(found) == every


def test_every_preset_that_is_computed_can_be_named(capsys):
    for name in PRESETS:
        code, _, err = run_main(
            capsys, "plan", name, "--gpus", "8", "--given", "fsdp=8", "--global-batch", "8", "--json"
        )
        assert code == 0 or "shape-only" in err
