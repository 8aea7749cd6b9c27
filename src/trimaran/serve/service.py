"""What the routes share: the model and its names, the engine's runner, the settings, the counts."""

import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from trimaran.engine.folder import Folder
from trimaran.engine.runner import Runner
from trimaran.errors import nearest_first
from trimaran.report.terminal import put
from trimaran.serve.metrics import Metrics
from trimaran.serve.problem import Problem
from trimaran.serve.rules import Forms
from trimaran.serve.settings import ServeSettings
from trimaran.text.template import NEMOTRON_3
from trimaran.text.tokenizer import Tokenizer


@dataclass
class Service:
    """names: that the model answers to, the first of them shown. created: seconds since 1970."""

    folder: Folder
    runner: Runner
    settings: ServeSettings
    names: tuple[str, ...]
    created: int = field(default_factory=lambda: int(time.time()))
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.forms = Forms(self.folder.tokenizer, self.settings.limits.forms)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.folder.tokenizer

    @property
    def template(self) -> str:
        """Source of the chat template that conversations are written with."""
        return self.tokenizer.template or NEMOTRON_3.read_text(encoding="utf-8")

    @property
    def longest(self) -> int | None:
        """Tokens of the longest text that the engine's memory holds, prompt and answer; None: there is no end to it."""
        memory = self.runner.engine.memory
        return memory.total_pages * memory.page if memory.pages_for(1) else None

    @property
    def status(self) -> Literal["ok", "draining", "stalled"]:
        """How the engine is: shutting down, or without a finished pass for too long, or well."""
        if self.runner.stalled(self.settings.stall_seconds):
            return "stalled"
        return "draining" if self.runner.draining or self.runner.closing else "ok"

    def answered(self, route: str, status: int) -> None:
        """Counts an answer, and writes a line about it where that is wanted."""
        self.metrics.answered(route, status)
        if self.settings.access_log:
            put(sys.stderr, f"{datetime.now():%H:%M:%S} {status} {route}\n")

    def check_model(self, name: str | None) -> str:
        """The name to answer under; 404 for a model that is not served. No name is the first."""
        if name is None or name in self.names:
            return name or self.names[0]
        known = ", ".join(nearest_first(name, self.names)[:8])
        raise Problem(404, f"no model {name!r} here; allowed: {known}", param="model", code="model_not_found")
