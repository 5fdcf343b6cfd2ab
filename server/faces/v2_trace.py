"""GET, POST /v2/trace/setting: which requests are traced, as Triton has it. (A model's own settings have
their address below the model: `v2_health`.)"""

from __future__ import annotations

from typing import Any

from litestar import Response, Router, get, post
from litestar.di import NamedDependency

from server.limits import StrictRequest, said_in
from server.replies import told

Reply = Response[bytes]


# Any: it is `server.triton.tracing.Tracer`, which dependencies cannot name.
@get("/v2/trace/setting", sync_to_thread=False)
def show(tracer: NamedDependency[Any]) -> Reply:
    return told(tracer.settings(None))


@post("/v2/trace/setting", status_code=200)
async def change(request: StrictRequest, tracer: NamedDependency[Any]) -> Reply:
    return told(tracer.update(None, await said_in(request)))


router = Router("/", route_handlers=[show, change])
