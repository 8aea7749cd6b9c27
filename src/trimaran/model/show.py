"""`trimaran show`: a model's layers drawn, its parameters, bytes and FLOPs counted. Allocates no weights."""

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trimaran import config as settings
from trimaran.errors import Refusal
from trimaran.model.config import LETTERS, ModelConfig
from trimaran.model.dialects import model_type, read_config
from trimaran.model.presets import PRESETS, SIZE, preset, sized
from trimaran.model.size import ShapeOnly, Sizes, count

STYLES = {"M": "bright_blue", "E": "green", "*": "bold red", "-": "yellow", "R": "bold magenta", "W": "magenta"}
CONTEXTS = (4096, 131072)
LINE = 72  # blocks per line of the drawing


def main(target: str, overrides: list[str] | tuple[str, ...] = (), json: bool = False) -> None:
    """Shows a preset, a size such as 2m, or a folder with config.json. `overrides` change fields of the model, for
    instance moe_latent_size=512; context=8192 chooses the context at which state and FLOPs are counted."""
    console = Console(highlight=False)
    contexts: tuple[int, ...] = CONTEXTS
    changes: list[str] = []
    for text in overrides:
        if settings.key_of(text) == "context":
            contexts = (context_of(text),)
        else:
            changes.append(text)
    model, arithmetic = find(target, changes)
    content = document(target, model, arithmetic, contexts)
    if json:
        print_json(content)
    else:
        draw(console, content, model)


def context_of(text: str) -> int:
    value = text.split("=", 1)[1]
    if not value.isdecimal():
        raise Refusal(f"context = {value!r}", "a number of tokens", "write context=8192")
    return int(value)


def find(target: str, changes: list[str]) -> tuple[ModelConfig | ShapeOnly, list[str]]:
    """The model to show, and for a size the arithmetic behind it."""
    arithmetic: list[str] = []
    if Path(target).is_dir():
        model: ModelConfig | ShapeOnly = read_config(target)
    elif SIZE.fullmatch(target):
        tables = settings.override({}, [text for text in changes if settings.key_of(text) == "vocab_size"])
        model, told = sized(target, **tables)
        arithmetic = told.splitlines()
    elif "/" in target and target not in PRESETS:
        raise Refusal(
            f"no folder {target!r}", f"a folder with config.json, a size, or {', '.join(PRESETS)}", "check it"
        )
    else:
        model = preset(target)
    if not changes:
        return model, arithmetic
    if isinstance(model, ShapeOnly):
        raise Refusal(f"{changes[0]!r} for {target}", "nothing: its shape is fixed", "leave it out")
    return ModelConfig(**settings.override(model.model_dump(), changes)), arithmetic


def document(
    name: str, model: ModelConfig | ShapeOnly, arithmetic: list[str], contexts: tuple[int, ...]
) -> dict[str, Any]:
    """Everything that is shown, as one JSON document (docs/models.md has the schema)."""
    sizes = count(model)
    content: dict[str, Any] = {"name": name, "computed": isinstance(model, ModelConfig)}
    if isinstance(model, ModelConfig):
        blocks = {letter: model.pattern.count(letter) for letter in LETTERS if letter in model.pattern}
        content |= {"model_type": model_type(model), "pattern": model.pattern, "mtp_pattern": model.mtp_pattern}
        content |= {"blocks": blocks, "config": model.model_dump(mode="json")}
    else:
        content |= {"layers": model.layers, "why_not": model.why}
    return content | {
        "parameters": {
            "total": sizes.total,
            "without_draft": sizes.main,
            "active": sizes.active,
            "active_without_embedding": sizes.active - sizes.embedding,
            "tensors": sizes.tensors,
        },
        "parts": {
            part: {"parameters": numbers[0], "active": numbers[1], "tensors": numbers[2]}
            for part, numbers in sizes.parts.items()
        },
        "bytes": bytes_of(sizes),
        "at_context": {
            str(context): {"state_bytes": sizes.state_bytes(context), "flops_per_token": sizes.flops_per_token(context)}
            for context in contexts
        },
        "arithmetic": arithmetic,
    }


def bytes_of(sizes: Sizes) -> dict[str, int]:
    return {
        "weights_bf16": sizes.bytes(2),
        "weights_fp32": sizes.bytes(4),
        "kv_per_token": sizes.kv_bytes_per_token(),
        "draft_kv_per_token": sizes.draft_kv_bytes_per_token(),
        "window_per_sequence": sizes.window_bytes_per_sequence(),
        "ssm_per_sequence": sizes.ssm_bytes_per_sequence(),
        "conv_per_sequence": sizes.conv_bytes_per_sequence(),
    }


