"""Asks a device without holding up the event loop, and without believing that it answers.

A call into a driver that hangs ends never. So it runs in a thread of its own that nobody waits for at
the end, there is one such call at a time, and whoever asks meanwhile gets the answer of that one, or
is told after a while that there is none.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

from repository.errors import DeviceSilentError

T = TypeVar("T")

WITHIN_S = 5.0
RETRY_S = 5.0


def within(read: Callable[[], T], limit_s: float) -> T:
    """What `read` returns or raises, which blocks whoever asks: for the start, before there is a loop to
    hold up. Raises DeviceSilentError past `limit_s`."""
    told: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            told.put((read(), None))
        except Exception as error:  # noqa: BLE001 - whoever waits is told
            told.put((None, error))

    threading.Thread(target=work, name="devices", daemon=True).start()
    try:
        found, failed = told.get(timeout=limit_s)
    except queue.Empty:
        raise _silent(limit_s) from None
    if failed is not None:
        raise failed
    return found  # type: ignore[return-value]  # without an error there is one


def _silent(for_s: float) -> DeviceSilentError:
    return DeviceSilentError(
        f"the GPUs' driver has not answered for {for_s:g} s; does `nvidia-smi` answer?",
        retry_after_s=RETRY_S,
    )


class Readings(Generic[T]):
    """`read` blocks; what it raises, everybody who waits is told."""

    def __init__(self, read: Callable[[], T], *, within_s: float = WITHIN_S) -> None:
        self._read = read
        self._within_s = within_s
        self._asked: asyncio.Future[T] | None = None

    async def now(self) -> T:
        """Raises DeviceSilentError when it takes too long."""
        if self._asked is None or self._asked.done():
            self._asked = self._ask()
        try:
            async with asyncio.timeout(self._within_s):
                return await asyncio.shield(self._asked)
        except TimeoutError as error:
            raise _silent(self._within_s) from error

    def _ask(self) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def give(found: T | None, error: Exception | None) -> None:
            if answer.cancelled():
                return
            if error is not None:
                answer.set_exception(error)
                answer.exception()  # where all who waited have left, nobody else looks at it
            else:
                answer.set_result(found)  # type: ignore[arg-type]  # without an error there is one

        def work() -> None:
            found, failed = None, None
            try:
                found = self._read()
            except Exception as error:  # noqa: BLE001 - whoever waits is told
                failed = error
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(give, found, failed)

        threading.Thread(target=work, name="devices", daemon=True).start()
        return answer
