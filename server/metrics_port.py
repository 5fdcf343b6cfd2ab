"""`/metrics` on a port of its own, as Triton has it on 8002, and nothing else there.

The page, its key (scope metrics) and its errors are those of the main port: a request goes through the
same application. Every other path is 404, without looking at keys; Triton answers 200 with an empty
body there, and a probe with a mistyped path would be told for ever that all is well. Who opens one port
to a scraper must not let in more.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from litestar.types import Receive, Send

from server import errors
from server.protocol import Protocol, watch_over

PATH = "/metrics"
CLOSE_S = 1  # for a scrape that is being answered when the server ends


class MetricsPort:
    """`open` once the application runs, `close` before the loop ends; `sock` listens already. `tls`:
    what uvicorn's Config is told of it."""

    def __init__(self, app: Any, sock: socket.socket, **tls: Any) -> None:
        self.sock = sock
        self._app = app
        self._server = uvicorn.Server(
            uvicorn.Config(
                self,
                http=Protocol,
                ws="none",
                interface="asgi3",
                lifespan="off",
                access_log=False,
                log_config=None,
                proxy_headers=False,
                date_header=False,
                server_header=False,
                timeout_graceful_shutdown=CLOSE_S,
                **tls,
            )
        )
        self._watch: asyncio.Task[None] | None = None

    async def open(self) -> None:
        server = self._server
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        await server.startup(sockets=[self.sock])
        self._watch = asyncio.create_task(watch_over(server.server_state.connections))

    async def close(self) -> None:
        """Again, or without `open`: nothing but the socket."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
            await self._server.shutdown(sockets=[self.sock])
        self.sock.close()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["path"] == PATH:
            await self._app(scope, receive, send)
            return
        body = errors.encode({"error": f"Not Found: this port has {PATH} alone"})
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
        ]
        await send({"type": "http.response.start", "status": 404, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})
