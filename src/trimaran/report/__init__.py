"""The one printer: a live line, metrics as JSON lines, loss curves in the terminal and as PNG.

    with Progress(total=400, metrics=run / "metrics.jsonl", start=resumed_step) as progress:
        progress.update(step, tokens=4096, loss=3.2, lr=1e-3)         # every step
        progress.log(step, val_loss=3.3)                              # metrics only
        progress.say("a line that leaves the live one whole")
        progress.curves(run / "curve.png", train="loss", val="val_loss")

The live line goes to stderr; what a verb prints goes to stdout. Training never stops because something could not be
written here: the first failure is said, the rest is silence.
"""

from trimaran.report.curve import curve_png, curve_terminal
from trimaran.report.environment import environment
from trimaran.report.metrics import Metrics, read_metrics, series
from trimaran.report.progress import Progress, Silence
from trimaran.report.terminal import say

__all__ = [
    "Metrics",
    "Progress",
    "Silence",
    "curve_png",
    "curve_terminal",
    "environment",
    "read_metrics",
    "say",
    "series",
]
