"""How Trimaran refuses: what was found, what is allowed, what to do next, on one line."""

import difflib
from collections.abc import Iterable


class Refusal(ValueError):
    """A request that cannot be honoured as given. The command line prints it and exits with code 2.

    `found` names the offending value, `allowed` what would have been accepted, `next_step` what to do about it.
    """

    def __init__(self, found: str, allowed: str, next_step: str):
        self.found, self.allowed, self.next_step = found, allowed, next_step
        super().__init__(f"{found}; allowed: {allowed}; next: {next_step}")


def nearest_first(name: str, allowed: Iterable[str]) -> list[str]:
    """The allowed names, the ones most like `name` first."""
    return sorted(allowed, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())
