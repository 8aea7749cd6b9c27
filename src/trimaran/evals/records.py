"""Every episode of an evaluation on a line of its own, so that one which was killed goes on where it was.

The folder's name holds a digest of all that the episodes depend on: other weights, another temperature or an edited
task write to another file. What only says how many (n, samples, greedy) is not in it: more of them add lines.
"""

import ast
import hashlib
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimaran.errors import Refusal, writing
from trimaran.evals.endpoint import Answered
from trimaran.evals.play import Played
from trimaran.tasks.task import Task

Key = tuple[str, int, int]  # mode, number, sample
WEIGHTS = ("*.safetensors", "config.json", "tokenizer.json", "chat_template.jinja")


class Records:
    """The records of a task: those of `path`, or in memory alone where it is None.

    A line torn by a kill is dropped, and so are episodes that failed: they have no score, and are played again.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.known: dict[Key, dict[str, Any]] = {}
        if path is None:
            return
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            whole = [read(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.endswith(b"\n")]
            self.known = {key_of(record): record for record in whole if record["error"] is None}
            if len(self.known) < len(lines):
                partial = path.with_name(path.name + ".partial")
                partial.write_text("".join(map(line_of, self.known.values())), encoding="utf-8")
                partial.replace(path)

    def add(self, record: dict[str, Any]) -> None:
        """Keeps a record, and writes it at once."""
        self.known[key_of(record)] = record
        if self.path is not None:
            with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(line_of(record))


def read(line: bytes, place: str) -> dict[str, Any]:
    """The record of a line, or a refusal that names its place."""
    try:
        record = json.loads(line)
    except ValueError as problem:
        raise Refusal(f"{place} is damaged: {problem}", "a record per line", "take that line out of the file") from None
    if not isinstance(record, dict) or not {"mode", "number", "sample", "error"} <= set(record):
        raise Refusal(f"{place} is no record: {line[:80]!r}", "a record per line", "take that line out of the file")
    return record


def key_of(record: Mapping[str, Any]) -> Key:
    return record["mode"], record["number"], record["sample"]


def line_of(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def record_of(played: Played | Answered, mode: str) -> dict[str, Any]:
    """An episode as JSON: the prompt, all that was said after it, the scores or the traceback."""
    prompt, conversation, outputs = played.prompt, played.conversation, played.outputs
    record = {
        "mode": mode,
        "number": prompt.number,
        "sample": played.sample,
        "scores": dict(played.scores),
        "finish": None if played.trace is None else played.trace.finish,
        "tokens": played.tokens,
        "thought_tokens": conversation.thoughts(),
        "prompt": list(prompt.messages),
        "tools": list(prompt.tools),
        "messages": conversation.messages[len(prompt.messages) :],
        "error": played.error,
    }
    asked = outputs and outputs[0].logprobs is not None
    return record | ({"logprobs": [output.logprobs for output in outputs]} if asked else {})


def digest_of(**parts: Any) -> str:
    """Ten signs that change with any of `parts` (JSON values)."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=5).hexdigest()


def source_of(task: Task) -> str:
    """The text of the task's module and of those of its package that it imports, or the class's name where there is no
    text: an edited task scores anew."""
    kind = type(task)
    waiting, texts = [kind.__module__], dict[str, str]()
    package = kind.__module__.rpartition(".")[0] + "."
    while waiting:
        name = waiting.pop()
        try:
            texts[name] = inspect.getsource(sys.modules[name])
        except (OSError, TypeError):  # typed into a session
            texts[name] = f"{kind.__module__}:{kind.__qualname__}"
        near = {one for one in imports_of(texts[name]) if one.startswith(package) and one in sys.modules}
        waiting += near - texts.keys() - set(waiting)
    return "".join(text for _, text in sorted(texts.items()))


def imports_of(source: str) -> set[str]:
    """Names of modules that a module's text imports when it is loaded, by their whole names; and some that are none."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def model_digest(folder: Path) -> str:
    """A digest of a folder's weights, tokenizer and chat template, byte by byte."""
    whole = hashlib.blake2b(digest_size=8)
    for pattern in WEIGHTS:
        for path in sorted(folder.glob(pattern)):
            with open(path, "rb") as file:
                whole.update(path.name.encode() + hashlib.file_digest(file, "blake2b").digest())
    return whole.hexdigest()
