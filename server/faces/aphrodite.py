"""POST /v1/load_model, /v1/unload_model: as Aphrodite had them."""

from __future__ import annotations

from litestar import Router

router = Router("/", route_handlers=[])
