"""Metrics of a run as JSON lines: appended, flushed, cut back on resume, read again as curves."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimaran.disk import whole
from trimaran.errors import Refusal, writing
from trimaran.report.terminal import say

Points = tuple[Sequence[float], Sequence[float]]  # steps, values


class Metrics:
    """One JSON object a line, flushed as it is written. Values that are not finite are written as text ("nan").

    Opened at `resume_step`, lines past it are dropped, so that steps never run backwards; 0 starts an empty file.
    A line that cannot be written is reported once through `warn`, and writing is tried again at the next.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int = 0, warn: Callable[[str], None] = say):
        self.path, self._warn, self._warned, self._torn = Path(path), warn, False, False
        self.last: dict[str, Any] = {}
        try:
            with writing(self.path):
                records = read_metrics(path) if resume_step else []
                kept = [record for record in records if record.get("step", 0) <= resume_step]
                self.last = kept[-1] if kept else {}
            with whole(self.path) as temporary:
                temporary.write_text("".join(json_line(record) for record in kept), encoding="utf-8")
        except Refusal as problem:
            self._complain(problem.found)

    def write(self, **values: Any) -> None:
        """Appends one record. Never raises for a full or lost disk."""
        line = ("\n" if self._torn else "") + json_line(values)
        data = line.encode("utf-8")
        try:
            with open(self.path, "ab", buffering=0) as file:
                written = file.write(data)
            self._torn = written != len(data)
            problem = "the disk took only a part of a line" if self._torn else ""
        except OSError as error:
            self._torn, problem = True, (error.strerror or str(error)).lower()
        if problem:
            self._complain(f"cannot write {self.path}: {problem}")

    def _complain(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"warning: {problem}; going on without these metrics")


def json_line(values: Mapping[str, Any]) -> str:
    kept = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
    return json.dumps(kept, allow_nan=False) + "\n"


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics file, without a line torn by a kill; no file, no records."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def series(path: str | os.PathLike[str], **columns: str) -> dict[str, Points]:
    """Curves from a metrics file: series(path, train="loss", val="val_loss") -> {"train": (steps, losses), ...}.

    A column that no record has gives no curve.
    """
    records = read_metrics(path)
    found: dict[str, Points] = {}
    for name, column in columns.items():
        pairs = [(float(r["step"]), float(r[column])) for r in records if "step" in r and r.get(column) is not None]
        if pairs:
            steps, values = zip(*pairs)
            found[name] = (steps, values)
    return found
