"""Puts the faces, the error map, the keys and the repository's life together.

Every request passes here first. POST .../infer goes straight to its raw route, which asks for the
key itself; everything else is normalised, asked for its key, given a request id, noted in the audit
log if it may change something, and handed to Litestar. The path that is checked is the very one
that Litestar then matches.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib import metadata
from typing import Any, cast

from litestar import Litestar, Request, Response
from litestar.di import Provide
from litestar.types import ASGIApp, ControllerRouterHandler, Receive, Scope, Send
from litestar.utils import normalize_path

from repository.errors import RepositoryError
from repository.repository import Repository
from server import errors
from server.auth import INFER, Gate, Headers, Key, scope_of
from server.auth import Scope as Right
from server.binding import is_loopback
from server.call import Door
from server.codecs.djl_paths import folded
from server.faces import (
    aphrodite,
    djl,
    events,
    gpu,
    health,
    marqo,
    memory,
    native,
    openai_embeddings,
    openai_text,
    v2_health,
    v2_logging,
    v2_repository,
    v2_shm,
    v2_trace,
)
from server.faces import models as model_face
from server.faces.v2_generate import VERBS, generate, verb_of
from server.faces.v2_infer import infer
from server.limits import MANAGEMENT_BODY, StrictRequest
from server.metrics import http as metrics_face
from server.metrics.http import Metrics
from server.openapi import pages
from server.replies import Answer, note, refuse, request_id_of
from server.restricted import Restrictions, group_of
from server.scribes.scribes import Scribes
from server.settings import Settings
from server.shapes import shape
from server.triton.logs import LogSettings
from server.triton.shm import CudaRegions, Regions
from server.triton.sinks import sink_of
from server.triton.trace_settings import start_of
from server.triton.tracing import Tracer
from server.turnstile import Turnstile

EXTENSIONS = (  # of KServe V2, as Triton names them
    "classification",
    "sequence",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "cuda_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)
FACES: tuple[ControllerRouterHandler, ...] = (
    native.router,
    memory.router,
    gpu.router,
    model_face.router,
    marqo.router,
    aphrodite.router,
    djl.router,
    events.router,
    health.router,
    v2_health.router,
    v2_logging.router,
    v2_repository.router,
    v2_trace.router,
    v2_shm.router,
    metrics_face.router,
    pages.router,
)


def build_app(models: Repository, settings: Settings, metrics: Metrics | None = None) -> ModelDepot:
    """`metrics`: whose observer `models` was born with. Raises ConfigError for the key file."""
    counts = metrics or Metrics(triton=settings.triton_metrics)
    counts.attach(models)
    local = is_loopback(settings.host) and not settings.insecure
    gate = Gate(settings.api_keys, refused=counts.auth_failed, local=local)

    restricted = Restrictions(settings.http_restricted_api)
    start = start_of(settings.trace_config)
    tracer = counts.meter.tracer = Tracer(start, sink_of(start), models)
    scribes = Scribes()
    door = Door(
        models=models,
        meter=counts.meter,
        authorize=_infers(gate, restricted),
        epoch=gate.epoch,
        shed=counts.shed,
        max_body=settings.max_body,
        scribes=scribes,
        regions=Regions(allowed=settings.allow_client_shm),
    )
    known = {
        "settings": settings,
        "metrics": counts,
        "info": info_of(settings),
        "strict": settings.strict_readiness,
        "regions": door.regions,
        "cuda_regions": CudaRegions(allowed=settings.allow_client_shm),
        "logs": LogSettings(),
        "tracer": tracer,
    }
    return ModelDepot(models, gate, door, FACES, known, restricted)


def _infers(gate: Gate, restricted: Restrictions) -> Callable[[Headers], object]:
    """May whoever sends these headers ask for inference?"""
    if not restricted:
        return partial(gate.check, need=Right.INFERENCE)

    def check(headers: Headers) -> None:
        gate.check(headers, need=Right.INFERENCE)
        restricted.check("inference", headers)

    return check


def info_of(settings: Settings) -> health.Info:
    try:
        version = metadata.version("modeldepot")
    except metadata.PackageNotFoundError:
        version = "0"
    return health.Info(settings.server_name, version, EXTENSIONS)


class ModelDepot(Litestar):
    """`door`: what inference passes, on every route. `known`: what handlers may ask for by name."""

    def __init__(
        self,
        models: Repository,
        gate: Gate,
        door: Door,
        faces: Sequence[ControllerRouterHandler],
        known: Mapping[str, Any],
        restricted: Restrictions,
    ) -> None:
        self.models = models
        self.gate = gate
        self.restricted = restricted
        self.known = known
        self.answering: asyncio.Task[None] | None = None  # the end of who else answers (gRPC)
        self.closing = asyncio.Event()  # set when the server begins to go; event streams end then
        self.door = door
        self._infer: ASGIApp = partial(infer, door=door)
        self._openai = _openai(door, known)
        keepalive_s = known["settings"].keepalive
        self._generate: ASGIApp = partial(generate, door=door, keepalive_s=keepalive_s)
        self.turnstile = Turnstile()
        self._refusal = ""  # why the repository cannot be run
        values = {"models": models, "closing": self.closing, **known}
        super().__init__(
            faces,
            dependencies={
                name: Provide(_always(value), sync_to_thread=False)
                for name, value in values.items()
            },
            exception_handlers={Exception: render},
            lifespan=[
                lambda _: self._running(),
                lambda _: _ending(door.scribes),
                lambda _: _undone(known["logs"], known["tracer"]),
            ],
            request_class=StrictRequest,
            request_max_body_size=MANAGEMENT_BODY,
            openapi_config=None,
            logging_config=None,
        )

    @property
    def raw_paths(self) -> tuple[str, ...]:
        """What is answered past Litestar, which does not list it: POST, by exact path or (*) between
        two ends."""
        ends = (INFER[1], *VERBS)
        return (*self._openai, *(f"{INFER[0]}*{end}" for end in ends))

    def _raw(self, path: str) -> ASGIApp | None:
        """What answers it past Litestar, asks for the key itself, and is in no audit log."""
        return self._openai.get(path) or (self._generate if verb_of(path) else None)

    def drain(self) -> None:
        """Not ready any more; event streams end; what runs goes on. Again: nothing."""
        self.models.drain()
        self.closing.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        kind = scope["type"]
        if kind == "http":
            path = scope["path"]
            if scope["method"] == "POST" and is_infer(path) and "//" not in path:
                await self._infer(scope, receive, send)
            elif (raw := self._raw(path)) is not None:
                await raw(scope, receive, Answer(send, request_id_of(scope["headers"])))
            else:
                await self._manage(scope, receive, send)
        elif kind == "lifespan":
            await super().__call__(scope, receive, partial(self._say_why, send))
        else:
            await send({"type": "websocket.close", "code": 1008})

    @asynccontextmanager
    async def _running(self) -> AsyncGenerator[None]:
        try:
            async with self.models.running():
                yield
                if self.answering is not None:  # its requests hold the models
                    await asyncio.wait((self.answering,))
        except RepositoryError as error:
            self._refusal = str(error)
            raise

    async def _say_why(self, send: Send, message: Any) -> None:
        """A start that is refused says one line, and where in the code that was is nobody's matter."""
        if message["type"] == "lifespan.startup.failed" and self._refusal:
            message = {**message, "message": self._refusal}
        await send(message)

    async def _manage(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The same function that Litestar's router applies: applied once more it changes nothing, so
        # no spelling of a path is checked as one thing and routed as another. A model's name before
        # /adapters is one segment from here on.
        scope["root_path"] = ""
        path = scope["path"] = folded(normalize_path(scope["path"]))
        method = str(scope["method"])  # type: ignore[typeddict-item]
        if method == "POST" and is_infer(path):
            await self._infer(scope, receive, send)
            return
        changes = method not in ("GET", "HEAD", "OPTIONS")
        client = ""  # who is counted at the turnstile, once let in
        answer = Answer(send, request_id_of(scope["headers"]))
        if (raw := self._raw(path)) is not None:
            await raw(scope, receive, answer)
            return
        began, who = time.perf_counter(), None
        try:
            who = self.gate.check(scope["headers"], scope_of(method, path))
            self.restricted.check(group_of(method, path), scope["headers"])
            if is_infer(path):
                raise errors.WrongVerbError("POST")
            if changes:
                client = self._let_in(scope, who)
        except errors.ServerError as error:
            await refuse(answer, path, error)
        else:
            try:
                await self._handle(scope, receive, answer, path)
            finally:
                if client:
                    self.turnstile.leave(client)
        if changes:
            note(scope, who, answer, time.perf_counter() - began)

    async def _handle(self, scope: Scope, receive: Receive, answer: Answer, path: str) -> None:
        head = scope["method"] == "HEAD"  # type: ignore[typeddict-item]
        if head and path != events.PATH:  # which would never end
            # As GET: uvicorn, which has the scope as it came, keeps the body back.
            scope = cast("Scope", {**scope, "method": "GET"})
        try:
            await super().__call__(scope, receive, answer)
        except asyncio.CancelledError:
            if not self.models.draining or answer.status:
                raise
            await refuse(answer, path, errors.cut_off())

    def _let_in(self, scope: Scope, who: Key | None) -> str:
        """Raises TooManyRequestsError."""
        client = f"key {who.name}" if who else str((scope.get("client") or ("-",))[0])
        try:
            self.turnstile.enter(client)
        except errors.TooManyRequestsError:
            self.door.shed("rate_limit")
            raise
        return client


def _openai(door: Door, known: Mapping[str, Any]) -> dict[str, ASGIApp]:
    """Raw routes too: they ask for the key themselves, and no audit log notes them."""
    settings: Settings = known["settings"]
    keepalive_s = settings.keepalive
    found: dict[str, ASGIApp] = {
        path: partial(openai_text.write, door=door, path=path, keepalive_s=keepalive_s)
        for path in openai_text.KINDS
    }
    found["/v1/embeddings"] = partial(openai_embeddings.embed, door=door)
    return found


@asynccontextmanager
async def _ending(scribes: Scribes | None) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        if scribes is not None:
            await scribes.close()


@asynccontextmanager
async def _undone(logs: LogSettings, tracer: Tracer) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        logs.undo()
        await asyncio.to_thread(tracer.close)


def is_infer(path: str) -> bool:
    return path.startswith(INFER[0]) and path.endswith(INFER[1])


def render(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Every error of every route that Litestar runs; also of paths that it does not know."""
    path = request.scope["path"]
    errors.note(error, f"{request.method} {path!r}")
    status, body = shape(path, error)
    headers = errors.headers_of(error)
    return Response(body, status_code=status, media_type="application/json", headers=headers)


def _always(value: Any) -> Callable[[], Any]:
    def provide() -> Any:
        return value

    return provide
