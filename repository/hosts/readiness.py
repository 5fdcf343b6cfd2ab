"""What a model says of its own readiness, for whoever asks however often.

It is asked on its own thread, between two groups of requests, so it may take its time: nobody waits
longer than WAIT_S, and one that computes is what it said last. Before it has said anything it is ready:
it was loaded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from repository.errors import RepositoryError

FRESH_S = 1.0  # as long as it need not say it again
WAIT_S = 0.5
log = logging.getLogger(__name__)


class Readiness:
    """`ask`: asks every instance. One that says no, or fails, is enough for no."""

    def __init__(self, model: str, ask: Callable[[], Awaitable[list[bool]]]) -> None:
        self._model = model
        self._ask = ask
        self._said = True
        self._said_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def now(self) -> bool:
        loop = asyncio.get_running_loop()
        if loop.time() - self._said_at >= FRESH_S:
            if self._asking is None:
                self._asking = asyncio.create_task(self._renew(loop))
            await asyncio.wait([self._asking], timeout=WAIT_S)
        return self._said

    def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()

    async def _renew(self, loop: asyncio.AbstractEventLoop) -> None:
        before = self._said
        try:
            self._said = all(await self._ask())
        except RepositoryError as error:
            self._said = False
            if before:
                log.warning("%s cannot say whether it is ready: %s", self._model, error)
        finally:
            self._said_at, self._asking = loop.time(), None
