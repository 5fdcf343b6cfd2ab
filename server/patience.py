"""Waiting for an answer only as long as somebody wants it."""

from __future__ import annotations

import asyncio
import logging

from litestar.types import Receive

from repository.errors import WorkerDiedError
from repository.messages import InferResponse
from server.errors import DeadlineError
from server.intake import ClientGoneError

log = logging.getLogger("modeldepot.v2")

# An answer that comes sooner is not worth a task that watches whether the client is still there.
WATCH_AFTER_S = 0.02
LONGEST_S = 1e6


async def answer_of(
    future: asyncio.Future[InferResponse], receive: Receive, *, limit_s: float = 0.0
) -> InferResponse:
    """The answer. The body must have been read: what `receive` tells next is that the client left.

    Cancels the future and raises ClientGoneError when it has, DeadlineError after `limit_s` (0: no
    limit). Cancelled itself, it cancels the future too.
    """
    if future.done():
        return future.result()
    watch = _Watch(future, receive)
    loop = asyncio.get_running_loop()
    timers = [loop.call_later(WATCH_AFTER_S, watch.begin)]
    if limit_s:
        timers.append(loop.call_later(min(limit_s, LONGEST_S), watch.give_up, "late"))
    try:
        return await future
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise watch.reason() from None
    finally:
        for timer in timers:
            timer.cancel()
        watch.end()


class _Watch:
    """Cancels the future when nobody waits for it any more, and knows why."""

    __slots__ = ("_future", "_receive", "_task", "_why")

    def __init__(self, future: asyncio.Future[InferResponse], receive: Receive) -> None:
        self._future = future
        self._receive = receive
        self._task: asyncio.Task[None] | None = None
        self._why = ""

    def begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._until_gone())

    async def _until_gone(self) -> None:
        try:
            while (await self._receive())["type"] == "http.request":
                pass
        except Exception:  # a connection that breaks is a client that is gone
            log.debug("the connection broke while its request ran", exc_info=True)
        self.give_up("gone")

    def give_up(self, why: str) -> None:
        self._why = self._why or why
        self._future.cancel()

    def reason(self) -> Exception:
        if self._why == "gone":
            return ClientGoneError()
        if self._why == "late":
            return DeadlineError("Request timeout expired")
        return WorkerDiedError("the model was stopped before it had answered; ask again")

    def end(self) -> None:
        if self._task is not None:
            self._task.cancel()
