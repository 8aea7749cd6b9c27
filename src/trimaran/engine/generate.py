"""`trimaran generate`: continues a prompt with the model of a run folder, as it writes."""

import sys
import time
from collections.abc import Sequence

from trimaran import config
from trimaran.engine.folder import Folder, FolderSettings, account, open_folder, read_input
from trimaran.engine.plain import stream
from trimaran.engine.row import Output
from trimaran.errors import Refusal
from trimaran.report.terminal import put


class GenerateSettings(FolderSettings):
    """Settings of `trimaran generate`."""

    echo: bool = True  # shows the prompt before its continuation


def main(target: str, overrides: Sequence[str] = (), prompt: str | None = None) -> None:
    """Streams continuations to stdout and what they took to stderr. Without PROMPT, stdin is the prompt when piped;
    an empty prompt begins a document."""
    settings = config.load(GenerateSettings, None, overrides)
    folder = open_folder(target, settings)
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else read_input()
    ids = [*folder.lead, *folder.tokenizer.encode(prompt)]
    if not ids:
        raise Refusal("an empty prompt", "text, for this tokenizer has no token that begins one", "write a prompt")
    continue_prompt(folder, ids, prompt if settings.echo else "", settings)


def continue_prompt(folder: Folder, ids: list[int], echo: str, settings: FolderSettings) -> list[Output]:
    """Shows the continuations of one prompt: the first as it is written, the others when it is their turn."""
    screen = Screen(settings.samples, echo)
    outputs: list[Output] = []
    began = first = time.perf_counter()
    pieces = stream(folder.model, [ids], folder.ending(settings), tokenizer=folder.tokenizer, draft=settings.draft)
    for number, piece in enumerate(pieces):
        if number < settings.samples:
            first = time.perf_counter()
        screen.show(piece.row, piece.text, piece.output is not None)
        if piece.output is not None:
            outputs.append(piece.output)
    line = account(outputs, len(ids), first - began, time.perf_counter() - first)
    put(sys.stderr, line + "\n")
    return outputs


class Screen:
    """Several texts that grow at once, shown one after the other."""

    def __init__(self, count: int, echo: str):
        self.echo = echo
        self.waiting, self.ended = [""] * count, [False] * count
        self.turn = -1
        self.next()

    def show(self, row: int, text: str, ended: bool) -> None:
        """Takes a piece of one text and shows what it is the turn of."""
        self.waiting[row] += text
        self.ended[row] = ended
        while self.turn < len(self.waiting):
            put(sys.stdout, self.waiting[self.turn])
            self.waiting[self.turn] = ""
            if not self.ended[self.turn]:
                return
            put(sys.stdout, "\n")
            self.next()

    def next(self) -> None:
        self.turn += 1
        if self.turn < len(self.waiting):
            title = f"--- sample {self.turn + 1} of {len(self.waiting)} ---\n" if len(self.waiting) > 1 else ""
            put(sys.stdout, title + self.echo)
