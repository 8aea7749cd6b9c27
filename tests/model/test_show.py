"""What `trimaran show` prints: all in 80 columns, and the documented JSON."""

import json
import re
from pathlib import Path

import pytest

from tests.models import KINDS, tiny_config
from trimaran.errors import Refusal
from trimaran.model.dialects import dump_json, write_config
from trimaran.model.presets import PRESETS
from trimaran.model.show import main


@pytest.mark.parametrize("target", [*PRESETS, "2m", "1.5b"])
def test_fits_a_terminal(target, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(target)
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert target in printed and "FLOPs" in printed


def test_super(capsys):
    main("super-3")
    printed = capsys.readouterr().out
    for expected in ("123,611,033,088", "42,683", "12,770,237,440", "EMEMEMEMEM*", "draft block", "160 MiB"):
        assert expected in printed


def test_json(capsys):
    main("super-3", json=True)
    content = json.loads(capsys.readouterr().out)
    assert content["parameters"]["total"] == 123_611_033_088 and content["parameters"]["tensors"] == 42683
    assert content["blocks"] == {"M": 40, "*": 8, "E": 40} and content["model_type"] == "nemotron_h"
    assert content["bytes"]["kv_per_token"] == 8192 and content["at_context"]["4096"]["flops_per_token"] > 2e10
    assert sum(part["parameters"] for part in content["parts"].values()) == content["parameters"]["total"]
    main("kimi-k2", json=True)
    assert "latent attention" in json.loads(capsys.readouterr().out)["why_not"]


PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
COUNTS = ("total", "without_draft", "active", "active_without_embedding", "tensors")


@pytest.mark.parametrize("target", ["super-3", "2m", "gpt-oss-20b", "llama3-8b"])
def test_json_is_what_the_page_says(target, capsys):
    """Every key is documented, those that are promised are there, and values have the promised kinds."""
    main(target, json=True)
    content = json.loads(capsys.readouterr().out)
    table = PAGE.partition("`--json` prints one document:")[2].partition("```")[0]
    documented = set(re.findall("`([a-z_0-9]+)`", table))
    computed = ("model_type", "pattern", "mtp_pattern", "blocks", "config")
    own = computed if content["computed"] else ("layers", "why_not")
    assert content.keys() == {"name", "computed", *own, "parameters", "parts", "bytes", "at_context", "arithmetic"}
    assert {*content, *content["parameters"], *content["bytes"]} <= documented
    assert tuple(content["parameters"]) == COUNTS
    numbers = [content["parameters"], content["bytes"], *content["parts"].values(), *content["at_context"].values()]
    assert all(type(number) is int and number >= 0 for group in numbers for number in group.values())
    assert all(part.keys() == {"parameters", "active", "tensors"} for part in content["parts"].values())
    assert all(row.keys() == {"state_bytes", "flops_per_token"} for row in content["at_context"].values())
    assert bool(content["arithmetic"]) == (target == "2m")


@pytest.mark.parametrize("kind", KINDS)
def test_folder(kind, tmp_path, capsys):
    (tmp_path / "config.json").write_text(dump_json(write_config(tiny_config(kind))))
    main(str(tmp_path), json=True)
    assert json.loads(capsys.readouterr().out)["pattern"] == tiny_config(kind).pattern


def test_changes(capsys):
    main("super-3", ["moe_latent_size=512", "context=8192"], json=True)
    content = json.loads(capsys.readouterr().out)
    assert content["config"]["moe_latent_size"] == 512 and list(content["at_context"]) == ["8192"]
    main("20m", ["vocab_size=32768"], json=True)
    assert json.loads(capsys.readouterr().out)["config"]["vocab_size"] == 32768


@pytest.mark.parametrize(
    ("target", "changes", "named"),
    [
        ("nano3", [], "nano-3"),
        ("./nowhere", [], "nowhere"),
        ("super-3", ["moe_latent=512"], "moe_latent_size"),
        ("kimi-k2", ["hidden_size=1"], "kimi-k2"),
        ("nano-3", ["context=many"], "many"),
        ("2x", [], "2x"),
    ],
)
def test_refusals(target, changes, named):
    with pytest.raises(Refusal) as refusal:
        main(target, changes)
    assert named in str(refusal.value)
