"""Which adapter is in which slot, who uses it, and which one goes when another must come. Pure.

Slot 0 is the model itself and not in here. An adapter that was swapped or removed while somebody used
it keeps its slot, without a name, until the last one has given it back.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Slot:
    holder: str = ""  # a key of an adapter; "": nobody that could still be asked for
    uses: int = 0
    pinned: bool = False
    last: int = 0


class SlotTable:
    """A key names an adapter and its files: another fingerprint is another key. Slots are 1 ... n."""

    def __init__(self, count: int) -> None:
        self._slots = {number: _Slot() for number in range(1, count + 1)}
        self._of: dict[str, int] = {}
        self._time = 0

    def __len__(self) -> int:
        return len(self._slots)

    def find(self, key: str) -> int | None:
        return self._of.get(key)

    def free(self) -> int | None:
        """A slot for another adapter: an empty one, else the one that has not been taken for the
        longest time. None: all are in use or pinned."""
        idle = [n for n, slot in self._slots.items() if not slot.uses and not slot.pinned]
        return min(
            idle, key=lambda n: (bool(self._slots[n].holder), self._slots[n].last), default=None
        )

    @property
    def pinned(self) -> int:
        return sum(slot.pinned for slot in self._slots.values())

    def put(self, number: int, key: str) -> None:
        """Into a slot that `free` gave: whoever was there is in no slot any more."""
        slot = self._slots[number]
        assert not slot.uses and not slot.pinned
        self._of.pop(slot.holder, None)
        self._of[key] = number
        slot.holder = key
        self._touch(slot)

    def pin(self, number: int, pinned: bool) -> None:
        self._slots[number].pinned = pinned

    def drop(self, key: str) -> None:
        """Nobody will ask for this key again."""
        number = self._of.pop(key, None)
        if number is not None:
            slot = self._slots[number]
            slot.holder, slot.pinned, slot.last = "", False, 0

    def take(self, number: int) -> None:
        slot = self._slots[number]
        slot.uses += 1
        self._touch(slot)

    def give(self, number: int) -> bool:
        """True: nobody uses it any more. Raises ValueError for a slot that nobody has taken."""
        slot = self._slots.get(number)
        if slot is None or not slot.uses:
            raise ValueError(f"adapter slot {number} was given back, but not taken")
        slot.uses -= 1
        return not slot.uses

    def _touch(self, slot: _Slot) -> None:
        self._time += 1
        slot.last = self._time
