"""Checkpoints come back tensor for tensor, and everything that is not a whole checkpoint is refused in one line."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import KINDS, random_tokens, tiny, tiny_config
from trimaran.errors import Refusal
from trimaran.model import hub
from trimaran.model.dialects import model_type
from trimaran.model.linear import StackedLinear
from trimaran.ops.numbers import FP32_PARAMETERS

every_kind = pytest.mark.parametrize("kind", KINDS)


def save_quietly(model, path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hub.save(model, path, **options)


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]), name


@pytest.fixture
def checkpoint(tmp_path):
    """A saved latent-expert model with a draft block, in one file."""
    hub.save(tiny("latent", torch.float32), tmp_path)
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / hub.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / hub.WEIGHTS)


def refused(path, *named):
    with pytest.raises(Refusal) as refusal:
        hub.load(path)
    told = str(refusal.value)
    assert "\n" not in told
    for text in named:
        assert text in told, told
    return told


@every_kind
@pytest.mark.parametrize("shard_bytes", [1 << 30, 6000])
def test_round_trip(kind, shard_bytes, tmp_path):
    model = tiny(kind, torch.float32)
    saved = save_quietly(model, tmp_path, shard_bytes=shard_bytes)
    again = hub.load(tmp_path)
    same(model, again)
    if model_type(model.config) == "trimaran":  # the hub's types leave out what their layers do not use
        assert again.config == model.config
    assert saved.bytes == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert not again.training and len(saved.files) == len(list(tmp_path.iterdir()))
    assert (shard_bytes > 10000) == ((tmp_path / hub.WEIGHTS).exists())
    with torch.no_grad():
        torch.testing.assert_close(again(random_tokens(2, 9)), model(random_tokens(2, 9)), rtol=0, atol=0)


@every_kind
def test_number_contract(kind, tmp_path):
    """What must stay fp32 does, from an fp32 file into a bf16 model and back."""
    save_quietly(tiny(kind, torch.float32), tmp_path / "a")
    model = hub.load(tmp_path / "a", dtype=torch.bfloat16)
    save_quietly(model, tmp_path / "b")
    same(model, hub.load(tmp_path / "b", dtype=torch.bfloat16))
    for name, tensor in model.state_dict().items():
        wide = name.rsplit(".", 1)[-1] in FP32_PARAMETERS
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    assert hub.load(tmp_path / "a", dtype=torch.float64).dtype == torch.float64


def test_hub_layout(checkpoint):
    tensors = load_file(checkpoint / hub.WEIGHTS)
    assert tensors["backbone.layers.1.mixer.experts.7.up_proj.weight"].shape == (24, 16)
    assert tensors["mtp.layers.1.mixer.experts.0.down_proj.weight"].shape == (16, 24)
    assert tensors["mtp.layers.0.eh_proj.weight"].shape == (32, 64) and "mtp.layers.1.final_layernorm.weight" in tensors
    assert all(tensor.ndim <= 2 for name, tensor in tensors.items() if "conv1d" not in name)


@contextlib.contextmanager
def limited(which, value):
    """A soft resource limit of this process."""
    before = resource.getrlimit(which)
    resource.setrlimit(which, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


LIMITED = """
import re, resource, sys
from trimaran.model import hub

small, folder, room = sys.argv[1:]
hub.load(small)  # everything imported that a folder needs
used = int(re.search(r"VmData:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + int(room), resource.RLIM_INFINITY))
hub.load(folder)
print("loaded")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_copy_is_enough(tmp_path):
    """Loading fits into 1.25 models of private memory (and not into 0.9, so the limit does bind)."""
    hub.save(hub.load("300k"), tmp_path / "small")
    hub.save(hub.load("40m"), tmp_path / "large", shard_bytes=20_000_000)  # a mapped shard counts too
    weights = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))

    def within(share: float) -> subprocess.CompletedProcess[str]:
        """A process each: what a failed load leaves behind would be room for the next. And one thread: others
        come up when they are first needed, and their stacks count."""
        folders = [str(tmp_path / "small"), str(tmp_path / "large")]
        command = [sys.executable, "-c", LIMITED, *folders, str(int(share * weights))]
        return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)

    enough, little = within(1.25), within(0.9)
    assert enough.stdout == "loaded\n", enough.stderr
    assert "allocate memory" in little.stderr.splitlines()[-1] and little.returncode == 1


def test_presets_are_drawn():
    model = hub.load("300k")
    same(model, hub.load("300k"))
    assert model.config.mtp_pattern == "*E"


def test_missing_unexpected_and_misshapen_are_one_refusal(checkpoint):
    def change(tensors):
        for expert in range(8):
            del tensors[f"backbone.layers.1.mixer.experts.{expert}.up_proj.weight"]
        tensors["backbone.layers.0.mixer.spare"] = torch.zeros(3)
        tensors["lm_head.weight"] = torch.zeros(97, 31)

    rewrite(checkpoint, change)
    told = refused(checkpoint, "8 tensors missing", "and 4 more", "1 tensors unexpected", "mixer.spare")
    assert "lm_head.weight is [97, 31] instead of [97, 32]" in told


