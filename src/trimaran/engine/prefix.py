"""What requests have read, kept for those that begin alike: a tree over blocks of tokens.

    block      the keys and values of one page; the last block of a path may hold fewer tokens than a page
    point      a place after which everything is known: Mamba's state (a snapshot) and, where the draft block needs it,
               the hidden vector of the token before. Points are sparse, for a state is large
    hit        the deepest point at most one token before the end of a text, with all keys and values up to it; a
               model whose layers all keep keys and values, and that no draft block drafts for, needs no points

Whole pages are shared; of a block that a hit ends in, the page is copied. Only verified tokens are ever remembered.
Least recently used blocks and points go first, leaves before what they stand on, and never a page that a row reads.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from trimaran.engine.pages import Memory, Snapshot
from trimaran.engine.pages import Sequence as Pages

SPARE = 32  # making room goes on until one page in this many is free


@dataclass
class Point:
    """Where a text can be taken up again. hidden [D]: of the last token before it; None: not needed."""

    snapshot: Snapshot | None
    hidden: Tensor | None


@dataclass(eq=False)
class Block:
    """Tokens from place `start` on, whose keys and values lie in `page`; points by place, counted from the root."""

    start: int
    tokens: tuple[int, ...]
    page: int | None
    parent: "Block | None"
    children: dict[int, list["Block"]] = field(default_factory=dict)  # by their first token
    points: dict[int, Point] = field(default_factory=dict)

    def kin(self, token: int) -> list["Block"]:
        return self.children.get(token, [])


@dataclass(frozen=True)
class Hit:
    """length: tokens that need not be read again. matched: tokens known at all, of which the last lack a point.

    hidden: the trunk's hidden vector [D] at place length - 1, where points keep one.
    """

    sequence: Pages
    length: int
    matched: int
    hidden: Tensor | None


class PrefixCache:
    """The tree of one memory. hidden: whether a point must keep the last hidden vector, for a draft block."""

    def __init__(self, memory: Memory, hidden: bool):
        self.memory, self.page, self.hidden = memory, memory.page, hidden
        self.pages = memory.pages_for(1) > 0  # whether any layer keeps keys and values
        self.states = "M" in memory.config.pattern
        self.sparse = self.states or hidden
        self.root = Block(0, (), None, None)
        # Both least recently used first. A path is touched from its leaf up, so no block stands before its children.
        self.blocks: OrderedDict[Block, None] = OrderedDict()
        self.points: OrderedDict[tuple[Block, int], None] = OrderedDict()
        self.evictions = 0

    @property
    def held_pages(self) -> int:
        return len(self.blocks) if self.pages else 0

    @property
    def held_snapshots(self) -> int:
        return len(self.points) if self.states else 0

    @property
    def keeps_points(self) -> bool:
        """Whether there is anything to gain from pausing where a point could stand."""
        return self.sparse and bool(self.memory.total_snapshots or not self.states)

    # finding

    def open(self, text: Sequence[int]) -> Hit | None:
        """A sequence that has read the longest known beginning of `text`, its last token excepted.

        None when nothing is known, or when the memory has no slot or page left for it.
        """
        path, place, matched = self.find(text)
        if not place:
            return None
        point = path[-1].points.get(place)
        self._touch(path, place)
        # The rest of the last block will be written by this sequence alone, so it is its own.
        whole = place // self.page if self.pages else 0
        held = [block.page for block in path[:whole] if block.page is not None]
        for page in held:
            self.memory.hold(page)
        if self.pages and place > whole * self.page:
            copied = self._copy(path[whole], place - whole * self.page)
            held += [] if copied is None else [copied]
        sequence = None
        if len(held) == self.memory.pages_for(place):
            sequence = self.memory.restore(None if point is None else point.snapshot, held, place)
        if sequence is None:
            for page in held:
                self.memory.drop(page)
            return None
        if not self.hidden:
            sequence.mtp_length = 0
        return Hit(sequence, place, matched, None if point is None else point.hidden)

    def find(self, text: Sequence[int]) -> tuple[list[Block], int, int]:
        """(blocks up to the hit, its place, tokens known at all), at most all of the text but its last token."""
        last = len(text) - 1
        path: list[Block] = []
        best, best_path, matched = 0, list[Block](), 0
        block: Block | None = self.root
        while block is not None:
            start, onward = len(path) * self.page, None
            for child in block.kin(text[start]) if start < last else []:
                same = common(child.tokens, text, start)
                reach = min(start + same, last)
                matched = max(matched, reach)
                place = max((p for p in child.points if p <= reach), default=0) if self.sparse else reach
                if place > best:
                    best, best_path = place, [*path, child]
                if same == self.page:
                    onward = child
            if onward is not None:
                path.append(onward)
            block = onward
        return best_path, best, matched

    def knows(self, text: Sequence[int], place: int) -> bool:
        """Whether the tree has a point at `place` of `text`; then it counts as just used."""
        path = self._path(text, place)
        if path is None or (self.sparse and place not in path[-1].points):
            return False
        self._touch(path, place)
        return True

    def _path(self, text: Sequence[int], place: int) -> list[Block] | None:
        """The blocks that hold the first `place` tokens of `text`."""
        path = [self.root]
        for start in range(0, place, self.page):
            key = self._key(text, start, place)
            child = next((b for b in path[-1].kin(key[0]) if b.tokens[: len(key)] == key), None)
            if child is None:
                return None
            path.append(child)
        return path

    # remembering

    def remember(self, text: Sequence[int], sequence: Pages, hidden: Tensor | None) -> bool:
        """Keeps what `sequence` has read, the first `sequence.length` tokens of `text`, and makes a point there.

        False when the memory has no room for the point's snapshot.
        """
        place = sequence.length
        if self.knows(text, place):
            return True
        point = Point(None, hidden)
        if self.states:
            point.snapshot = self._snapshot(sequence)
            if point.snapshot is None:
                return False
        path = [self.root]
        for number, start in enumerate(range(0, place, self.page)):
            page = sequence.pages[number] if self.pages else None
            path.append(self._grow(path[-1], start, self._key(text, start, place), page))
        if self.sparse:
            path[-1].points[place] = point
        self._touch(path, place)
        return True

    def _key(self, text: Sequence[int], start: int, place: int) -> tuple[int, ...]:
        return tuple(text[start : min(start + self.page, place)])

    def _grow(self, parent: Block, start: int, key: tuple[int, ...], page: int | None) -> Block:
        """The child of `parent` with the tokens `key`: one that has them, one that lacks the last of them, or new."""
        for child in parent.kin(key[0]):
            if child.tokens[: len(key)] == key:
                return child
            if key[: len(child.tokens)] == child.tokens:  # it ended earlier in the same block, so it has no children
                if page is not None and child.page is not None:
                    self.memory.hold(page)
                    self.memory.drop(child.page)
                child.tokens, child.page = key, page
                return child
        if page is not None:
            self.memory.hold(page)
        block = Block(start, key, page, parent)
        parent.children.setdefault(key[0], []).append(block)
        return block

    def _snapshot(self, sequence: Pages) -> Snapshot | None:
        snapshot = self.memory.snapshot(sequence)
        if snapshot is None and self._forget_oldest():
            snapshot = self.memory.snapshot(sequence)
        return snapshot

    def _touch(self, path: list[Block], place: int) -> None:
        for block in reversed(path):
            if block.parent is not None:
                self.blocks[block] = None
                self.blocks.move_to_end(block)
        if place in path[-1].points:
            self.points[path[-1], place] = None
            self.points.move_to_end((path[-1], place))

    def _copy(self, block: Block, rows: int) -> int | None:
        assert block.page is not None
        return self.memory.copy_page(block.page, rows)

    # forgetting

    def make_room(self, pages: int) -> bool:
        """Forgets until `pages` are free; forgets nothing and says False where that cannot be reached."""
        missing = pages - self.memory.free_pages
        if missing <= 0:
            return True
        if sum(map(self._only_mine, self.blocks)) < missing:
            return False
        # A few more at once: looking through the tree for every page that a growing row needs would be slow.
        spare = pages + self.memory.total_pages // SPARE
        for frees in (True, False):  # a leaf that a row still reads frees nothing but the way to those it stands on
            for block in list(self.blocks):
                if self.memory.free_pages >= (spare if frees else pages):
                    break
                if not block.children and block in self.blocks and (not frees or self._only_mine(block)):
                    self._remove(block)
        return True

    def _only_mine(self, block: Block) -> bool:
        return block.page is not None and self.memory.references(block.page) == 1

    def clear(self) -> None:
        """Forgets everything."""
        while self.blocks:
            self._remove(next(iter(self.blocks)), evicted=False)

    def _remove(self, block: Block, evicted: bool = True) -> None:
        """Forgets a leaf, and what it stood on as far as nothing else needs that."""
        while block.parent is not None and not block.children:
            parent = block.parent
            for place in list(block.points):
                self._forget(block, place)
            if block.page is not None:
                self.memory.drop(block.page)
            kin = parent.children[block.tokens[0]]
            kin.remove(block)
            if not kin:
                del parent.children[block.tokens[0]]
            del self.blocks[block]
            self.evictions += evicted
            # Keys and values below the last point bring nothing back, where only points do.
            if not self.sparse or parent.points:
                return
            block = parent

    def _forget(self, block: Block, place: int) -> None:
        snapshot = block.points.pop(place).snapshot
        del self.points[block, place]
        if snapshot is not None:
            self.memory.release(snapshot)

    def _forget_oldest(self) -> bool:
        """Forgets the point that was not used for longest."""
        if not self.points:
            return False
        block, place = next(iter(self.points))
        self._forget(block, place)
        self.evictions += 1
        if not block.children and not block.points:
            self._remove(block)
        return True


def common(key: Sequence[int], text: Sequence[int], start: int) -> int:
    """How many of the first tokens of `key` stand in `text` from `start` on."""
    if list(text[start : start + len(key)]) == list(key):
        return len(key)
    pairs = zip(key, text[start : start + len(key)], strict=False)
    return next((number for number, (one, other) in enumerate(pairs) if one != other), min(len(key), len(text) - start))
