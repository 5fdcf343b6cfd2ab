"""Server-sent events, written straight to ASGI so that a client that has left is noticed at once.

Rules: a stream ends when its source ends, when the client leaves, or shortly after the server began
to drain, whether the client reads or not. A slow client holds up only itself: what waits for it is
bounded by the source. Nothing here knows what the events mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager

from litestar.types import Receive, Scope, Send

LAST_WORDS_S = 1.0  # after the drain began, for a client to take what is still on its way

START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),
    ],
}
PING = b": keep-alive\n\n"


def frame(data: bytes, *, id: int | None = None, event: str = "") -> bytes:
    """One event. `data` is one line (compact JSON is)."""
    head = b"" if id is None else b"id: %d\n" % id
    if event:
        head += b"event: %s\n" % event.encode()
    return b"%sdata: %s\n\n" % (head, data)


class EventStream:
    """An ASGI answer: the frames of `opened`, a comment whenever `keepalive_s` pass without one.

    `opened` gives the source; leaving it frees whatever it holds. `draining` is set when the server
    is going. An empty frame from the source is skipped.
    """

    def __init__(
        self,
        opened: Callable[[], AbstractContextManager[AsyncIterator[bytes]]],
        *,
        keepalive_s: float,
        draining: asyncio.Event,
    ) -> None:
        self._opened = opened
        self._keepalive_s = keepalive_s
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.create_task(self._write(send))
        gone = asyncio.create_task(_left(receive))
        going = asyncio.create_task(self._last_words())
        try:
            await asyncio.wait((writer, gone, going), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writer, gone, going):
                task.cancel()
            await asyncio.gather(gone, going, return_exceptions=True)
            await asyncio.wait((writer,))
        if not writer.cancelled():
            writer.result()

    async def _write(self, send: Send) -> None:
        with self._opened() as frames:
            await send(START)  # type: ignore[arg-type]
            # Proves to the client, and to proxies on the way, that the stream is open.
            await send({"type": "http.response.body", "body": PING, "more_body": True})
            while True:
                try:
                    async with asyncio.timeout(self._keepalive_s or None):
                        body = await anext(frames)
                except TimeoutError:
                    body = PING
                except StopAsyncIteration:
                    break
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _last_words(self) -> None:
        await self._draining.wait()
        await asyncio.sleep(LAST_WORDS_S)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
