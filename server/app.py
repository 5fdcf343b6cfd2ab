"""Puts the faces, the error map, the keys and the repository's life together.

Every request passes here first. POST .../infer goes straight to its raw route, which asks for the
key itself; everything else is normalised, asked for its key, given a request id, noted in the audit
log if it may change something, and handed to Litestar. The path that is checked is the very one
that Litestar then matches.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib import metadata
from typing import Any, cast

from litestar import Litestar, Request, Response
from litestar.di import Provide
from litestar.types import ASGIApp, ControllerRouterHandler, Message, Receive, Scope, Send
from litestar.utils import normalize_path

from repository.errors import DrainingError, RepositoryError
from repository.repository import Repository
from server import errors
from server.auth import INFER, Gate, Key, scope_of
from server.auth import Scope as Right
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
)
from server.faces import models as model_face
from server.faces.v2_infer import infer
from server.limits import ASKED, MANAGEMENT_BODY, StrictRequest
from server.metrics import http as metrics_face
from server.metrics.http import Metrics
from server.openapi import pages
from server.scribes.scribes import Scribes
from server.settings import Settings, is_loopback
from server.shapes import shape
from server.turnstile import Turnstile

audit = logging.getLogger("modeldepot.audit")

REQUEST_ID = b"x-request-id"
REQUEST_ID_LONGEST = 128
ASKED_LONGEST = 200  # characters of a request that the audit log keeps


EXTENSIONS = ("binary_tensor_data", "parameters")  # of KServe V2, as Triton names them
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
    metrics_face.router,
    pages.router,
)


def build_app(models: Repository, settings: Settings, metrics: Metrics | None = None) -> ModelDepot:
    """`metrics`: whose observer `models` was born with. Raises ConfigError for the key file."""
    counts = metrics or Metrics(triton=settings.triton_metrics)
    counts.attach(models)
    local = is_loopback(settings.host) and not settings.insecure
    gate = Gate(settings.api_keys, refused=counts.auth_failed, local=local)

    scribes = Scribes()
    door = Door(
        models=models,
        meter=counts.meter,
        authorize=partial(gate.check, need=Right.INFERENCE),
        epoch=gate.epoch,
        shed=counts.shed,
        max_body=settings.max_body,
        scribes=scribes,
    )
    known = {
        "settings": settings,
        "metrics": counts,
        "info": info_of(settings),
        "strict": settings.strict_readiness,
    }
    return ModelDepot(models, gate, door, FACES, known)


def info_of(settings: Settings) -> health.Info:
    try:
        version = metadata.version("modeldepot")
    except metadata.PackageNotFoundError:
        version = "0"
    return health.Info(settings.server_name, version, EXTENSIONS)


CUT_OFF = "the server is shutting down, and this had not ended when its grace was over"


class ModelDepot(Litestar):
    """`door`: what inference passes, on every route. `known`: what handlers may ask for by name."""

    def __init__(
        self,
        models: Repository,
        gate: Gate,
        door: Door,
        faces: Sequence[ControllerRouterHandler],
        known: Mapping[str, Any],
    ) -> None:
        self.models = models
        self.gate = gate
        self.closing = asyncio.Event()  # set when the server begins to go; event streams end then
        self.door = door
        self._infer: ASGIApp = partial(infer, door=door)
        self._openai = _openai(door, known)
        self._turnstile = Turnstile()
        self._refusal = ""  # why the repository cannot be run
        values = {"models": models, "closing": self.closing, **known}
        super().__init__(
            faces,
            dependencies={
                name: Provide(_always(value), sync_to_thread=False)
                for name, value in values.items()
            },
            exception_handlers={Exception: render},
            lifespan=[lambda _: self._running(), lambda _: _ending(door.scribes)],
            request_class=StrictRequest,
            request_max_body_size=MANAGEMENT_BODY,
            openapi_config=None,
            logging_config=None,
        )

    @property
    def raw_paths(self) -> tuple[str, ...]:
        """What is answered past Litestar, which does not list it: POST, by exact path or (*) between
        two ends."""
        return (*self._openai, "*".join(INFER))

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
            elif path in self._openai:
                await self._openai[path](scope, receive, _Answer(send, request_id_of(scope)))
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
        answer = _Answer(send, request_id_of(scope))
        if path in self._openai:
            await self._openai[path](scope, receive, answer)
            return
        began, who = time.perf_counter(), None
        try:
            who = self.gate.check(scope["headers"], scope_of(method, path))
            if is_infer(path):
                raise errors.WrongVerbError("POST")
            if changes:
                client = self._let_in(scope, who)
        except errors.ServerError as error:
            await _refuse(answer, path, error)
        else:
            try:
                await self._handle(scope, receive, answer, path)
            finally:
                if client:
                    self._turnstile.leave(client)
        if changes:
            _note(scope, who, answer, time.perf_counter() - began)

    async def _handle(self, scope: Scope, receive: Receive, answer: _Answer, path: str) -> None:
        head = scope["method"] == "HEAD"  # type: ignore[typeddict-item]
        if head and path != events.PATH:  # which would never end
            # As GET: uvicorn, which has the scope as it came, keeps the body back.
            scope = cast("Scope", {**scope, "method": "GET"})
        try:
            await super().__call__(scope, receive, answer)
        except asyncio.CancelledError:
            if not self.models.draining or answer.status:
                raise
            await _refuse(answer, path, DrainingError(CUT_OFF, retry_after_s=5.0))

    def _let_in(self, scope: Scope, who: Key | None) -> str:
        """Raises TooManyRequestsError."""
        client = f"key {who.name}" if who else str((scope.get("client") or ("-",))[0])
        try:
            self._turnstile.enter(client)
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


def is_infer(path: str) -> bool:
    return path.startswith(INFER[0]) and path.endswith(INFER[1])


class _Answer:
    """`send` that puts the request id on the answer and remembers its status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.status = 0
        self.request_id = request_id
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (REQUEST_ID, self.request_id.encode())]
            message = {**message, "headers": headers}
        await self._send(message)


def request_id_of(scope: Scope) -> str:
    """The client's own, if it is printable and short enough; else a new one."""
    for name, value in scope["headers"]:
        if name == REQUEST_ID and 0 < len(value) <= REQUEST_ID_LONGEST:
            text = value.decode("latin-1")
            if text.isascii() and text.isprintable():
                return text
    return secrets.token_hex(16)


def _note(scope: Scope, who: Key | None, answer: _Answer, took_s: float) -> None:
    """Who asked for what, and how it ended. `repr` keeps a client from writing lines of its own."""
    asked = repr(scope.get("state", {}).get(ASKED, ""))[:ASKED_LONGEST]
    audit.info(
        "key=%s client=%s %s %r asked=%s status=%d took=%.3fs request=%s",
        repr(who.name) if who else "-",
        (scope.get("client") or ("-",))[0],
        scope["method"],  # type: ignore[typeddict-item]
        scope["path"][:ASKED_LONGEST],
        asked,
        answer.status,
        took_s,
        answer.request_id,
    )


def render(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Every error of every route that Litestar runs; also of paths that it does not know."""
    path = request.scope["path"]
    errors.note(error, f"{request.method} {path!r}")
    status, body = shape(path, error)
    headers = errors.headers_of(error)
    return Response(body, status_code=status, media_type="application/json", headers=headers)


async def _refuse(
    send: Send | _Answer, path: str, error: errors.ServerError | RepositoryError
) -> None:
    status, body = shape(path, error)
    headers = {**errors.headers_of(error), "content-type": "application/json"}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    raw.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _always(value: Any) -> Callable[[], Any]:
    def provide() -> Any:
        return value

    return provide
