"""KServe V2: the server's and the models' health and metadata.

    GET /v2                                      what this server is
    GET /v2/health/live, /ready                  200, or 400 (not ready) and 503 (going)
    GET /v2/models/NAME[/versions/N]             inputs, outputs, versions that serve
    GET /v2/models/NAME[/versions/N]/ready       200, or 400
    GET /v2/models/NAME[/versions/N]/config      its configuration, as Triton has it
    GET /v2/models[/NAME[/versions/N]]/stats     what it has done, as Triton counts it
    GET, POST /v2/models/NAME/trace/setting      which of its requests are traced

Names may hold '/', so one route takes all below /v2/models and `v2_paths` reads it from the right.
"""

from __future__ import annotations

import asyncio
from typing import Any

from litestar import Request, Response, Router, get, post
from litestar.di import NamedDependency

from repository.errors import ModelNotReadyError, RepositoryError
from repository.repository import Repository
from server import errors
from server.codecs.v2_paths import Route, model_of
from server.limits import StrictRequest, said_in
from server.replies import told
from server.triton import metadata
from server.triton.config import config_of, message
from server.triton.stats import stats_of

READY, CONFIG, STATS, TRACE = VERBS = ("/ready", "/config", "/stats", "/trace/setting")
ALL_STATS = "/v2/models/stats"
Reply = Response[bytes]


# Any: the app's own type, whichever it is; a Protocol cannot be checked when a request comes.
@get("/", sync_to_thread=False)
def server_metadata(info: NamedDependency[Any]) -> Reply:
    return told(metadata.server_of(info))


@get("/health/live", sync_to_thread=False)
def live(models: NamedDependency[Repository]) -> Reply:
    return _going() if models.draining else _empty(200)


@get("/health/ready", sync_to_thread=False)
def ready(models: NamedDependency[Repository], strict: NamedDependency[bool] = False) -> Reply:
    if models.draining:
        return _going()
    return _empty(200 if metadata.server_ready(models, strict=strict) else 400)


@get("/models/{rest:path}")
async def model(
    request: Request[Any, Any, Any],
    models: NamedDependency[Repository],
    metrics: NamedDependency[Any] = None,
    tracer: NamedDependency[Any] = None,
) -> Reply:
    path = request.scope["path"]
    try:
        if path == ALL_STATS:
            return told(stats_of(models, metrics.meter, None))
        verb = next((verb for verb in VERBS if path.endswith(verb) and model_of(path, verb)), "")
        route = model_of(path, verb)
        if route is None:
            raise errors.NoSuchPathError("Not Found")
        if verb == STATS:
            return told(stats_of(models, metrics.meter, route))
        if verb == CONFIG:
            await asyncio.to_thread(message)  # the first time it imports protobuf's classes
            return told(config_of(models, route))
        if verb == TRACE:
            return told(_traced(tracer, route))
        if verb == READY:
            return await _model_ready(models, route)
        return told(metadata.model_of(models, route))
    except (RepositoryError, errors.ServerError) as error:
        return _refused(error)


@post("/models/{rest:path}", status_code=200)
async def change_model(
    request: StrictRequest,
    tracer: NamedDependency[Any] = None,
) -> Reply:
    """The settings of its traces. (Requests to it go other ways.)"""
    route = model_of(request.scope["path"], TRACE)
    if route is None:
        raise errors.WrongVerbError("GET")
    return told(tracer.update(_whole(route), await said_in(request)))


def _traced(tracer: Any, route: Route) -> dict[str, Any]:
    found: dict[str, Any] = tracer.settings(_whole(route))
    return found


def _whole(route: Route) -> str:
    """The model. Raises NoSuchPathError for a version, which has no settings of its own."""
    if route.version is not None:
        raise errors.NoSuchPathError("Not Found")
    return route.model


async def _model_ready(models: Repository, route: Route) -> Reply:
    """On its way, a version that does not serve, or a model that says that it is not ready: 400. Else
    not found: 404 with the reason."""
    try:
        ready = await models.lease(*route).generation.says_ready()
    except ModelNotReadyError:
        ready = False
    if not ready:
        return told({"error": "Model version not ready"}, status=400)
    return _empty(200)


def _empty(status: int) -> Reply:
    return Response(b"", status_code=status, media_type="application/json")


def _going() -> Reply:
    return told({"error": "Server exiting"}, status=503)


def _refused(error: Exception) -> Reply:
    return Response(
        errors.body_v2(errors.text_of(error)),
        status_code=errors.status_v2(error),
        media_type="application/json",
        headers=errors.headers_of(error),
    )


router = Router("/v2", route_handlers=[server_metadata, live, ready, model, change_model])
