"""Conversations to learn from: rows of JSONL, read and checked whole before anything is trained.

A row is {"messages": [...]} of OpenAI's form, or {"prompt": ..., "completion": ...} where each is a text or messages.
Beside it may stand "tools", "thinking" (false: the answer is given without a thought), and "budget" and "effort" as
the chat template knows them; other keys, such as "task", are for whoever reads the file. An assistant's message with
"weight": 0 is read, not learnt.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimaran.errors import Refusal, nearest_first
from trimaran.text.tools import Tools

Row = Mapping[str, Any]
ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}  # as it is served
OWN_THOUGHT = re.compile(r"\s*<think>((?:(?!</?think>).)*)</think>(.*)", re.DOTALL)  # a pair that opens the content


@dataclass(frozen=True)
class Chat:
    """A conversation. Thoughts are in `reasoning_content`.

    learns: for each message, whether what the assistant says in it is learnt. thinking: whether it is asked to think.
    budget, effort: what the prompt asks of the thought. cut: where the last thought is to be cut off, as a share of
    its tokens; None: it is whole. place: where it was read, for refusals.
    """

    messages: tuple[Mapping[str, Any], ...]
    learns: tuple[bool, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: bool = True
    budget: int | None = None
    effort: str | None = None
    cut: float | None = None
    place: str = ""

    @property
    def digest(self) -> str:
        """sha256 of what is said and learnt, wherever it was read."""
        said = [self.messages, self.learns, self.tools, self.thinking, self.budget, self.effort]
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def thinks(self) -> bool:
        """Whether a thought is learnt."""
        return any(learnt and thought_of(message) for message, learnt in zip(self.messages, self.learns))

    def without_thoughts(self) -> "Chat":
        """The same answers, asked for and given without thinking."""
        bare = tuple({key: one[key] for key in one if key != "reasoning_content"} for one in self.messages)
        return replace(self, messages=bare, thinking=False, budget=None, effort=None)

    def unfolded(self) -> list["Chat"]:
        """One conversation per question, ending with what answers it, where an earlier answer has a thought.

        A template drops thoughts before the last question, so they can be learnt only where it was the last.
        """
        asked = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked or not any(map(thought_of, self.messages[: asked[-1]])):
            return [self]
        ends = [*asked[1:], len(self.messages)]
        found = []
        for start, stop in zip([0, *asked[1:]], ends, strict=True):
            learns = tuple(learnt and place >= start for place, learnt in enumerate(self.learns[:stop]))
            if any(learns):
                found.append(replace(self, messages=self.messages[:stop], learns=learns))
        return found


def thought_of(message: Mapping[str, Any]) -> str:
    """The thought of a message, "" where there is none."""
    return str(message.get("reasoning_content") or "").strip() if message["role"] == "assistant" else ""


def read(path: str | Path) -> list[Chat]:
    """The conversations of a JSONL file, or of all in a folder. The first row that cannot be learnt is refused by its
    file and line."""
    place = Path(path)
    files = sorted(place.glob("*.jsonl")) if place.is_dir() else [place]
    if not files:
        raise Refusal(f"no *.jsonl in {place}", "a JSONL file of conversations, or a folder of them", "name another")
    chats = [chat_of(row, where) for file in files for where, row in rows(file)]
    if not chats:
        raise Refusal(f"{place} is empty", 'rows such as {"messages": [...]}', "write conversations into it")
    return chats


def rows(file: Path) -> Iterator[tuple[str, Row]]:
    """(file and line, the table there); empty lines are passed over."""
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file}, line {number}", table(line, f"{file}, line {number}")
    except (FileNotFoundError, NotADirectoryError):
        raise Refusal(f"no file {str(file)!r}", "a JSONL file of conversations", "correct the path") from None
    except UnicodeDecodeError as problem:
        raise Refusal(f"{file} is not text (byte {problem.start})", "JSONL in UTF-8", "convert it") from None


def table(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as problem:
        raise Refusal(f"{place}: no JSON ({problem})", "one JSON table a line", "correct that line") from None
    if not isinstance(row, dict):
        raise Refusal(f"{place}: a {type(row).__name__}", '{"messages": [...]}', "write each row as a table")
    return row


@contextmanager
def at(place: str) -> Iterator[None]:
    """Puts `place` before what a Refusal inside says was found."""
    try:
        yield
    except Refusal as problem:
        raise Refusal(f"{place}: {problem.found}", problem.allowed, problem.next_step) from None


def chat_of(row: Row, place: str) -> Chat:
    """A row as a conversation. Raises Refusal, `place` first, for one that nothing can be learnt from."""
    given = {key: value for key, value in row.items() if value is not None}
    with at(place):
        messages, first_learnt = messages_of(given)
        tools = Tools(listed(given, "tools"))
        cleaned = tuple(checked(message, tools) for message in messages)
        learns = tuple(
            message["role"] == "assistant" and place >= first_learnt and weight_of(message) > 0
            for place, message in enumerate(messages)
        )
        if not any(learns):
            raise Refusal("no answer to learn", "at least one assistant message", "leave the row out")
        if cleaned[-1]["role"] != "assistant":
            found = f"the last message is of role {cleaned[-1]['role']!r}"
            raise Refusal(found, "an assistant's", "leave out what follows the last answer")
        thinking = given.get("thinking", True)
        if not isinstance(thinking, bool):
            raise Refusal(f"thinking = {thinking!r}", "true or false", "correct it")
        asked = {key: given[key] for key in ("budget", "effort") if key in given}
        if type(asked.get("budget", 0)) is not int:
            raise Refusal(f"budget = {asked['budget']!r}", "tokens of thought", "write a whole number")
        chat = Chat(cleaned, learns, tuple(tools.definitions), place=place, **asked)
    return chat if thinking else chat.without_thoughts()


def messages_of(row: Row) -> tuple[list[Any], int]:
    """(messages, place of the first that may be learnt)."""
    if "messages" in row:
        return listed(row, "messages"), 0
    if "prompt" not in row or "completion" not in row:
        found = f"a row with {', '.join(sorted(map(repr, row))) or 'nothing'}"
        raise Refusal(found, "'messages', or 'prompt' and 'completion'", "rename the keys of the rows")
    prompt, completion = (
        [{"role": role, "content": row[key]}] if isinstance(row[key], str) else listed(row, key)
        for role, key in (("user", "prompt"), ("assistant", "completion"))
    )
    return [*prompt, *completion], len(prompt)


def listed(row: Row, key: str) -> list[Any]:
    """The list under `key`, empty where there is none; any other value is refused."""
    value = row.get(key, [])
    if not isinstance(value, list):
        raise Refusal(f"{key} is a {type(value).__name__}", "a list", f"write {key} as a list")
    return value


def weight_of(message: Mapping[str, Any]) -> int:
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise Refusal(f"a message of weight {weight!r}", "0 or 1", "correct it")
    return int(weight)


def checked(message: Any, tools: Tools) -> dict[str, Any]:
    """A message without what is null, its content one text; an answer's own think tags moved to `reasoning_content`."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        keys = ", ".join(map(repr, message)) if isinstance(message, Mapping) else type(message).__name__
        found = f"a message without a role (it has {keys})"
        raise Refusal(found, "role and content in each", "name who says it: system, user, assistant or tool")
    kept = {key: value for key, value in message.items() if value is not None and key != "weight"}
    role = kept["role"]
    if role not in ROLES:
        known = nearest_first(role, ROLES)
        raise Refusal(f"a message of role {role!r}", ", ".join(known), f"did you mean {known[0]!r}?")
    kept["role"] = ROLES[role]
    if "content" in kept:
        kept["content"] = words_of(kept["content"])
    if role == "assistant":
        return checked_answer(kept, tools)
    if "content" not in kept:  # datasets that call it `value` would teach answers to nothing
        found = f"a message of role {role!r} without content (it has {', '.join(map(repr, kept))})"
        raise Refusal(found, "role and content in each", "rename its keys, or leave the message out")
    return kept


