"""GET /v1/events: what happens, as server-sent events.

`id` rises; come back with `Last-Event-ID` (or `?after=`) to get what was missed, as far as it is
kept. `event` is the kind, `data` one line of JSON. `?model=` keeps one model's events (and those
that belong to no model). A slow reader gets an event of kind "lost" with the count in place of what
it missed; the stream ends with "server.draining" when the server goes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import msgspec
from litestar import Request, Router, get
from litestar.di import NamedDependency
from litestar.params import FromQuery
from litestar.types import ASGIApp

from repository.errors import InvalidRequestError
from repository.events import Event, Subscription
from repository.repository import Repository
from server import streams
from server.settings import Settings

PATH = "/v1/events"
LONGEST_ID = 18  # digits

encode = msgspec.json.Encoder().encode


@get(PATH, sync_to_thread=False)
def events(
    request: Request,  # type: ignore[type-arg]
    models: NamedDependency[Repository],
    settings: NamedDependency[Settings],
    closing: NamedDependency[asyncio.Event],
    after: FromQuery[str | None] = None,
    model: FromQuery[str | None] = None,
) -> ASGIApp:
    since = _id_of(request.headers.get("last-event-id") or after)

    @contextmanager
    def opened() -> Iterator[AsyncIterator[bytes]]:
        with models.events.subscribe(since) as listener:
            yield Frames(listener, model)

    return streams.EventStream(opened, keepalive_s=settings.keepalive, draining=closing)


class Frames:
    """The listener's events as frames; an empty one for an event that the filter leaves out.

    A class, not a generator: a wait that was cancelled (for a sign of life) can be begun again.
    """

    def __init__(self, listener: Subscription, model: str | None) -> None:
        self._listener = listener
        self._model = model

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        event = await anext(self._listener)
        if self._model and event.model and event.model != self._model:
            return b""
        return frame_of(event)


def frame_of(event: Event) -> bytes:
    return streams.frame(encode(event), id=event.id, event=event.kind)


def _id_of(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > LONGEST_ID:
        raise InvalidRequestError("the last event's id must be a whole number, such as 17")
    return int(text)


router = Router("/", route_handlers=[events])
