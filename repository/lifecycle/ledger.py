"""Who holds how many bytes of one device. The ledger never measures and never waits; it adds.

Waiting is the business of `admission`, which sees the whole queue: a ledger that is only ever changed
between two awaits cannot hold a ticket for somebody who has left.
"""

from __future__ import annotations


class MemoryLedger:
    """Invariant: 0 <= held <= capacity, and held is the sum of what was taken and not given. Bytes."""

    def __init__(self, device: str, capacity: int) -> None:
        self.device = device
        self.capacity = capacity
        self.held = 0

    @property
    def free(self) -> int:
        return self.capacity - self.held

    def most(self, share: float | None) -> int:
        """What a model may need that is allowed this part of the device, 0..1; None: all of it."""
        return self.capacity if share is None else int(self.capacity * share)

    def take(self, n_bytes: int) -> None:
        if not 0 <= n_bytes <= self.free:
            raise AssertionError(f"{self.device}: take {n_bytes} of {self.free} free bytes")
        self.held += n_bytes

    def give(self, n_bytes: int) -> None:
        if not 0 <= n_bytes <= self.held:
            raise AssertionError(f"{self.device}: give {n_bytes} of {self.held} held bytes")
        self.held -= n_bytes
