"""Runs of a dozen steps: learning, what is written, and how a run stops."""

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trimaran
from tests.train.runs import command, environment, read_recipe, start, write_recipe, write_text
from trimaran import config
from trimaran.errors import Refusal
from trimaran.report import read_metrics
from trimaran.train.checkpoint import load_training, training_state
from trimaran.train.loop import Diverged, Run, fit, train_step
from trimaran.train.prepare import begin, prepare
from trimaran.train.pretrain import main
from trimaran.train.validate import evaluate


def new_run(folder: Path, *overrides: str, **train: object) -> Run:
    recipe = read_recipe(folder, *overrides, **train)
    return begin(recipe, prepare(recipe))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def equal(ones: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return ones.keys() == others.keys() and all(torch.equal(ones[name], others[name]) for name in ones)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A finished run."""
    recipe = read_recipe(tmp_path_factory.mktemp("done"), steps=40, accumulate=2, decay=0.5)
    assert main(recipe) == 0
    return Path(recipe.run)


def test_a_run_learns(done):
    records = read_metrics(done / "metrics.jsonl")
    assert [one["step"] for one in records] == list(range(1, 41))
    assert records[0]["loss"] == pytest.approx(math.log(320), rel=0.05)
    for name in ("loss", "mtp_1"):
        assert sum(one[name] for one in records[-5:]) / 5 < 0.75 * records[0][name]
    assert [one["step"] for one in records if "bits_per_byte" in one] == [*range(6, 40, 6), 40]
    assert records[-1]["bits_per_byte"] < 0.75 * records[5]["bits_per_byte"]
    assert records[-1]["tokens"] == 40 * 4 * 32
    assert {"lr", "aux", "max_vio", "grad_norm", "wall_s", "cpu_s"} <= records[0].keys()


def test_the_run_folder_is_a_hub_folder(done):
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    names |= {"generation_config.json"}
    assert names | {"recipe.toml", "metrics.jsonl", "curve.png", "result.json", "checkpoints"} <= set(os.listdir(done))
    model, tokenizer = trimaran.load(done), trimaran.load_tokenizer(done)
    assert model.config.vocab_size == tokenizer.vocab_size
    logits = model(torch.tensor([tokenizer.encode("sea hull mast")]))
    assert logits.isfinite().all()
    again = trimaran.load(done / "checkpoints" / "step-40")
    assert equal(dict(model.state_dict()), dict(again.state_dict()))
    result = json.loads((done / "result.json").read_text())
    assert result["steps"] == 40 and result["bits_per_byte"] > 0 and result["made_on"]["torch"]


def test_validation_scores_the_saved_model(done):
    recipe = config.load(type(read_recipe(done.parent)), done / "recipe.toml")
    run = begin(recipe, prepare(recipe))
    run.model.load_state_dict(trimaran.load(done).state_dict())
    (windows,) = run.held_out
    score, nats, scored, size = evaluate(run.model, run.held_out), 0.0, 0, 0
    for place in range(len(windows.shards)):
        document = torch.from_numpy(windows.shards.document(place))
        for first in range(0, len(document) - 1, 32):
            piece = document[first : first + 33]
            losses = torch.nn.functional.cross_entropy(
                run.model(piece[None, :-1])[0].detach(), piece[1:], reduction="sum"
            )
            nats, scored = nats + float(losses), scored + len(piece) - 1
        size += len(run.tokenizer.decode(document.tolist(), skip_specials=True).encode())
    assert (score.tokens, score.bytes) == (scored, size)
    assert score.loss == pytest.approx(nats / scored, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert score.bits_per_byte == json.loads((done / "result.json").read_text())["bits_per_byte"]


def test_a_finished_run_says_so(done, capsys):
    before = (done / "model.safetensors").stat().st_mtime_ns
    assert main(config.load(type(read_recipe(done.parent)), done / "recipe.toml")) == 0
    assert "is finished after 40 steps" in capsys.readouterr().out
    assert (done / "model.safetensors").stat().st_mtime_ns == before


def test_a_changed_recipe_is_refused_by_the_key(done):
    recipe = config.load(type(read_recipe(done.parent)), done / "recipe.toml")
    for key, value in {"train": {"lr": 1e-5}, "model": {"n_groups": 1}, "data": {"sequence_length": 16}}.items():
        (name,) = value
        with pytest.raises(Refusal, match=f"{key}.{name} = .*was begun with"):
            main(recipe.replace(**{key: getattr(recipe, key).replace(**value)}))
    assert main(recipe.replace(train=recipe.train.replace(keep=5, eval_every=1, checkpoint_every=7))) == 0


def test_changed_text_is_refused(tmp_path):
    recipe = read_recipe(tmp_path, steps=2)
    prepare(recipe)
    write_text(tmp_path / "text.jsonl", documents=41)
    with pytest.raises(Refusal, match="encoded from another corpus"):
        prepare(recipe)


def test_what_a_kill_left_while_encoding_is_removed(tmp_path):
    recipe = read_recipe(tmp_path)
    half = [tmp_path / "run" / name for name in (".tokenizer-x1", "data/training/.text-x2")]
    for folder in half:
        folder.mkdir(parents=True)
        (folder / "tokens-00000.bin").write_bytes(b"half")
    (tmp_path / "run" / "recipe.toml.123.tmp").write_text("half")
    prepare(recipe)
    names = {path.name for path in (tmp_path / "run").rglob("*")}
    assert not {".tokenizer-x1", ".text-x2", "recipe.toml.123.tmp"} & names and "tokenizer.json" in names


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.path=nowhere"], "no such file or folder"),
        (["train.batch_size=100"], "shorter than one batch"),
        (["train.device=cuda:99"], "train.device = 'cuda:99'"),
        (["train.device=gpu"], "train.device = 'gpu'"),
        (["tokenizer.path=."], "no tokenizer.json"),
    ],
)
def test_what_cannot_begin_leaves_nothing(tmp_path, overrides, words):
    recipe = read_recipe(tmp_path, *overrides)
    with pytest.raises(Refusal, match=words):
        main(recipe)
    assert not Path(recipe.run).exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    recipe = read_recipe(tmp_path, f"run={tmp_path}")
    with pytest.raises(Refusal, match=r"holds files but no recipe\.toml|was begun with"):
        main(recipe.replace(train=recipe.train.replace(lr=1.0)))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine").write_text("keep")
    with pytest.raises(Refusal, match=r"holds files but no recipe\.toml"):
        main(recipe.replace(run=str(tmp_path / "letters")))
    assert (tmp_path / "letters" / "mine").read_text() == "keep"


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(Refusal, match="cannot write"):
        main(read_recipe(tmp_path, f"run={tmp_path / 'file'}"))
    assert (tmp_path / "file").read_text() == "keep"


def test_two_processes_do_not_share_a_folder(tmp_path):
    path = write_recipe(tmp_path, steps=100000)
    process = start(path)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    try:
        with pytest.raises(Refusal, match="in use by another process"):
            main(read_recipe(tmp_path, steps=100000))
    finally:
        process.kill()
        process.join()


def test_the_same_seed_gives_the_same_bits(tmp_path):
    torch.set_num_threads(2)
    try:
        ends = []
        for seed in (0, 0, 1):
            run = new_run(tmp_path, f"seed={seed}", batch_size=16)
            for _ in range(3):
                train_step(run, next(run.loader), 1e-3)
            ends.append(weights(run))
    finally:
        torch.set_num_threads(1)
    assert equal(ends[0], ends[1])
    assert not equal(ends[0], ends[2])


def test_bf16_trains_and_keeps_its_weights_in_fp32(tmp_path):
    plain = new_run(tmp_path, steps=3)
    half = new_run(tmp_path, steps=3, precision="bf16")
    batches = [next(plain.loader) for _ in range(3)]
    first = [train_step(run, batches[0], 1e-3) for run in (plain, half)]
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=0.01) and first[0]["loss"] != first[1]["loss"]
    assert first[1]["grad_norm"] == pytest.approx(first[0]["grad_norm"], rel=0.05)
    for batch in batches[1:]:
        train_step(half, batch, 1e-3)
    assert {tensor.dtype for tensor in half.model.state_dict().values()} == {torch.float32}


def test_a_loss_that_is_not_finite_stops_before_anything_changes(tmp_path):
    run = new_run(tmp_path, steps=12, checkpoint_every=2)
    batches = [next(run.loader) for _ in range(3)]
    for batch in batches[:2]:
        train_step(run, batch, 1e-3)
        run.step += 1
    with torch.no_grad():
        run.model.backbone.embeddings.weight[batches[2].tokens_BT[0, 0]] = math.inf
    before, optimizer = weights(run), training_state(run.model, run.optimizer)
    version = run.model.version
    with pytest.raises(Diverged, match=r"step 3 gave loss = nan.*nothing was updated") as problem:
        train_step(run, batches[2], 1e-3)
    assert "\n" not in str(problem.value)
    assert equal(weights(run), before) and equal(training_state(run.model, run.optimizer), optimizer)
    assert run.model.version == version and run.step == 2
    assert all(load is None for load in run.objective.balance.loads)
    saved = load_file(tmp_path / "run" / "diverged-step-3.safetensors")
    assert equal(saved, dict(vars(batches[2])))


def test_every_step_counts_as_a_change_of_weights(tmp_path):
    run = new_run(tmp_path, steps=2)
    version = run.model.version
    fit(run)
    assert run.model.version == version + 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_state_comes_back(tmp_path, optimizer):
    settings = {"steps": 3, "optimizer": optimizer}
    run, other = new_run(tmp_path, **settings), new_run(tmp_path, "seed=3", **settings)
    train_step(run, next(run.loader), 1e-3)
    saved = training_state(run.model, run.optimizer)
    load_training(saved, other.model, other.optimizer)
    assert equal(training_state(other.model, other.optimizer), saved)


def test_interrupted_it_saves_and_goes_on_later(tmp_path):
    """The real command, stopped with Ctrl-C."""
    path = write_recipe(tmp_path, steps=400, checkpoint_every=0, eval_every=0)
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(command(path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    while process.poll() is None and not (metrics.exists() and len(read_metrics(metrics)) >= 3):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"finishing this step" in err and b"the same command goes on from there" in out
    assert b"Traceback" not in err
    step = read_metrics(metrics)[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / "LATEST").read_text() == f"step-{step}\n"
    assert 3 <= step < 400
    assert not (tmp_path / "run" / "model.safetensors").exists()
    again = start(path)
    while again.is_alive() and len(read_metrics(metrics)) < step + 2:
        time.sleep(0.005)
    os.kill(again.pid, signal.SIGTERM)
    again.join(60)
    assert again.exitcode == 128 + signal.SIGTERM
    steps = [one["step"] for one in read_metrics(metrics)]
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] > step
