"""Signs on a terminal: printing, colours, numbers in few letters."""

import os
import shutil
import sys
from typing import TextIO

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
COLOURS = ("\x1b[36m", "\x1b[33m", "\x1b[35m", "\x1b[32m")
CLEAR = "\r\x1b[K"


def say(text: str = "") -> None:
    """Prints one line to stdout at once; signs that the terminal cannot show become question marks."""
    put(sys.stdout, text + "\n")


def put(stream: TextIO, text: str) -> None:
    """Writes text to a stream at once, with question marks for signs that its encoding lacks."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "replace").decode(encoding))
    stream.flush()


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a live line can be drawn there."""
    return stream is not None and not stream.closed and stream.isatty() and os.environ.get("TERM") != "dumb"


def colourful(stream: TextIO | None) -> bool:
    """Whether colours are welcome there (https://no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def terminal_columns(stream: TextIO | None) -> int:
    """How wide the terminal is that `stream` goes to."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns if stream else 0
    except (OSError, ValueError):
        columns = 0
    return columns or shutil.get_terminal_size().columns


def bar(share: float, width: int, colour: bool) -> str:
    """━━━━━─────: the share done, between 0 and 1."""
    done = round(min(1.0, max(0.0, share)) * width)
    full, rest = "━" * done, "─" * (width - done)
    return f"{COLOURS[0]}{full}{PLAIN}{DIM}{rest}{PLAIN}" if colour else full + rest


def short(number: float) -> str:
    """1234567 -> "1.23M"."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= scale * 0.9995:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.3g}"


def size_text(size: float) -> str:
    """Bytes in words, decimal units: 612000000 -> "612 MB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale * 0.9995:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def hours(seconds: float) -> str:
    """161 -> "2:41", 7384 -> "2:03:04"."""
    minutes, rest = divmod(round(seconds), 60)
    hour, minutes = divmod(minutes, 60)
    return f"{hour}:{minutes:02}:{rest:02}" if hour else f"{minutes}:{rest:02}"
