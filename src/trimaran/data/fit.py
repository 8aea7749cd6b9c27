"""Best-fit packing: examples into rows without cutting any.

Longest first, each goes to the row that it leaves the least room in (best-fit decreasing), a new one where none has
room. Among equals the order given decides, so a shuffled order gives other rows and the same seed the same ones.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field


@dataclass
class Packed:
    """rows: the examples of each, by number. duplicates: how many were left out because their twin was in the row."""

    rows: list[list[int]] = field(default_factory=list)
    duplicates: int = 0


def best_fit(
    order: Sequence[int], lengths: Sequence[int], capacity: int, names: Sequence[Hashable] | None = None
) -> Packed:
    """Rows of at most `capacity` for the examples in `order`, example e being `lengths[e]` long.

    names: examples with equal names are twins, and a row takes one of them; None: all are taken.
    """
    packed = Packed()
    within: list[set[Hashable]] = []
    with_room: dict[int, list[int]] = {}  # room -> rows that have exactly this much, newest last
    rooms: list[int] = []  # the keys of with_room, rising
    for example in sorted(order, key=lambda one: -lengths[one]):
        place = bisect_left(rooms, lengths[example])
        room = rooms[place] if place < len(rooms) else capacity
        if place == len(rooms):
            row = len(packed.rows)
            packed.rows.append([])
            within.append(set())
        else:
            row = with_room[room][-1]
            if names is not None and names[example] in within[row]:
                packed.duplicates += 1
                continue
            with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        packed.rows[row].append(example)
        if names is not None:
            within[row].add(names[example])
        left = room - lengths[example]
        if left not in with_room:
            with_room[left] = []
            insort(rooms, left)
        with_room[left].append(row)
    return packed
