"""How busy the machine's cores are, without waiting for it.

The kernel counts since it was started; what is told is the difference between two looks: this one and
the last, or, for whoever asks again before SHORTEST_S has passed, what was told last.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

SHORTEST_S = 0.2  # the kernel counts in hundredths of a second


def counted() -> tuple[float, float]:
    """Seconds of all cores since the machine was started: busy, and in all."""
    times = psutil.cpu_times()._asdict()
    # What guests took is in `user` and `nice` already.
    total = sum(value for name, value in times.items() if not name.startswith("guest"))
    return total - times["idle"] - times.get("iowait", 0.0), total


class Cpu:
    """Of all cores of the machine together. The first figure is the mean since it was made."""

    def __init__(
        self,
        count: Callable[[], tuple[float, float]] = counted,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count = count
        self._clock = clock
        self._looked_at = clock()
        self._seen = count()
        self._told = 0.0

    def busy(self) -> float:
        """0..1, between the last call and this one."""
        now = self._clock()
        if now - self._looked_at >= SHORTEST_S:
            (was_busy, was_all), self._seen = self._seen, self._count()
            busy, every = self._seen[0] - was_busy, self._seen[1] - was_all
            self._looked_at = now
            self._told = min(1.0, max(0.0, busy / every)) if every > 0 else 0.0
        return self._told
