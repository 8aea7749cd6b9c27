"""Drafts for verification: who proposes them, and how many.

DraftLength   one draft length for a batch, adapted to what was accepted (BASS, arXiv 2404.15778, Algorithm 1)
LookUp        what followed the last time that the row's newest tokens stood in it
"""

import math
from collections.abc import Sequence


class DraftLength:
    """The draft length of a batch after BASS' rule: two more when some row took its whole draft, else fewer, one less
    still after each further pass without such a row, but no fewer than the best row took."""

    FIRST, MORE, PART, LIMIT = 7, 2, 10, 32

    def __init__(self, first: int = FIRST, limit: int = LIMIT):
        self.length, self.limit = min(first, limit), limit
        self.falling = 0

    def update(self, accepted: Sequence[int]) -> None:
        """Takes what a verified pass accepted of each row that goes on. Rows that ended in it must not be among them:
        how far they got says nothing about the next draft."""
        if not accepted:
            return
        best = max(accepted)
        if best >= self.length:
            self.length, self.falling = min(self.length + self.MORE, self.limit), 0
        else:
            shorter = self.length - math.ceil(self.length / self.PART) - self.falling
            self.length, self.falling = max(1, best, shorter), 1