def print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=2))


def draw(console: Console, content: dict[str, Any], model: ModelConfig | ShapeOnly) -> None:
    console.print(headline(content))
    if isinstance(model, ModelConfig):
        console.print(drawing(model.pattern))
        if model.mtp_pattern:
            console.print(Text("  + ") + painted(model.mtp_pattern) + Text("  draft block (MTP)"))
    else:
        console.print(f"  {model.layers}\n  sized only: our layers have no {model.why}")
    for line in content["arithmetic"]:
        console.print(Padding(line, (0, 0, 0, 2)), style="dim")
    console.print(parameter_table(content))
    console.print(memory_table(content))


def headline(content: dict[str, Any]) -> Text:
    line = Text(content["name"], style="bold")
    if content["computed"]:
        letters = ", ".join(f"{number} {letter}" for letter, number in content["blocks"].items())
        line.append(f"   {content['model_type']}, {len(content['pattern'])} blocks: {letters}", style="not bold")
    return line


def drawing(pattern: str) -> Text:
    """The pattern with a gap after each attention block, and the legend of its letters."""
    rows: list[str] = []
    row = ""
    for group in pattern.replace("*", "* ").replace("W", "W ").split():
        while len(group) > LINE:  # patterns without gaps, such as R-R-R-
            rows, group = [*rows, group[:LINE]], group[LINE:]
        if len(row) + len(group) >= LINE:
            rows, row = [*rows, row], ""
        row = f"{row} {group}".strip()
    text = Text("\n").join(Text("  ") + painted(row) for row in [*rows, row] if row)
    text.append("\n ")
    for letter, meaning in LETTERS.items():
        if letter in pattern:
            text.append(" ").append(painted(letter)).append(f" {meaning} ", style="dim")
    return text


def painted(letters: str) -> Text:
    text = Text()
    for letter in letters:
        text.append(letter, style=STYLES.get(letter, ""))
    return text


def parameter_table(content: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("\n  part", "\nparameters", "\nactive", "\ntensors", "\nshare"):
        table.add_column(
            heading, justify="left" if heading == "\n  part" else "right", header_style="bold", no_wrap=True
        )
    totals = content["parameters"]
    for part, row in content["parts"].items():
        share = f"{row['parameters'] / totals['total']:.1%}"
        table.add_row(f"  {part}", f"{row['parameters']:,}", f"{row['active']:,}", f"{row['tensors']:,}", share)
    table.add_row("  total", f"{totals['total']:,}", f"{totals['active']:,}", f"{totals['tensors']:,}", style="bold")
    if totals["without_draft"] != totals["total"]:
        table.add_row("  without the draft block", f"{totals['without_draft']:,}", "", "")
    table.add_row("  with the input table a look-up", "", f"{totals['active_without_embedding']:,}", "")
    return table


def memory_table(content: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title="")
    for justify in ("left", "right", "left"):
        table.add_column("", justify=justify, no_wrap=True)
    sizes = content["bytes"]
    rows = (
        ("weights, bf16", sizes["weights_bf16"], ""),
        ("keys and values, bf16", sizes["kv_per_token"], "per token"),
        ("the same, draft block", sizes["draft_kv_per_token"], "per token"),
        ("sliding windows, bf16", sizes["window_per_sequence"], "per sequence, full"),
        ("Mamba state, fp32", sizes["ssm_per_sequence"], "per sequence"),
        ("convolution tail, bf16", sizes["conv_per_sequence"], "per sequence"),
    )
    for label, number, unit in rows:
        if number:
            table.add_row(f"  {label}", f"{number:,} bytes", f"{unit}  ({human(number)}B)".strip())
    for context, row in content["at_context"].items():
        table.add_row(
            f"  state at {int(context):,} tokens", f"{row['state_bytes']:,} bytes", f"({human(row['state_bytes'])}B)"
        )
    for context, row in content["at_context"].items():
        flops = row["flops_per_token"]
        table.add_row(
            f"  forward, context {int(context):,}", f"{flops:,} FLOPs", f"per token  ({human(flops, 1000)}FLOPs)"
        )
    return table


def human(number: int, base: int = 1024) -> str:
    """1536 -> "1.5 Ki"; base 1000: 1536 -> "1.536 k"."""
    prefixes = ("", "Ki", "Mi", "Gi", "Ti") if base == 1024 else ("", "k", "M", "G", "T")
    power = min(len(prefixes) - 1, int(math.log(max(number, 1), base)))
    return f"{number / base**power:.4g} {prefixes[power]}"
