"""What happened, for whoever listens. Publishing never waits; a slow listener loses the oldest."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

KEPT = 1024  # events kept for listeners that come back with the id of the last one they saw
PENDING = 256  # events that may wait for one listener


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """`kind`: model.state, model.added, model.changed, model.removed, model.problem, model.evicted,
    model.asleep, model.woken, model.rolled_back, model.pin_refused, adapter.registered, adapter.updated,
    adapter.unregistered, adapter.failed, repository.problem, load.started, load.finished,
    unload.finished, scan.failed, journal.failed, journal.mended, server.ready, server.draining, lost.

    `at` is seconds since 1970. `data` depends on the kind and is JSON-able.
    """

    id: int
    kind: str
    at: float
    model: str = ""
    version: int = 0
    generation: int = 0
    data: dict[str, Any] = msgspec.field(default_factory=dict)


class Subscription:
    """Iterate it. An Event of kind "lost" with data {"count": n} stands where n were dropped."""

    def __init__(self, missed: list[Event] | None = None, lost: int = 0) -> None:
        """`missed` is given first, however many; `lost`: how many before them are no longer kept."""
        self._waiting: deque[Event] = deque(missed or ())
        self._room = PENDING + len(self._waiting)
        self._lost = lost
        self._some = asyncio.Event()
        self._closed = False

    def offer(self, event: Event) -> None:
        if len(self._waiting) >= self._room:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(event)
        self._some.set()

    def close(self) -> None:
        """Ends the iteration once what waits has been read."""
        self._closed = True
        self._some.set()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._waiting:
            if self._closed:
                raise StopAsyncIteration
            self._some.clear()
            await self._some.wait()
        if self._lost:
            count, self._lost = self._lost, 0
            first = self._waiting[0]
            return Event(first.id - 1, "lost", first.at, data={"count": count})
        return self._waiting.popleft()


class EventBus:
    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._next = 1
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._listeners: set[Subscription] = set()
        self._closed = False

    def publish(
        self, kind: str, model: str = "", version: int = 0, generation: int = 0, **data: Any
    ) -> Event:
        event = Event(self._next, kind, self._clock(), model, version, generation, data)
        self._next += 1
        self._kept.append(event)
        for listener in self._listeners:
            listener.offer(event)
        return event

    @contextmanager
    def subscribe(self, after: int | None = None) -> Iterator[Subscription]:
        """Events from now on; with `after`, first those kept with a larger id.

        Ids begin again with the server: an `after` that was not reached yet is one of an earlier
        life, whose listener has seen nothing of this one.
        """
        listener = Subscription()
        if after is not None:
            after = after if after < self._next else 0
            missed = [event for event in self._kept if event.id > after]
            lost = missed[0].id - after - 1 if missed else 0
            listener = Subscription(missed, lost)
        self._listeners.add(listener)
        if self._closed:
            listener.close()
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    def close(self) -> None:
        """The server is going: every listener ends after what it has still to read."""
        self._closed = True
        for listener in self._listeners:
            listener.close()
