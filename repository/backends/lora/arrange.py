"""How the rows of a batch are put before the slots of a layer. Pure: numbers in, numbers out.

The slots of a layer lie side by side in one tensor. Copying the adapter of each row out of it costs
more than the matrix products themselves; bringing the rows, which are small, into the order of the
slots costs little, and where they lie in that order already, nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows with adapters, one group for each of `count` slots, all padded to `size` rows.

    rows    which they are, group by group
    places  where in the padded groups each of `rows` lies
    padded  the row at each place of the padded groups: any row where there is none
    slots   of the groups; None: `first` and those behind it, one after another
    begin   the rows lie one behind another from here, in just this order and without padding; None:
            they have to be brought into it
    """

    rows: tuple[int, ...]
    places: tuple[int, ...]
    padded: tuple[int, ...]
    count: int
    size: int
    first: int
    slots: tuple[int, ...] | None = None
    begin: int | None = field(default=None)


def arrange(slots: Sequence[int]) -> list[Groups]:
    """Of rows of which at least one is not of slot 0. Rows of slot 0 are in no group."""
    rows_of: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        if slot:
            rows_of.setdefault(slot, []).append(row)
    return [_together({slot: rows_of[slot] for slot in part}) for part in _parts(rows_of)]


def _parts(rows_of: dict[int, list[int]]) -> list[list[int]]:
    """The slots, split by how many rows they have where padding all to the most would be waste."""
    by_size = sorted(rows_of, key=lambda slot: len(rows_of[slot]))
    parts: list[list[int]] = []
    for slot in by_size:
        if parts and len(rows_of[slot]) <= 2 * len(rows_of[parts[-1][0]]):
            parts[-1].append(slot)
        else:
            parts.append([slot])
    return [sorted(part) for part in parts]


def _together(rows_of: dict[int, list[int]]) -> Groups:
    taken = list(rows_of)
    first, last = taken[0], taken[-1]
    # A slot that is read in vain costs a third of one that is copied.
    side_by_side = last - first + 1 <= 2 * len(taken)
    groups = list(range(first, last + 1)) if side_by_side else taken
    size = max(map(len, rows_of.values()))
    rows: list[int] = []
    places: list[int] = []
    padded: list[int] = []
    for at, slot in enumerate(groups):
        own = rows_of.get(slot, [])
        rows += own
        places += range(at * size, at * size + len(own))
        padded += own + [0] * (size - len(own))
    straight = len(padded) == len(rows) and rows == list(range(rows[0], rows[0] + len(rows)))
    return Groups(
        rows=tuple(rows),
        places=tuple(places),
        padded=tuple(padded),
        count=len(groups),
        size=size,
        first=first,
        slots=None if side_by_side else tuple(taken),
        begin=rows[0] if straight else None,
    )
