"""For every test: no event loop hangs about that no test made."""

from __future__ import annotations

import asyncio


def pytest_configure() -> None:
    # Without this, pytest-asyncio asks for "the current loop" before the first async test, asyncio
    # makes one for it, and nobody closes that: an error at the end of the session.
    asyncio.set_event_loop(None)
