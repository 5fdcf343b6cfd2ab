"""Who holds how many bytes of one device. The ledger never measures and never waits; it adds.

Waiting is the business of `admission`, which sees the whole queue: a ledger that is only ever changed
between two awaits cannot hold a ticket for somebody who has left.

    capacity   what the operator lets us use; reservations never exceed it
    total      what the device has; None: nobody can tell
    foreign    of it, what others use: it is measured, and set from outside
    margin     of it, what stays free: drivers and allocators round up
"""

from __future__ import annotations

from repository.lifecycle.placement import HOST

MARGIN = 0.02  # of a GPU's memory
LEAST_MARGIN = 64 << 20  # bytes, on a GPU


def margin_of(device: str, total: int | None) -> int:
    """Bytes of a device that are handed out to nobody. Host memory has its budget for that."""
    if total is None or device in ("cpu", HOST):
        return 0
    return min(total, max(LEAST_MARGIN, int(total * MARGIN)))


class MemoryLedger:
    """Invariant: 0 <= held <= capacity, and held is the sum of what was taken and not given. Bytes."""

    def __init__(
        self, device: str, capacity: int, *, total: int | None = None, margin: int = 0
    ) -> None:
        self.device = device
        self.capacity = capacity
        self.total = total
        self.margin = margin
        self.foreign = 0
        self.held = 0

    @property
    def ceiling(self) -> int:
        """The most that all models together could have, if nobody else used the device."""
        if self.total is None:
            return self.capacity
        return max(0, min(self.capacity, self.total - self.margin))

    @property
    def usable(self) -> int:
        """The same with what others use now. It may be less than what is held already."""
        if self.total is None:
            return self.capacity
        return max(0, min(self.capacity, self.total - self.foreign - self.margin))

    @property
    def free(self) -> int:
        return max(0, self.usable - self.held)

    def most(self, share: float | None) -> int:
        """What a model may need that is allowed this part of the budget, 0..1; None: all that there
        can be."""
        return self.ceiling if share is None else min(self.ceiling, int(self.capacity * share))

    def take(self, n_bytes: int) -> None:
        if not 0 <= n_bytes <= self.free:
            raise AssertionError(f"{self.device}: take {n_bytes} of {self.free} free bytes")
        self.held += n_bytes

    def give(self, n_bytes: int) -> None:
        if not 0 <= n_bytes <= self.held:
            raise AssertionError(f"{self.device}: give {n_bytes} of {self.held} held bytes")
        self.held -= n_bytes
