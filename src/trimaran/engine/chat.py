"""`trimaran chat`: a conversation in the terminal, or, with a base model, plain continuations of what is written.

Answers go to stdout, all else to stderr: what a model thinks before it answers is one line there, which counts the
tokens while it thinks and stays as their number. One engine speaks for the whole chat, and its prefix cache keeps what
was read: a turn reads what is new since the last one (and an answer whose thought the template has dropped by then).
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from pydantic import Field, model_validator
from rich.cells import cell_len

from trimaran import config
from trimaran.engine.engine import Engine
from trimaran.engine.folder import Folder, FolderSettings, account, open_draft, open_folder
from trimaran.engine.request import EngineSettings, Piece, Request
from trimaran.errors import Refusal
from trimaran.report.terminal import CLEAR, DIM, PLAIN, colourful, is_terminal, put, terminal_columns
from trimaran.text.answer import AnswerReader, ContentText, Delta, ReasoningText
from trimaran.text.chat import encode_chat
from trimaran.text.thought import ThoughtCounter, opens_thought
from trimaran.text.tokenizer import Tokenizer

HELP = (
    "/new forgets what was said; /thought unfolds the last thought; Ctrl-C cuts an answer short; /quit or Ctrl-D leaves"
)


class ChatEngine(EngineSettings):
    """The engine's settings, for a single conversation: memory for 16 x 4096 tokens, long passes over what is new."""

    rows: int = Field(16, ge=1)
    tokens_per_pass: int = Field(2048, ge=1)


class ChatSettings(FolderSettings):
    """Settings of `trimaran chat`. draft = N is short for engine.drafter = "mtp" and engine.draft = N."""

    max_tokens: int = Field(1024, ge=1)
    system: str | None = None  # the system message
    thinking: bool = True  # whether the template asks for a thought before the answer
    fold: bool = True  # shows the number of a thought's tokens, not the thought
    draft_model: str | None = None  # folder of a small model with the same tokenizer, for engine.drafter=model
    engine: ChatEngine = ChatEngine()

    @model_validator(mode="after")
    def _one_drafter(self) -> "ChatSettings":
        if self.draft and self.engine.drafter != "none":
            found = f'draft = {self.draft} with engine.drafter = "{self.engine.drafter}"'
            raise Refusal(found, "one of them", f"write engine.draft={self.draft}, or leave engine.drafter out")
        return self

    @property
    def speaking(self) -> EngineSettings:
        """How the engine is set up."""
        return self.engine.replace(drafter="mtp", draft=self.draft) if self.draft else self.engine


def main(target: str, overrides: Sequence[str] = ()) -> None:
    """Answers what is typed, or each line of a piped stdin, until it ends."""
    settings = config.load(ChatSettings, None, overrides)
    if settings.samples > 1:
        raise Refusal(f"samples = {settings.samples}", "1: a conversation has one thread", "use trimaran generate")
    folder = open_folder(target, settings)
    speaker = Speaker(folder, settings)
    for warning in speaker.engine.warnings:
        put(sys.stderr, f"warning: {warning}\n")
    typed = sys.stdin.isatty()
    if folder.base:
        put(sys.stderr, f"{target} is a base model ({folder.base}): it completes your text instead of answering.\n")
    if typed:
        put(sys.stderr, HELP + "\n")
        with contextlib.suppress(ImportError):  # line editing, on systems that have it
            import readline  # noqa: F401
    talk: Completion | Conversation = Completion(speaker) if folder.base else Conversation(speaker)
    for line in typed_lines("text> " if folder.base else "you> ") if typed else piped_lines():
        if line == "/quit":
            break
        if line == "/new":
            talk = type(talk)(speaker)
        elif line == "/thought":
            put(sys.stdout, dimmed(talk.thought or "There was no thought.", sys.stdout) + "\n")
        elif line:
            turn(talk, line, typed)


def turn(talk: "Completion | Conversation", line: str, typed: bool) -> None:
    """One turn. What cannot be answered (a conversation longer than the memory) ends no chat that is typed."""
    try:
        talk.turn(line)
    except Refusal as problem:
        if not typed:
            raise
        put(sys.stderr, f"{problem}\n")


class Speaker:
    """The model's side of a chat: an engine that keeps what it has read, from turn to turn and beyond /new."""

    def __init__(self, folder: Folder, settings: ChatSettings):
        self.folder, self.settings = folder, settings
        draft = None if settings.draft_model is None else open_draft(settings.draft_model, settings, folder)
        self.draft_model = None if draft is None else draft.model
        self.engine = self.begun()

    def begun(self) -> Engine:
        """An engine that has read nothing."""
        return Engine(self.folder.model, self.folder.tokenizer, self.settings.speaking, draft_model=self.draft_model)

    def stream(self, ids: Sequence[int], turns: Sequence[int] = ()) -> Iterator[Piece]:
        """Continues a prompt; `turns`: numbers of its tokens after which a turn ends."""
        sampling = self.folder.ending(self.settings)
        self.engine.submit(Request(tuple(ids), sampling, turns=tuple(turns)))
        while not self.engine.idle:
            for piece in self.engine.step():
                if piece.error is not None:
                    raise piece.error
                yield piece

    def answer(self, ids: Sequence[int], screen: "Verbatim | Telling", turns: Sequence[int] = ()) -> None:
        """Streams one continuation to the screen. Ctrl-C in a terminal ends the answer, not the chat."""
        output = None
        began, first = time.perf_counter(), 0.0
        try:
            for piece in self.stream(ids, turns):
                first = first or time.perf_counter()
                screen.show(piece)
                output = piece.output
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            self.engine = self.begun()  # it may have been interrupted between any two steps of its bookkeeping
        screen.finish()
        if output is not None and sys.stdin.isatty():
            put(sys.stderr, account([output], len(ids), first - began, time.perf_counter() - first) + "\n")


class Conversation:
    """Messages so far. Each turn is written anew, since a template may drop earlier thoughts."""

    def __init__(self, speaker: Speaker):
        self.speaker = speaker
        self.thought = ""  # the last
        self.messages: list[dict[str, Any]] = []
        if speaker.settings.system is not None:
            self.messages.append({"role": "system", "content": speaker.settings.system})

    def turn(self, line: str) -> None:
        """Answers `line` and remembers both."""
        settings, tokenizer = self.speaker.settings, self.speaker.folder.tokenizer
        messages = [*self.messages, {"role": "user", "content": line}]
        chat = encode_chat(tokenizer, messages, generation_prompt=True, thinking=settings.thinking)
        telling = Telling(tokenizer, opens_thought(tokenizer, chat.ids), settings.fold)
        # where the template keeps all that was said, the next turn goes on from the last answer's end
        self.speaker.answer(chat.ids, telling, [stop for _, stop in chat.spans[-1:] if 0 < stop < len(chat.ids)])
        self.messages = [*messages, telling.reader.answer.message()]
        self.thought = telling.reader.answer.reasoning


class Completion:
    """A base model: every line is a text of its own, and is continued."""

    thought = ""

    def __init__(self, speaker: Speaker):
        self.speaker = speaker

    def turn(self, line: str) -> None:
        """Shows `line` with its continuation."""
        folder = self.speaker.folder
        put(sys.stdout, line)
        self.speaker.answer([*folder.lead, *folder.tokenizer.encode(line)], Verbatim())


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
