"""One tool call, read while it is written.

    <tool_call>                         the template's form: bare text values, typed by the tool's schema
    <function=NAME>
    <parameter=KEY>
    value, of any number of lines
    </parameter>
    </function>
    </tool_call>

    <tool_call>                         the form of older families
    {"name": NAME, "arguments": {…}}
    </tool_call>

Values are not escaped, so a value ends at the first `</parameter>` that is followed by the next tag of the call: text
that merely mentions the tags stays text. A call is one from its first parameter (or its end) on; what fails before
is no call. From there nothing is taken back: the text of a string is handed on as it comes, and a call that the model
did not finish keeps its JSON unfinished, so that nobody can carry it out.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trimaran.text.tags import CALL_CLOSE, WHITE, unfinished
from trimaran.text.tools import Tools, quoted

# [ \t\r\n] is tags.WHITE. Tags are bounded, so that text which begins like one is not held back for ever.
FUNCTION = re.compile(r"[ \t\r\n]*+<function=([^<>\n]{1,200})>")
NEXT = re.compile(r"[ \t\r\n]*+<(?:parameter=(?P<key>[^<>\n]{1,200})|/function|/tool_call)>")
LAST = re.compile(r"[ \t\r\n]*+</tool_call>")
BEGUN = re.compile(r"[ \t\r\n]*+(?:<[^<>\n]{0,220})?")  # matches all of a text that may yet become a tag
VALUE_END = re.compile(r"\n?</(parameter|function)>")
VALUE_ENDS = ("\n</parameter>", "</parameter>", "\n</function>", "</function>")


@dataclass(frozen=True)
class CallStart:
    """A call begins: its place among the answer's calls, an id that is nowhere else, the function's name."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the JSON source of a call's arguments."""

    index: int
    text: str


class CallReader:
    """Reads on behind a `<tool_call>`. When `state` is no longer "open", `held` is the text that it did not take.

    state: "read": a call, complete; "cut": the text ended inside a call; "none": it was no call, and `held` is all.
    """

    def __init__(self, tools: Tools, index: int, new_id: Callable[[], str]):
        self.tools, self.index, self.new_id = tools, index, new_id
        self.state: Literal["open", "read", "cut", "none"] = "open"
        self.held = ""
        self.started = self.streams = self.final = False
        self.deltas: list[CallStart | CallArguments] = []
        self.name = self.key = ""
        self.keys = 0
        self.value: list[str] = []  # of a value that has to be complete before it can be typed
        self.step: Callable[[], bool] = self._head

    def read(self, text: str, final: bool) -> list[CallStart | CallArguments]:
        """Takes more text, `final`: the last. A step returns False when it needs more of it."""
        self.held += text
        self.final = final
        self.deltas = []
        while self.state == "open" and self.step():
            pass
        return self.deltas

    def _head(self) -> bool:
        if self.held.lstrip(WHITE).startswith("{"):
            self.step = self._json
            return True
        function = FUNCTION.match(self.held)
        at = function.end() if function else 0
        if function and NEXT.match(self.held, at):
            self._start(function[1].strip())
            self.held, self.step = self.held[at:], self._next
            return True
        if self.final or not BEGUN.fullmatch(self.held, at):
            self.state = "none"
        return False

    def _start(self, name: str) -> None:
        self.name, self.started = name, True
        self.deltas += [CallStart(self.index, self.new_id(), name), CallArguments(self.index, "{")]

    def _next(self) -> bool:
        """A parameter, or the end of the call; where the text ends instead, the call stays unfinished."""
        found = NEXT.match(self.held)
        if found is None:
            if self.final:
                self.state, self.held = "cut", ""
            return False
        self.held = self.held[found.end() :]
        if found["key"] is not None:
            self.key = found["key"].strip()
            self._give(f"{', ' * (self.keys > 0)}{quoted(self.key)}: ")
            self.keys += 1
            self.value, self.step = [], self._line_end
            return True
        self._give("}")
        self.step = self._last
        if found[0].endswith(CALL_CLOSE):
            self.state = "read"
        return True

    def _line_end(self) -> bool:
        """One line end before the value is the tag's."""
        if not self.held and not self.final:
            return False
        self.held = self.held.removeprefix("\n")
        self.streams = self.tools.is_text(self.name, self.key)
        if self.streams:
            self._give('"')
        self.step = self._value
        return True

    def _value(self) -> bool:
        for found in VALUE_END.finditer(self.held):
            ends = self._ends(found)
            if ends is None:
                self._take(found.start())
                return False
            if ends:
                skip = len(found[0]) if found[1] == "parameter" else found[0].startswith("\n")
                self._take(found.start())
                self.held = self.held[skip:]
                self._give('"' if self.streams else self.tools.json_of(self.name, self.key, "".join(self.value)))
                self.step = self._next
                return True
        self._take(len(self.held) - (0 if self.final else unfinished(self.held, VALUE_ENDS)))
        if self.final:
            self._give("".join(self.value))
            self.state = "cut"
        return False

    def _ends(self, found: re.Match[str]) -> bool | None:
        """Whether a closing tag ends the value; None: that depends on what follows. `</function>` does so only with
        the end of the call behind it, for a model that forgot `</parameter>`."""
        if (NEXT if found[1] == "parameter" else LAST).match(self.held, found.end()):
            return True
        if not BEGUN.fullmatch(self.held, found.end()):
            return False
        return found[1] == "parameter" if self.final else None

    def _take(self, size: int) -> None:
        """The first `size` characters of what is held belong to the value."""
        text, self.held = self.held[:size], self.held[size:]
        if self.streams:
            self._give(quoted(text)[1:-1])
        else:
            self.value.append(text)

    def _last(self) -> bool:
        found = LAST.match(self.held)
        if found is None and not self.final and BEGUN.fullmatch(self.held):
            return False
        if found:
            self.held = self.held[found.end() :]
        self.state = "read"
        return True

    def _json(self) -> bool:
        """A call as JSON; nothing of it is handed on before it is known to be one."""
        end = self.held.find(CALL_CLOSE)
        if end < 0 and not self.final:
            return False
        call = call_of(self.held if end < 0 else self.held[:end])
        if call is None:
            self.state = "none"
            return False
        self._start(call[0])
        self._give(call[1][1:])
        self.held = "" if end < 0 else self.held[end + len(CALL_CLOSE) :]
        self.state = "read"
        return True

    def _give(self, text: str) -> None:
        if text:
            self.deltas.append(CallArguments(self.index, text))


def call_of(source: str) -> tuple[str, str] | None:
    """(name, source of the arguments) of a call written as JSON; None where it is not one."""
    try:
        call = json.loads(source)
        arguments = call.get("arguments", call.get("parameters", {}))
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    name = call.get("name")
    return (name, written) if isinstance(name, str) and name and isinstance(arguments, dict) else None
