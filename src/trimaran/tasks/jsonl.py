"""Problems from a JSONL file, a row a line, with the line's number in every complaint."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from trimaran.errors import Refusal

R = TypeVar("R")


def rows(path: Path, read: Callable[[Mapping[str, Any]], R]) -> Iterator[R]:
    """What `read` makes of each line. Raises Refusal for a missing or empty file, and for a line that is no such row.

    read: raises KeyError for a key that is missing, ValueError for a value that will not do.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also cut at U+2028, which JSON may hold
    except FileNotFoundError:
        raise Refusal(f"no file {str(path)!r}", "a JSONL file of problems", "correct the path") from None
    except UnicodeDecodeError as problem:
        raise Refusal(f"{path}: byte {problem.start} is no UTF-8", "a JSONL file", "give a text file") from None
    if not any(map(str.strip, lines)):
        raise Refusal(f"{path} is empty", "a JSONL file with a problem a line", "give one with problems")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield read(json.loads(line))
            except KeyError as missing:
                raise Refusal(f"{path}, line {number}: no {missing}", "a row with it", "correct the line") from None
            except (ValueError, TypeError) as problem:
                raise Refusal(f"{path}, line {number}: {problem}", "a JSON object", "correct the line") from None
