"""`trimaran chat`: a conversation in the terminal, or, with a base model, plain continuations of what is written."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence

from pydantic import Field

from trimaran import config
from trimaran.engine.folder import Folder, FolderSettings, account, open_folder
from trimaran.engine.plain import stream
from trimaran.errors import Refusal
from trimaran.report.terminal import put
from trimaran.text.chat import encode_chat

HELP = "/new forgets what was said; Ctrl-C cuts an answer short; /quit or Ctrl-D leaves."


class ChatSettings(FolderSettings):
    """Settings of `trimaran chat`."""

    max_tokens: int = Field(1024, ge=1)
    system: str | None = None  # the system message
    thinking: bool = True  # whether the template asks for a thought before the answer


def main(target: str, overrides: Sequence[str] = ()) -> None:
    """Answers what is typed, or each line of a piped stdin, until it ends. Answers go to stdout, the rest to stderr."""
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
        elif line:
            talk.turn(line)


class Conversation:
    """Messages so far; each turn reads them all anew, since a template may drop earlier thoughts."""

    def __init__(self, folder: Folder, settings: ChatSettings):
        self.folder, self.settings = folder, settings
        self.messages: list[dict[str, str]] = []
        if settings.system is not None:
            self.messages.append({"role": "system", "content": settings.system})

    def turn(self, line: str) -> None:
        """Answers `line` and remembers both."""
        self.messages.append({"role": "user", "content": line})
        tokenizer = self.folder.tokenizer
        chat = encode_chat(tokenizer, self.messages, generation_prompt=True, thinking=self.settings.thinking)
        # Where the prompt opens the thought, the answer's text begins inside it, and history wants it whole.
        opening = "<think>\n" if tokenizer.decode(chat.ids).rstrip().endswith("<think>") else ""
        self.messages.append({"role": "assistant", "content": opening + answer(self.folder, chat.ids, self.settings)})


class Completion:
    """A base model: every line is a text of its own, and is continued."""

    def __init__(self, folder: Folder, settings: ChatSettings):
        self.folder, self.settings = folder, settings

    def turn(self, line: str) -> None:
        """Shows `line` with its continuation."""
        put(sys.stdout, line)
        answer(self.folder, [*self.folder.lead, *self.folder.tokenizer.encode(line)], self.settings)


def answer(folder: Folder, ids: list[int], settings: ChatSettings) -> str:
    """Streams one continuation to stdout and returns its text. Ctrl-C in a terminal ends the answer, not the chat."""
    text, output = "", None
    began, first = time.perf_counter(), 0.0
    try:
        for piece in stream(
            folder.model, [ids], folder.ending(settings), tokenizer=folder.tokenizer, draft=settings.draft
        ):
            first = first or time.perf_counter()
            put(sys.stdout, piece.text)
            text += piece.text
            output = piece.output
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    put(sys.stdout, "\n")
    if output is not None and sys.stdin.isatty():
        put(sys.stderr, account([output], len(ids), first - began, time.perf_counter() - first) + "\n")
    return text


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
