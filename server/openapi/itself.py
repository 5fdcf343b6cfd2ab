"""/health, /v1/events, /metrics, and this document itself."""

from __future__ import annotations

from typing import Any

from server.faces import health
from server.openapi.failures import NativeError
from server.openapi.operation import Answer, Content, Face, Operation, Param, events, ok

SERVER = Face(
    name="server",
    description="Is it well, what happens in it, its numbers, this document.",
    error=NativeError,
)
HEALTH: dict[str, Any] = {
    "status": "healthy",
    "node": "depot-1",
    "runtime": "python 3.13.5",
    "timestamp": "2026-09-01T12:00:00.000+00:00",
    "features": {"hot_reload": True},
    "backend": {
        "healthy": True,
        "info": {"name": "modeldepot", "version": "0.1.0", "extensions": ["parameters"]},
    },
}
EVENT = (
    ": keep-alive\n\n"
    'id: 7\nevent: model.state\ndata: {"id":7,"kind":"model.state","at":1790000000.5,"model":"iris"}\n\n'
)
OPERATIONS = (
    Operation(
        method="GET",
        path="/health",
        face=SERVER,
        handler=health.health,
        answers={
            **ok(health.Health, HEALTH, "It serves."),
            503: Answer(
                description="It is going.",
                contents=(
                    Content(
                        kind=health.Health,
                        examples={
                            "going": {
                                **HEALTH,
                                "status": "unhealthy",
                                "backend": {**HEALTH["backend"], "healthy": False},
                            }
                        },
                    ),
                ),
                headers={"Retry-After": "Whole seconds to wait."},
            ),
        },
    ),
    Operation(
        method="GET",
        path="/v1/events",
        face=SERVER,
        summary="What happens, as server-sent events",
        description="`id` rises: come back with `Last-Event-ID`, or `?after=`, to get what was missed, "
        "as far as it is kept. `event` is the kind, `data` one line of JSON. A slow reader gets an "
        "event of the kind `lost` with the count in place of what it missed. The stream ends when the "
        "server goes.",
        params=(
            Param(
                name="after",
                description="The id of the last event that was seen.",
                schema={"type": "string", "pattern": "^[0-9]{1,18}$"},
                example="0",
            ),
            Param(name="model", description="Events of this model alone.", example="iris"),
            Param(
                name="Last-Event-ID",
                where="header",
                description="As browsers send it; wins over `after`.",
                schema={"type": "string", "pattern": "^[0-9]{1,18}$"},
            ),
        ),
        answers={
            200: Answer(
                description="A stream that does not end by itself.",
                contents=(events(EVENT),),
            )
        },
        errors={400: None},
    ),
    Operation(
        method="GET",
        path="/metrics",
        face=SERVER,
        summary="Numbers for Prometheus",
        description="The text format, or OpenMetrics to whoever accepts that. At most a second old.",
        answers={
            200: Answer(
                description="The page.",
                contents=tuple(
                    Content(
                        kind={"type": "string"},
                        media=media,
                        examples={"page": "# HELP ...\n# TYPE modeldepot_models gauge\n"},
                    )
                    for media in ("text/plain", "application/openmetrics-text")
                ),
            )
        },
    ),
    Operation(
        method="GET",
        path="/openapi.json",
        face=SERVER,
        summary="This document",
        description="OpenAPI 3.1.",
        answers={
            200: Answer(
                description="The document.",
                contents=(
                    Content(
                        kind={"type": "object", "required": ["openapi", "info", "paths"]},
                        examples={
                            "beginning": {
                                "openapi": "3.1.0",
                                "info": {"title": "modeldepot", "version": "0.1.0"},
                                "paths": {},
                            }
                        },
                    ),
                ),
            )
        },
    ),
    Operation(
        method="GET",
        path="/docs",
        face=SERVER,
        summary="This document for people",
        description="Swagger UI. Nothing is fetched from elsewhere.",
        answers={
            200: Answer(
                description="The page.",
                contents=(
                    Content(
                        kind={"type": "string"},
                        media="text/html",
                        examples={"page": "<!doctype html>..."},
                    ),
                ),
            )
        },
    ),
    Operation(
        method="GET",
        path="/docs/{file}",
        route="/docs/{file:str}",
        face=SERVER,
        summary="What the page is made of",
        description="Scripts, the style sheet and the icon of /docs.",
        params=(
            Param(
                name="file",
                where="path",
                description="As the page names it.",
                schema={"type": "string", "minLength": 1},
                example="start.js",
            ),
        ),
        answers={
            200: Answer(
                description="The file.",
                contents=tuple(
                    Content(kind={"type": "string"}, media=media, examples={"file": "..."})
                    for media in ("text/javascript", "text/css", "image/png")
                ),
            )
        },
        errors={404: None},
    ),
)
