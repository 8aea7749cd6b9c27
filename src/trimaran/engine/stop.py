"""Where an output's text ends: whole characters out, and nothing that may yet turn into a stop string."""

from collections.abc import Sequence

from trimaran.text.tags import unfinished
from trimaran.text.tokenizer import Detokenizer


class Reader:
    """The text of one row as its tokens arrive.

    `push` and `finish` return what is certain to belong to the text; what they return, put together, is the whole
    text. Once a stop string is complete, `stopped` names it, and neither it nor what follows is ever returned.
    """

    def __init__(self, stream: Detokenizer, stops: Sequence[str]):
        self.stream, self.stops = stream, stops
        self.held = ""
        self.stopped: str | None = None

    def push(self, token: int) -> str:
        """The text that is settled by this token."""
        return self._read(self.stream.push(token))

    def finish(self) -> str:
        """The rest: characters that were held back in case they began a stop string, or were cut in two."""
        if self.stopped is not None:
            return ""
        piece = self._read(self.stream.finish())
        if self.stopped is None:
            piece, self.held = piece + self.held, ""
        return piece

    def _read(self, piece: str) -> str:
        self.held += piece
        # The stop string that is complete first, so that it does not matter how the text was cut into tokens.
        found = [(self.held.find(stop) + len(stop), self.held.find(stop), stop) for stop in self.stops]
        found = [place for place in found if place[1] >= 0]
        if found:
            _, start, self.stopped = min(found)
            piece, self.held = self.held[:start], ""
            return piece
        safe = len(self.held) - unfinished(self.held, self.stops)
        piece, self.held = self.held[:safe], self.held[safe:]
        return piece
