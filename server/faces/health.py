"""GET /health: is it up, and is it well? Shaped as PolarGrid documents it. Open to everyone.

healthy    nothing that is wanted has failed
degraded   something that is wanted has failed; what can be served is
unhealthy  it is going (503)
"""

from __future__ import annotations

import platform
import socket
from datetime import UTC, datetime

import msgspec
from litestar import Response, Router, get
from litestar.di import NamedDependency

from repository.repository import Repository


class Info(msgspec.Struct, frozen=True):
    """What the server is called. `extensions`: of KServe V2."""

    name: str
    version: str
    extensions: tuple[str, ...] = ()


class Backend(msgspec.Struct):
    healthy: bool
    info: Info


class Health(msgspec.Struct):
    status: str
    node: str
    runtime: str
    timestamp: str
    features: dict[str, bool]
    backend: Backend


NODE = socket.gethostname()
RUNTIME = f"python {platform.python_version()}"


@get("/health", sync_to_thread=False, summary="Is it up, and is it well?", tags=["server"])
def health(models: NamedDependency[Repository], info: NamedDependency[Info]) -> Response[Health]:
    """healthy, degraded (something that is wanted has failed) or unhealthy (it is shutting down, 503).
    Open to everyone; never waits for a model."""
    word = word_of(models)
    body = Health(
        status=word,
        node=NODE,
        runtime=RUNTIME,
        timestamp=datetime.now(UTC).isoformat(timespec="milliseconds"),
        features=features_of(models),
        backend=Backend(word != "unhealthy", info),
    )
    headers = {"Retry-After": "1"} if models.draining else {}
    return Response(body, status_code=503 if models.draining else 200, headers=headers)


def features_of(models: Repository) -> dict[str, bool]:
    """What this server does as it was started, and what can be asked of the models that serve now."""
    options, skills = models.options, models.skills
    return {
        "model_loading": True,
        "dry_run": True,
        "events": True,
        "metrics": True,
        "hot_reload": options.mode != "none" and options.watch != "off",
        "on_demand": options.on_demand,
        "durable": models.durable,
        "gpu": models.has_gpu,
        "text_generation": "text_generation" in skills,
        "embeddings": "embeddings" in skills,
        "adapters": "adapters" in skills,
    }


def word_of(models: Repository) -> str:
    if models.draining:
        return "unhealthy"
    return "degraded" if models.unwell else "healthy"


router = Router("/", route_handlers=[health])