def test_a_dropped_draft_block_is_explained(checkpoint):
    """transformers drops these tensors when it saves and leaves config.json as it was."""
    rewrite(checkpoint, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("mtp.")])
    refused(checkpoint, "tensors missing", "set num_nextn_predict_layers to 0")
    config = json.loads((checkpoint / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert hub.load(checkpoint).mtp is None
    hub.save(tiny("latent", torch.float32), checkpoint)
    (checkpoint / "config.json").write_text(json.dumps(config))
    refused(checkpoint, "tensors unexpected", "set num_nextn_predict_layers to 1")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated(keep, checkpoint):
    whole = (checkpoint / hub.WEIGHTS).read_bytes()
    (checkpoint / hub.WEIGHTS).write_bytes(whole[:keep])
    refused(checkpoint, "truncated or corrupt", "model.safetensors")


def test_corrupt(checkpoint):
    whole = (checkpoint / hub.WEIGHTS).read_bytes()
    (checkpoint / hub.WEIGHTS).write_bytes(whole[:8] + b"?" + whole[9:])
    refused(checkpoint, "truncated or corrupt")


def test_quantised_tensors_are_refused(checkpoint):
    rewrite(checkpoint, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}))
    refused(checkpoint, "lm_head.weight holds I8")


def test_other_folders(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    refused(folder, "no config.json")
    refused(folder / "absent", "no folder and no preset")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    refused(folder, "'bert'", "nemotron_h")
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    refused(folder, "no model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    refused(folder, "pytorch_model.bin (pickle)", "safetensors")


def test_damaged_shards(tmp_path):
    hub.save(tiny("dense", torch.float32), tmp_path, shard_bytes=6000)
    index = tmp_path / hub.INDEX
    shards = sorted(tmp_path.glob("model-*"))
    second = shards[1].read_bytes()
    shards[1].unlink()
    refused(tmp_path, f"1 of {len(shards)} shards", shards[1].name)
    shards[1].write_bytes(shards[0].read_bytes())
    refused(tmp_path, shards[0].name, shards[1].name)
    shards[1].write_bytes(second)
    hub.load(tmp_path)
    index.write_text('{"weight_map": 3}')
    refused(tmp_path, "damaged")


def test_what_cannot_be_drawn():
    refused("kimi-k2", "shape-only", "latent attention", "trimaran show kimi-k2")
    refused("ultra-3", "2,242,", "bytes", "cpu")
    refused("super4", "super-3")


def test_tied_embeddings(tmp_path):
    model = tiny("llama", torch.float32)
    hub.save(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / hub.WEIGHTS)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    same(model, hub.load(tmp_path))
    rewrite(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    refused(tmp_path, "lm_head.weight of its own")


def test_old_files_go(tmp_path):
    """Shards and single file replace each other; other files of the folder stay."""
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / ".saving-killed").mkdir()
    models = [tiny("dense", torch.float32, seed=seed) for seed in range(3)]
    for model, shard_bytes in zip(models, (6000, 1 << 30, 9000), strict=True):
        saved = hub.save(model, tmp_path, shard_bytes=shard_bytes)
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*saved.files, "tokenizer.json"])
        same(model, hub.load(tmp_path))


@pytest.mark.parametrize("before", [1 << 30, 30000])
@pytest.mark.parametrize("after", [1 << 30, 30000, 50000])
def test_killed_while_files_change_places(before, after, tmp_path, monkeypatch):
    """At every rename and removal: the old weights, the new ones, or a refusal."""
    old, new = (tiny("dense", torch.float32, seed=seed) for seed in (0, 1))
    hub.save(old, tmp_path / "old", shard_bytes=before)
    seen = set()
    for moment in range(40):
        folder = tmp_path / str(moment)
        shutil.copytree(tmp_path / "old", folder)
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            left = [moment]
            for place, name in ((os, "replace"), (Path, "unlink")):
                patch.setattr(place, name, interrupting(getattr(place, name), left))
            hub.save(new, folder, shard_bytes=after)
        with contextlib.suppress(Refusal):
            loaded = hub.load(folder)
            which = [m for m in (old, new) if torch.equal(m.lm_head.weight, loaded.lm_head.weight)]
            same(which[0], loaded)
            seen.add(which[0] is new)
        if left[0] >= 0:
            break
    assert seen == {False, True}


def interrupting(function, left):
    """`function`, interrupted on the call that finds `left` at zero."""

    def call(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(*args, **options)

    return call


@pytest.mark.parametrize("shard_bytes", [1 << 30, 6000])
def test_a_full_disk_leaves_the_old_checkpoint(shard_bytes, tmp_path):
    """A limit on file sizes stands in for the disk."""
    hub.save(tiny("dense", torch.float32), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with limited(resource.RLIMIT_FSIZE, 5000), pytest.raises(Refusal, match=r"cannot write .* untouched"):
        hub.save(tiny("dense", torch.float32, seed=1), tmp_path, shard_bytes=shard_bytes)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="cannot write"):
        hub.save(tiny("dense", torch.float32), tmp_path / "file")


def test_a_model_of_our_own_kind_says_so(tmp_path):
    model = tiny("window", torch.float32)
    with pytest.warns(UserWarning, match="opens in trimaran only"):
        saved = hub.save(model, tmp_path)
    assert saved.model_type == "trimaran" and "MW" in saved.note
    assert hub.load(tmp_path).config == tiny_config("window")


def test_a_rewritten_model_is_not_saved_as_plain(tmp_path):
    model = tiny("moe", torch.float32)
    model.backbone.layers[1].mixer.experts.up_proj = StackedLinear(5, 32, 24)
    with pytest.raises(Refusal, match=r"1 tensors: .*experts\.up_proj"):
        hub.save(model, tmp_path)
    assert not list(tmp_path.iterdir())
