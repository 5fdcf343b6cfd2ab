"""One at a time for each name, and never half a call; nothing is kept of a name that nobody wants."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class Turns:
    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}  # and how many have it or wait for it
        self._running: set[asyncio.Task[Any]] = set()
        self._takers: Counter[str] = Counter()  # of calls that have begun or wait

    @asynccontextmanager
    async def of(self, name: str) -> AsyncGenerator[None]:
        """First come, first served."""
        lock, users = self._locks.get(name) or (asyncio.Lock(), 0)
        self._locks[name] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks.pop(name)
            if users > 1:
                self._locks[name] = lock, users - 1

    async def take(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        """`call` in its turn. A caller that leaves does not leave half a call behind."""

        async def turn() -> T:
            async with self.of(name):
                return await call()

        task = asyncio.create_task(turn(), name=f"turn of {name}")
        self._running.add(task)
        self._takers[name] += 1
        task.add_done_callback(partial(self._over, name))
        return await asyncio.shield(task)

    def busy(self, name: str) -> bool:
        """Somebody has taken a turn that is not over."""
        return name in self._takers

    async def over(self) -> None:
        """Returns when no call is under way."""
        while self._running:
            await asyncio.wait(self._running)

    def _over(self, name: str, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        self._takers[name] -= 1
        if not self._takers[name]:
            del self._takers[name]
        if not task.cancelled():
            task.exception()  # the caller may have left

    def __len__(self) -> int:
        return len(self._locks)
