"""A plan in the terminal: the best layouts, where time and memory go, and why the rest fell out."""

from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

TIME = {
    "compute": "computing",
    "recompute": "computing again",
    "tensor": "tp: gathers, scatters",
    "context": "cp: keys, values, states",
    "expert": "ep: tokens to experts and back",
    "data": "fsdp, replicate: weights, gradients",
    "pipeline": "pp: activations handed on",
    "bubble": "pp: waiting (bubble)",
    "waiting": "waiting for the slowest",
    "optimizer": "optimizer",
    "other": "the rest of a step",
    "overlap": "hidden beside computing",
}
MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "gathered": "weights gathered for use",
    "activations": "activations",
    "logits": "logits and the loss",
    "dispatch": "tokens at experts (dispatch)",
}


def draw(console: Console, content: dict[str, Any]) -> None:
    """Prints a plan's document (main.document)."""
    console.print(headline(content), soft_wrap=True)
    console.print(plans(content))
    if not content["fits"]:
        over = content["bytes_per_gpu"] - content["usable_bytes"]
        console.print(f"  does not fit: {over / 1e9:.1f} GB a device too much", style="bold red")
    console.print(parts("where a step's time goes", content["time"], TIME, 1.0, "s"))
    console.print(parts("where a device's memory goes", content["memory"], MEMORY, 1e9, "GB"))
    if content["fell_out"]:
        console.print(fallen(content))


def headline(content: dict[str, Any]) -> str:
    rows, sequence = content["rows"], content["sequence"]
    return (
        f"{content['model']} on {content['gpus']} x {content['hardware']}, {content['precision']}: "
        f"{rows:,} rows of {sequence:,} = {content['tokens_per_step']:,} tokens a step"
    )


def plain(title: str, *headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title="", title_justify="left")
    table.add_column(f"\n  {title}", header_style="bold")
    for heading in headings:
        table.add_column(f"\n{heading}", justify="right", header_style="bold", no_wrap=True)
    return table


def plans(content: dict[str, Any]) -> Table:
    """The best layout and the next best."""
    table = plain("layout", "s a step", "tok/s/gpu", "TFLOP/s/gpu", "GB/gpu")
    for place, row in enumerate((content, *content["alternatives"])):
        cells = (
            f"{row['step_seconds']:.4g}",
            f"{row['tokens_per_s_per_gpu']:,.0f}",
            f"{row['model_tflops_per_gpu']:.4g}",
            f"{row['bytes_per_gpu'] / 1e9:.1f}",
        )
        table.add_row(indented(row["layout"]["words"]), *cells, style="bold" if place == 0 else "")
    return table


def indented(words: str) -> Padding:
    """Words whose further lines stand in as far as the first."""
    return Padding(words, (0, 0, 0, 2))


def parts(title: str, values: dict[str, float], names: dict[str, str], unit: float, sign: str) -> Table:
    """The parts that are not nothing, with their share of the sum."""
    total = sum(values.values())
    table = plain(title, sign, "share")
    for key, name in names.items():
        if abs(values[key]) > 5e-4 * abs(total):
            table.add_row(f"  {name}", f"{values[key] / unit:.4g}", f"{values[key] / total:.1%}")
    table.add_row("  together", f"{total / unit:.4g}", "", style="bold")
    return table


def fallen(content: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title="")
    table.add_column("\n  why the rest fell out", header_style="bold", no_wrap=True)
    table.add_column("\nlayouts", justify="right", header_style="bold", no_wrap=True)
    table.add_column("\nfor example", header_style="bold")
    for row in content["fell_out"]:
        table.add_row(f"  {row['reason']}", f"{row['layouts']:,}", row["example"])
    return table