def checked_answer(kept: dict[str, Any], tools: Tools) -> dict[str, Any]:
    """What an assistant says: content or calls, and a thought that is a text."""
    own = OWN_THOUGHT.fullmatch(kept.get("content", ""))
    if own is not None and "reasoning_content" not in kept:
        kept |= {"reasoning_content": own[1].strip("\n"), "content": own[2].lstrip("\n")}
    if not isinstance(thought := kept.get("reasoning_content", ""), str):
        raise Refusal(f"a thought of type {type(thought).__name__}", "a text", "write reasoning_content as a text")
    calls = listed(kept, "tool_calls")
    check_calls(calls, tools)
    if not calls and not kept.get("content", "").strip():
        raise Refusal("an empty answer", "content or tool calls", "leave the row out, or complete it")
    return kept


def words_of(content: Any) -> str:
    """The text of a content: a string, or a list of parts, each of them text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refusal(f"content of type {type(content).__name__}", "a text or a list of parts", "write it as text")
    texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    for part, text in zip(content, texts, strict=True):
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise Refusal(f"a part of content that is no text ({kind!r})", "parts of type text", "leave the row out")
    return "".join(texts)


def check_calls(calls: Iterable[Any], tools: Tools) -> None:
    """Refuses calls of tools that the row does not offer."""
    for call in calls:
        inner = call.get("function", call) if isinstance(call, Mapping) else {}
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if name not in tools.names:
            known = ", ".join(nearest_first(str(name), tools.names)) or "no call, since the row offers no tools"
            raise Refusal(f"a call of the unknown tool {name!r}", known, 'describe it in the row\'s "tools"')
