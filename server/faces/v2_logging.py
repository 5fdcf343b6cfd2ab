"""GET, POST /v2/logging: what is logged, shown and changed while the server runs, as Triton has it."""

from __future__ import annotations

from typing import Any

from litestar import Response, Router, get, post
from litestar.di import NamedDependency

from server.limits import StrictRequest, said_in
from server.replies import told

Reply = Response[bytes]


# Any: a Protocol cannot be checked when a request comes. It is `server.triton.logs.LogSettings`.
@get("/v2/logging", sync_to_thread=False)
def show(logs: NamedDependency[Any]) -> Reply:
    return told(logs.shown())


@post("/v2/logging", status_code=200)
async def change(request: StrictRequest, logs: NamedDependency[Any]) -> Reply:
    """All of it or nothing."""
    return told(logs.update(await said_in(request)))


router = Router("/", route_handlers=[show, change])
