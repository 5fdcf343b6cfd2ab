"""KServe V2: the server's and the models' health and metadata.

    GET /v2                                      what this server is
    GET /v2/health/live, /ready                  200, or 400 (not ready) and 503 (going)
    GET /v2/models/NAME[/versions/N]             inputs, outputs, versions that serve
    GET /v2/models/NAME[/versions/N]/ready       200, or 400

Names may hold '/', so one route takes all below /v2/models and `v2_paths` reads it from the right.
"""

from __future__ import annotations

from typing import Any, Protocol

from litestar import Request, Response, Router, get
from litestar.di import NamedDependency

from repository.errors import ModelNotReadyError, RepositoryError
from repository.lifecycle.generation import Generation
from repository.lifecycle.states import State
from repository.lifecycle.status import ModelStatus, Public
from repository.messages import TensorSpec
from repository.repository import Repository
from server import errors
from server.codecs.v2_paths import Route, model_of

READY = "/ready"
Reply = Response[bytes]


class ServerInfo(Protocol):
    """What the app says of itself."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def extensions(self) -> tuple[str, ...]: ...


# Any: the app's own type, whichever it is; a Protocol cannot be checked when a request comes.
@get("/", sync_to_thread=False)
def server_metadata(info: NamedDependency[Any]) -> Reply:
    return _told(_server(info))


def _server(info: ServerInfo) -> dict[str, Any]:
    return {"name": info.name, "version": info.version, "extensions": list(info.extensions)}


@get("/health/live", sync_to_thread=False)
def live(models: NamedDependency[Repository]) -> Reply:
    return _going() if models.draining else _empty(200)


@get("/health/ready", sync_to_thread=False)
def ready(models: NamedDependency[Repository], strict: NamedDependency[bool] = False) -> Reply:
    """All that was wanted at the start has settled. A model that loads later, or fails, does not
    take a server that answers for the others out of service, unless `strict` says so."""
    if models.draining:
        return _going()
    fit = models.ready and not (strict and any(map(_missing, models.statuses())))
    return _empty(200 if fit else 400)


def _missing(status: ModelStatus) -> bool:
    return status.wanted and status.state is not Public.LOADED


@get("/models/{rest:path}", sync_to_thread=False)
def model(request: Request[Any, Any, Any], models: NamedDependency[Repository]) -> Reply:
    path = request.scope["path"]
    asked_ready = path.endswith(READY) and path != f"/v2/models{READY}"
    route = model_of(path, READY if asked_ready else "")
    if route is None:
        return _refused(errors.NoSuchPathError("Not Found"))
    try:
        return _model_ready(models, route) if asked_ready else _model_metadata(models, route)
    except RepositoryError as error:
        return _refused(error)


def _model_ready(models: Repository, route: Route) -> Reply:
    """On its way, or a version that does not serve: 400. Else not found: 404 with the reason."""
    try:
        models.lease(*route)
    except ModelNotReadyError:
        return _told({"error": "Model version not ready"}, status=400)
    return _empty(200)


def _model_metadata(models: Repository, route: Route) -> Reply:
    gen = models.lease(*route).generation
    loaded = gen.loaded
    if loaded is None:
        raise ModelNotReadyError(f"model '{gen.spec.model}' has not said yet what it takes")
    described = (
        {"inputs": _tensors(loaded.inputs), "outputs": _tensors(loaded.outputs)}
        if gen.signature is None
        else gen.signature.metadata()
    )
    return _told(
        {
            "name": gen.spec.model,
            "versions": _serving(models.status(gen.spec.model), gen),
            "platform": loaded.platform or gen.spec.backend,
            **described,
        }
    )


def _serving(status: ModelStatus, gen: Generation) -> list[str]:
    found = {g.spec.version for g in status.generations if g.state is State.READY}
    return [str(v) for v in sorted(found | {gen.spec.version})]


def _tensors(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
    return [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in specs]


def _told(body: Any, status: int = 200) -> Reply:
    return Response(errors.encode(body), status_code=status, media_type="application/json")


def _empty(status: int) -> Reply:
    return Response(b"", status_code=status, media_type="application/json")


def _going() -> Reply:
    return _told({"error": "Server exiting"}, status=503)


def _refused(error: Exception) -> Reply:
    return Response(
        errors.body_v2(errors.text_of(error)),
        status_code=errors.status_v2(error),
        media_type="application/json",
        headers=errors.headers_of(error),
    )


router = Router("/v2", route_handlers=[server_metadata, live, ready, model])
