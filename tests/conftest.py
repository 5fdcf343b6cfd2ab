"""For every test: no event loop hangs about that no test made; SIGINT interrupts."""

from __future__ import annotations

import asyncio
import signal


def pytest_configure() -> None:
    # Without this, pytest-asyncio asks for "the current loop" before the first async test, asyncio
    # makes one for it, and nobody closes that: an error at the end of the session.
    asyncio.set_event_loop(None)
    # A background job of a shell that is not interactive, as in many a CI, begins with SIGINT ignored,
    # and so does all that it starts. Tests that interrupt a child mean it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
