"""For every test: no event loop hangs about that no test made; SIGINT interrupts; and where several
processes share the tests (`pytest -n`), one that is marked `alone` has the machine to itself.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pytest

SHARED = "PYTEST_XDIST_WORKER" in os.environ
# Files to lock; what is in them does not matter. The door keeps those who come later from slipping
# past one who waits until the room is empty.
DOOR, ROOM = os.path.dirname(__file__), __file__


def pytest_configure() -> None:
    # Without this, pytest-asyncio asks for "the current loop" before the first async test, asyncio
    # makes one for it, and nobody closes that: an error at the end of the session.
    asyncio.set_event_loop(None)
    # A background job of a shell that is not interactive, as in many a CI, begins with SIGINT ignored,
    # and so does all that it starts. Tests that interrupt a child mean it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    # What was imported until now stays to the end: no collection of a test need look through it.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)  # so early that waiting is no part of the test's time
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if not SHARED:
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    with _locked(ROOM, fcntl.LOCK_EX if alone else fcntl.LOCK_SH):
        return (yield)


@contextmanager
def _locked(path: str, how: int) -> Iterator[None]:
    room, door = (os.open(each, os.O_RDONLY | os.O_CLOEXEC) for each in (path, DOOR))
    try:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, how)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield
        fcntl.flock(room, fcntl.LOCK_UN)  # a child that a test forked may still have the file
    finally:
        os.close(room)
        os.close(door)
