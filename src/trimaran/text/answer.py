"""An assistant's text, taken apart while it is written: what it thinks, what it says, what it calls.

The pieces that `AnswerReader` gives, put together, do not depend on how the text was cut: reading a stream and reading
the whole are the same. The rules:

- a thought begins in the prompt (`opened`) or with `<think>` as the first word, and ends at the first `</think>`;
  without the end all is thought, without the beginning all is content
- a `</think>` that closes nothing is taken out once; think tags in pairs, and those after a thought, are content
- line ends beside a think tag are the tag's, white space beside a call is the call's
- calls are read from content alone, and only where tools are offered; what is no call stays content, letter by letter
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trimaran.text.call import CallArguments, CallReader, CallStart
from trimaran.text.tags import CALL_OPEN, THINK_CLOSE, THINK_OPEN, WHITE, first_of, unfinished
from trimaran.text.tools import Tools


@dataclass(frozen=True)
class ReasoningText:
    """More of the thought."""

    text: str


@dataclass(frozen=True)
class ContentText:
    """More of what is said."""

    text: str


Delta = ReasoningText | ContentText | CallStart | CallArguments


@dataclass
class Call:
    """A call: `arguments` is JSON source, whole unless the answer ended inside the call (`complete` False)."""

    id: str
    name: str
    arguments: str = ""
    complete: bool = False


@dataclass
class Answer:
    """What has been read so far."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)

    def message(self) -> dict[str, Any]:
        """The answer as a message of OpenAI's form, such as `encode_chat` reads again."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message

    def add(self, delta: Delta) -> None:
        if isinstance(delta, ReasoningText):
            self.reasoning += delta.text
        elif isinstance(delta, ContentText):
            self.content += delta.text
        elif isinstance(delta, CallStart):
            self.calls.append(Call(delta.id, delta.name))
        else:
            self.calls[delta.index].arguments += delta.text


def read_answer(text: str, opened: bool, tools: Tools | None = None, *, force_nonempty_content: bool = False) -> Answer:
    """All of an answer at once; arguments as in `AnswerReader`."""
    reader = AnswerReader(opened, tools, force_nonempty_content=force_nonempty_content)
    reader.push(text)
    reader.finish()
    return reader.answer


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class AnswerReader:
    """Reads one answer: `push` each piece of text, `finish` once. What they return adds up to `answer`.

    opened: the prompt ends inside a thought (`thought.opens_thought`). tools: those on offer; None: `<tool_call>` is
    text. force_nonempty_content: an answer that is nothing but a thought is repeated as content at the end, for
    clients that cannot do without. new_id: names the calls.
    """

    def __init__(
        self,
        opened: bool,
        tools: Tools | None = None,
        *,
        force_nonempty_content: bool = False,
        new_id: Callable[[], str] = call_id,
    ):
        self.opened, self.tools, self.force, self.new_id = opened, tools, force_nonempty_content, new_id
        self.answer = Answer()
        self.white = "" if tools is None else WHITE  # what is held back where a call may follow
        self.held = ""  # text that has not been understood yet
        self.space = ""  # white space before it, which belongs to a tag, if one follows
        self.skip = ""  # characters to pass over, until there is another
        self.unpaired = not opened  # no think tag has been met
        self.final = False
        self.call: CallReader | None = None
        self.deltas: list[Delta] = []
        self.step: Callable[[], bool] = self._before

    @property
    def thinking(self) -> bool:
        """Whether what has been read ends inside a thought, as far as one can tell."""
        return self.step == self._thought or (self.step == self._before and self.opened)

    def push(self, text: str) -> list[Delta]:
        """What this piece settles."""
        self.held += text
        self.deltas = []
        while self.step():
            pass
        return merged(self.deltas)

    def finish(self) -> list[Delta]:
        """The rest, now that nothing follows."""
        self.final = True
        self.deltas = []
        while self.step():
            pass
        if self.force and self.answer.reasoning and not self.answer.content and not self.answer.calls:
            self._give(ContentText(self.answer.reasoning))
        return merged(self.deltas)

    # Each step takes what it can from `held` and returns whether another may go on.

    def _before(self) -> bool:
        bare = self.held.lstrip(WHITE)
        self.space += self.held[: len(self.held) - len(bare)]
        self.held = bare
        if bare.startswith((THINK_OPEN, THINK_CLOSE)):  # some repeat the tag that the prompt ended with
            mark = THINK_OPEN if bare.startswith(THINK_OPEN) else THINK_CLOSE
            self.held, self.opened = bare[len(mark) :], mark == THINK_OPEN
            self.space, self.unpaired, self.skip = "", False, "\n"
        elif not self.final and (THINK_OPEN.startswith(bare) or THINK_CLOSE.startswith(bare)):
            return False
        self.held, self.space = self.space + self.held, ""
        self.skip = "\n" if self.opened else self.skip
        self.step = self._thought if self.opened else self._content
        return True

    def _thought(self) -> bool:
        self._pass_over()
        end = self.held.find(THINK_CLOSE)
        if end >= 0:
            self._say(ReasoningText, self.held[:end], "\n")
            self.held = self.held[end + len(THINK_CLOSE) :]
            self.space, self.skip, self.step = "", "\n", self._content
            return True
        sure = len(self.held) - (0 if self.final else unfinished(self.held, [THINK_CLOSE]))
        self._say(ReasoningText, self.held[:sure], "" if self.final else "\n")
        self.held = self.held[sure:]
        return False

    def _content(self) -> bool:
        self._pass_over()
        marks = [CALL_OPEN] * (self.tools is not None) + [THINK_OPEN, THINK_CLOSE] * self.unpaired
        found = first_of(self.held, marks)
        if found is None:
            sure = len(self.held) - (0 if self.final else unfinished(self.held, marks))
            self._say(ContentText, self.held[:sure], "" if self.final else self.white)
            self.held = self.held[sure:]
            return False
        at, mark = found
        text, self.held = self.held[:at], self.held[at + len(mark) :]
        self._say(ContentText, text, self.white)
        if mark == CALL_OPEN:
            assert self.tools is not None
            self.call = CallReader(self.tools, len(self.answer.calls), self.new_id)
            self.step = self._call
            return True
        self.unpaired = False
        if mark == THINK_OPEN:
            self._say(ContentText, mark, self.white)
        return True

    def _call(self) -> bool:
        assert self.call is not None
        self._give(*self.call.read(self.held, self.final))
        self.held = ""
        if self.call.started:
            self.space = ""
        if self.call.state == "open":
            return False
        self.held, self.step = self.call.held, self._content
        if self.call.state == "none":
            self._say(ContentText, CALL_OPEN, self.white)
        else:
            self.answer.calls[-1].complete = self.call.state == "read"
            self.skip = WHITE
        return True

    def _say(self, kind: type[ReasoningText | ContentText], text: str, white: str) -> None:
        """Hands on text, but for the `white` space at its end, which a tag may follow."""
        body = text.rstrip(white)
        if body or not white:
            self._give(kind(self.space + body))
            self.space = ""
        self.space += text[len(body) :]

    def _pass_over(self) -> None:
        self.held = self.held.lstrip(self.skip) if self.skip else self.held
        if self.held:
            self.skip = ""

    def _give(self, *deltas: Delta) -> None:
        for delta in deltas:
            if isinstance(delta, CallStart) or delta.text:
                self.answer.add(delta)
                self.deltas.append(delta)


def merged(deltas: list[Delta]) -> list[Delta]:
    """The same with neighbours of one kind joined."""
    joined: list[Delta] = []
    for delta in deltas:
        last = joined[-1] if joined else None
        if isinstance(delta, CallArguments) and isinstance(last, CallArguments) and last.index == delta.index:
            joined[-1] = CallArguments(delta.index, last.text + delta.text)
        elif isinstance(delta, ReasoningText | ContentText) and type(delta) is type(last):
            joined[-1] = type(delta)(last.text + delta.text)
        else:
            joined.append(delta)
    return joined
