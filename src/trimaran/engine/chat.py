"""`trimaran chat`: a conversation in the terminal, or, with a base model, plain continuations of what is written.

Answers go to stdout, all else to stderr: what a model thinks before it answers is one line there, which counts the
tokens while it thinks and stays as their number.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from pydantic import Field
from rich.cells import cell_len

from trimaran import config
from trimaran.engine.folder import Folder, FolderSettings, account, open_folder
from trimaran.engine.plain import Piece, stream
from trimaran.errors import Refusal
from trimaran.report.terminal import CLEAR, DIM, PLAIN, colourful, is_terminal, put, terminal_columns
from trimaran.text.answer import AnswerReader, ContentText, Delta, ReasoningText
from trimaran.text.chat import encode_chat
from trimaran.text.thought import ThoughtCounter, opens_thought
from trimaran.text.tokenizer import Tokenizer

HELP = (
    "/new forgets what was said; /thought unfolds the last thought; Ctrl-C cuts an answer short; /quit or Ctrl-D leaves"
)


class ChatSettings(FolderSettings):
    """Settings of `trimaran chat`."""

    max_tokens: int = Field(1024, ge=1)
    system: str | None = None  # the system message
    thinking: bool = True  # whether the template asks for a thought before the answer
    fold: bool = True  # shows the number of a thought's tokens, not the thought


def main(target: str, overrides: Sequence[str] = ()) -> None:
    """Answers what is typed, or each line of a piped stdin, until it ends."""
    settings = config.load(ChatSettings, None, overrides)
    if settings.samples > 1:
        raise Refusal(f"samples = {settings.samples}", "1: a conversation has one thread", "use trimaran generate")
    folder = open_folder(target, settings)
    typed = sys.stdin.isatty()
    if folder.base:
        put(sys.stderr, f"{target} is a base model ({folder.base}): it completes your text instead of answering.\n")
    if typed:
        put(sys.stderr, HELP + "\n")
        with contextlib.suppress(ImportError):  # line editing, on systems that have it
            import readline  # noqa: F401
    talk = Completion(folder, settings) if folder.base else Conversation(folder, settings)
    for line in typed_lines("text> " if folder.base else "you> ") if typed else piped_lines():
        if line == "/quit":
            break
        if line == "/new":
            talk = type(talk)(folder, settings)
        elif line == "/thought":
            put(sys.stdout, dimmed(talk.thought or "There was no thought.", sys.stdout) + "\n")
        elif line:
            talk.turn(line)


class Conversation:
    """Messages so far; each turn reads them all anew, since a template may drop earlier thoughts."""

    def __init__(self, folder: Folder, settings: ChatSettings):
        self.folder, self.settings = folder, settings
        self.thought = ""  # the last
        self.messages: list[dict[str, Any]] = []
        if settings.system is not None:
            self.messages.append({"role": "system", "content": settings.system})

    def turn(self, line: str) -> None:
        """Answers `line` and remembers both."""
        self.messages.append({"role": "user", "content": line})
        tokenizer = self.folder.tokenizer
        chat = encode_chat(tokenizer, self.messages, generation_prompt=True, thinking=self.settings.thinking)
        telling = Telling(tokenizer, opens_thought(tokenizer, chat.ids), self.settings.fold)
        answer(self.folder, chat.ids, self.settings, telling)
        self.messages.append(telling.reader.answer.message())
        self.thought = telling.reader.answer.reasoning


class Completion:
    """A base model: every line is a text of its own, and is continued."""

    thought = ""

    def __init__(self, folder: Folder, settings: ChatSettings):
        self.folder, self.settings = folder, settings

    def turn(self, line: str) -> None:
        """Shows `line` with its continuation."""
        put(sys.stdout, line)
        answer(self.folder, [*self.folder.lead, *self.folder.tokenizer.encode(line)], self.settings, Verbatim())


class Verbatim:
    """Shows a text as it is."""

    def show(self, piece: Piece) -> None:
        put(sys.stdout, piece.text)

    def finish(self) -> None:
        put(sys.stdout, "\n")


class Telling:
    """Shows one answer as it comes: its content on stdout, its thought, folded or dimmed, on stderr."""

    def __init__(self, tokenizer: Tokenizer, opened: bool, fold: bool):
        self.reader, self.counter = AnswerReader(opened), ThoughtCounter(tokenizer, opened)
        self.fold, self.live = fold, fold and is_terminal(sys.stderr)
        self.unfolded = False  # the thought stands on the screen, and its last line has no end
        self.closed = False  # the number of its tokens stands there

    def show(self, piece: Piece) -> None:
        for token in piece.tokens:
            self.counter.push(token)
        self._tell(self.reader.push(piece.text))
        if self.live and self.reader.thinking:
            put(sys.stderr, CLEAR + dimmed(self._line(), sys.stderr))

    def finish(self) -> None:
        """Ends the answer, wherever it was."""
        thinking = self.reader.thinking
        self._tell(self.reader.finish())
        self._close(", not finished" if thinking else "")
        put(sys.stdout, "\n")

    def _tell(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            if isinstance(delta, ReasoningText) and not self.fold:
                put(sys.stderr, dimmed(delta.text, sys.stderr))
                self.unfolded = True
            elif isinstance(delta, ContentText):
                self._close("")
                put(sys.stdout, delta.text)

    def _close(self, how: str) -> None:
        """Leaves the number of the thought's tokens behind, once."""
        if self.closed:
            return
        self.closed = True
        put(sys.stderr, CLEAR * self.live + "\n" * self.unfolded)
        if self.reader.answer.reasoning:
            tokens = f"{self.counter.count} token{'s'[: self.counter.count != 1]}"
            put(sys.stderr, dimmed(f"[thought: {tokens}{how}]", sys.stderr) + "\n")

    def _line(self) -> str:
        """The number of tokens so far, and as much of the thought's end as fits."""
        words = f"[thinking: {self.counter.count} tokens] "
        room = max(0, terminal_columns(sys.stderr) - len(words) - 1)
        latest = self.reader.answer.reasoning[-room:] if room else ""
        latest = " ".join("".join(sign if sign.isprintable() else " " for sign in latest).split())
        while cell_len(latest) > room:
            latest = latest[1:]
        return words + latest


def dimmed(text: str, stream: TextIO) -> str:
    return f"{DIM}{text}{PLAIN}" if colourful(stream) else text


def answer(folder: Folder, ids: list[int], settings: ChatSettings, screen: Verbatim | Telling) -> None:
    """Streams one continuation to the screen. Ctrl-C in a terminal ends the answer, not the chat."""
    output = None
    began, first = time.perf_counter(), 0.0
    try:
        for piece in stream(
            folder.model, [ids], folder.ending(settings), tokenizer=folder.tokenizer, draft=settings.draft
        ):
            first = first or time.perf_counter()
            screen.show(piece)
            output = piece.output
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    screen.finish()
    if output is not None and sys.stdin.isatty():
        put(sys.stderr, account([output], len(ids), first - began, time.perf_counter() - first) + "\n")


def typed_lines(prompt: str) -> Iterator[str]:
    """Lines from the terminal, until Ctrl-D."""
    while True:
        try:
            yield input(prompt).strip()
        except EOFError:
            put(sys.stdout, "\n")
            return


def piped_lines() -> Iterator[str]:
    """Lines of a piped stdin."""
    for raw in sys.stdin.buffer:
        try:
            yield raw.decode().strip()
        except UnicodeDecodeError as problem:
            raise Refusal(f"input is not text (byte {problem.start} of a line)", "UTF-8", "give text") from None
