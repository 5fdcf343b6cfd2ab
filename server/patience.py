"""Waiting for an answer only as long as somebody wants it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, TypeVar

from litestar.types import Receive

from repository.errors import WorkerDiedError
from server.intake import ClientGoneError

log = logging.getLogger("modeldepot.v2")

T = TypeVar("T")

# An answer that comes sooner is not worth a task that watches whether the client is still there.
WATCH_AFTER_S = 0.02


async def answer_of(future: asyncio.Future[T], receive: Receive) -> T:
    """The answer. The body must have been read: what `receive` tells next is that the client left.

    Cancels the future and raises ClientGoneError when it has. Cancelled itself, it cancels the future
    too.
    """
    if future.done():
        return future.result()
    watch = _Watch(future, receive)
    timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, watch.begin)
    try:
        return await future
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise (ClientGoneError() if watch.saw_it_leave else _stopped()) from None
    finally:
        timer.cancel()
        watch.end()


def error_of(future: asyncio.Future[Any]) -> Exception | None:
    """What a future that is done failed with."""
    if future.cancelled():
        return _stopped()
    error = future.exception()
    return error if error is None or isinstance(error, Exception) else _stopped()


def _stopped() -> Exception:
    return WorkerDiedError("the model was stopped before it had answered; ask again")


class _Watch:
    """Cancels the future when its client has left."""

    __slots__ = ("_future", "_receive", "_task", "saw_it_leave")

    def __init__(self, future: asyncio.Future[Any], receive: Receive) -> None:
        self._future = future
        self._receive = receive
        self._task: asyncio.Task[None] | None = None
        self.saw_it_leave = False

    def begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._until_gone())

    async def _until_gone(self) -> None:
        try:
            while (await self._receive())["type"] == "http.request":
                pass
        except Exception:  # a connection that breaks is a client that is gone
            log.debug("the connection broke while its request ran", exc_info=True)
        self.saw_it_leave = True
        self._future.cancel()

    def end(self) -> None:
        # Holding each other, they and the memory of the request would wait for the garbage collector.
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
