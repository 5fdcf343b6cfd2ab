"""How quickly a host answers, and what follows: how far ahead it is sent work, and whether a batch
waits for those who have just been answered.

Rule: only figures are kept here, nothing of a request. All moments are the caller's clock, in
seconds. It must not know who waits, nor set a timer.
"""

from __future__ import annotations

import math

# What waits at the worker saves its way (a worker that finds its next work there needs not be woken,
# nor we for each answer) but cannot be taken back, nor be overtaken: so many requests of a model
# without batching are sent after the one that runs, and no more than a few milliseconds of work.
# With several slots it is one: the others may have nothing left to do.
AHEAD, AHEAD_OF_SEVERAL, AHEAD_S = 7, 1, 0.005

# Whoever has just been answered often asks again at once. A batch that could take all of them waits
# for them a moment, a part of the time that the last one took; or two groups of clients would take
# turns for ever, each in half a batch. Where less than half of them come it is left for a while.
PATIENCE, LEAST_PATIENCE_S, MOST_PATIENCE_S, MOST_SKIPPED = 0.25, 0.0005, 0.002, 64


class Pace:
    """`per_request_s`: of late, from one answer to the next while there is work.

    `room`: calls that the host may have at a time (where requests are merged, one for each slot).
    """

    def __init__(self, slots: int, *, merges: bool) -> None:
        self.per_request_s = 0.0
        self.room = slots
        self._slots = slots
        self._ahead = 0 if merges else AHEAD if slots == 1 else AHEAD_OF_SEVERAL
        self._answered_at = -math.inf

    def answered(self, now: float, started: float, requests: int) -> float:
        """The host's own time for a call that was sent at `started`."""
        took_s = now - max(started, self._answered_at)
        self._answered_at = now
        each_s = took_s / requests
        self.per_request_s += (each_s - self.per_request_s) / (16 if self.per_request_s else 1)
        if self._ahead:
            ahead = AHEAD_S // (self.per_request_s * self._slots + 1e-6)
            self.room = self._slots * (1 + min(self._ahead, int(ahead)))
        return took_s


class Reunion:
    """Whether the next batch waits for those who were in the last one. `most`: requests of one.

    Only for a lone slot: with several, those who come back have another to go to.
    """

    def __init__(self, most: int) -> None:
        self.until = 0.0
        self._most = most
        self._everyone = self._enough = 0
        self._skip = self._skipping = 0  # batches that do not wait, in all and still to come

    def answered(self, now: float, took_s: float, requests: int, waiting: int) -> None:
        """`requests` have been answered after `took_s`, and others wait already."""
        self._everyone = 0
        patience_s = min(took_s * PATIENCE, MOST_PATIENCE_S)
        if patience_s < LEAST_PATIENCE_S or requests + waiting > self._most:
            return
        if self._skipping:
            self._skipping -= 1
            return
        self._everyone = requests + waiting
        self._enough = waiting + (requests + 1) // 2
        self.until = now + patience_s

    def awaits(self, here: int, now: float) -> bool:
        """Whether a batch of `here` requests should wait, until `until` at most."""
        if not self._everyone:
            return False
        if here < self._everyone and now < self.until:
            return True
        self._everyone = 0
        self._skip = 0 if here >= self._enough else min(2 * self._skip + 1, MOST_SKIPPED)
        self._skipping = self._skip
        return False
