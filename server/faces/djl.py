"""/models/MODEL/adapters...: LoRA adapters as DJL Serving manages them."""

from __future__ import annotations

from litestar import Router

router = Router("/", route_handlers=[])
