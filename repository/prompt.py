"""A future that tells one listener at once, not in the loop's next iteration.

Between a worker's answer and the client's socket stand three futures' worth of waiting; each callback
that goes through the loop costs a handle and, on a quiet loop, one more look at all sockets. Who takes
part in that relay listens here; everybody else awaits it or adds callbacks, as with any future.

Rule: a listener is told exactly once, when the future is done, however that came. It must not raise;
if it does all the same, the loop's exception handler hears of it and nobody else.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any, TypeVar

from repository.errors import InferenceFailedError, RepositoryError, WorkerDiedError

T = TypeVar("T")
Listener = Callable[[Any], None]


class Prompt(asyncio.Future[T]):
    """Whoever makes one sets `listener` to None: an __init__ would cost as much as the future."""

    __slots__ = ("listener",)

    listener: Listener | None

    def set_result(self, result: T) -> None:
        super().set_result(result)
        if self.listener is not None:
            self._tell()

    def set_exception(self, error: type | BaseException) -> None:
        super().set_exception(error)
        if self.listener is not None:
            self._tell()

    def cancel(self, msg: Any | None = None) -> bool:
        cancelled = super().cancel(msg)
        if cancelled and self.listener is not None:
            # Whoever cancels is in the middle of something.
            self.get_loop().call_soon(self._tell)
        return cancelled

    def _tell(self) -> None:
        listener, self.listener = self.listener, None
        if listener is None:
            return
        try:
            listener(self)
        except Exception as error:  # noqa: BLE001 - the edge to whoever listens
            self.get_loop().call_exception_handler(
                {"message": "a listener has failed", "exception": error, "future": self}
            )


def listen(future: asyncio.Future[Any], listener: Listener) -> None:
    """Tells `listener` when it is done: at once where it can be, else as any callback."""
    if isinstance(future, Prompt) and future.listener is None and not future.done():
        future.listener = listener
    else:
        future.add_done_callback(listener)


def error_of(future: asyncio.Future[Any]) -> BaseException | None:
    """What it failed with; not raised: a traceback would tie it to the future that holds it, and both
    to the requests, whose memory would then wait for the garbage collector."""
    return asyncio.CancelledError() if future.cancelled() else future.exception()


def own(error: BaseException, stopped: str) -> RepositoryError:
    """What a host failed with, as one of ours; a copy, for an exception that several wait for would
    collect all their tracebacks. `stopped`: what to say of a cancellation."""
    if isinstance(error, RepositoryError):
        mine = copy.copy(error)
        mine.__cause__ = error.__cause__
        return mine
    if isinstance(error, asyncio.CancelledError):
        return WorkerDiedError(stopped)
    found = InferenceFailedError(f"{type(error).__name__}: {error}")
    found.__cause__ = error
    return found
