"""How many calls that change something one client may have under way at once.

A load answers when the model is ready, so calls can pile up for minutes, and each of them holds a
connection and what it asked for. One client that asks without waiting (a loop without a limit, a
retry that gives up too early) is told so with 429, and the others are not kept out by it. Who stays
below it is never refused for how often it asks.
"""

from __future__ import annotations

from collections import Counter

from server.refusals import TooManyRequestsError

CALLS_AT_ONCE = 256
RETRY_S = 1.0


class Turnstile:
    """`enter` and `leave` come in pairs. `who`: one client, by its key or its address."""

    def __init__(self, most: int = CALLS_AT_ONCE) -> None:
        self._most = most
        self._inside: Counter[str] = Counter()

    def enter(self, who: str) -> None:
        """Raises TooManyRequestsError; then nothing is to be left."""
        if self._inside[who] >= self._most:
            raise TooManyRequestsError(
                f"{self._most} of your calls are under way, as many as may be at once; "
                "wait until one of them is answered",
                retry_after_s=RETRY_S,
            )
        self._inside[who] += 1

    def leave(self, who: str) -> None:
        self._inside[who] -= 1
        if not self._inside[who]:
            del self._inside[who]
