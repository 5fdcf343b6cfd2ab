"""A bound on the time that somebody else's program may take, where it is Python."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _OverError(BaseException):
    """Not an Exception, so that nothing in between takes it for an error of its own."""


@contextmanager
def within(limit_s: float, error: Exception) -> Iterator[None]:
    """Raises `error` in what runs longer. A timer's signal does it, so it holds on the main thread,
    where a worker's backend runs, and not elsewhere; and between two lines of Python, not inside a
    library."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    runs = True

    def over(number: int, frame: FrameType | None) -> None:
        if runs:
            raise _OverError

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
        runs = False
    except _OverError:
        raise error from None
    finally:
        runs = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
