"""GET /v1/gpu/status, /v1/gpu/memory, POST /v1/gpu/purge: as PolarGrid documents them."""

from __future__ import annotations

from litestar import Router

router = Router("/", route_handlers=[])
