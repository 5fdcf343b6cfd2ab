"""GET /, GET and DELETE /models, GET /device/cpu, /device/cuda: as Marqo's clients know them."""

from __future__ import annotations

from litestar import Router

router = Router("/", route_handlers=[])
