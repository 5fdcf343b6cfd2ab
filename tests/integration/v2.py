"""The V2 faces alone, over a repository that is stepped by hand: in this loop, or on a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

import uvicorn
from httpx import ASGITransport, AsyncClient
from litestar import Litestar, Request, Response
from litestar.di import Provide

from repository.messages import InferRequest, InferResponse, Loaded, TensorSpec
from repository.tensors import Tensor
from server import errors
from server.call import Door
from server.faces import v2_health, v2_infer
from server.fast import FastProtocol
from server.limits import StrictRequest
from server.protocol import Protocol, watch_over
from tests.fakes.repository import FakeRepository

ROWS = Loaded(
    inputs=(TensorSpec("x", "FP32", (-1, 2)),),
    outputs=(TensorSpec("y", "FP32", (-1, 2)),),
    max_batch_size=8,
    platform="fake",
)


def double(request: InferRequest) -> InferResponse:
    (x,) = request.inputs
    answer = Tensor.of("y", x.array() * 2)
    return InferResponse([answer], queue_s=0.25, compute_s=0.5, batch_size=4)


class Counted:
    """An InferMeter that remembers. `ended` is set at every end."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []
        self.done_: list[dict[str, Any]] = []
        self.answered_: list[tuple[str, int, int]] = []
        self.wrote_: list[tuple[str, int]] = []
        self.ended = asyncio.Event()

    def begin(self, model: str, version: int) -> None:
        self.begun.append((model, version))

    def done(self, model: str, version: int, outcome: str, **rest: Any) -> None:
        rest.pop("of", None)  # it would be kept, and with it the request's bytes
        self.done_.append({"model": model, "version": version, "outcome": outcome, **rest})
        self.ended.set()

    def answered(self, model: str, version: int, index: int, **rest: Any) -> None:
        self.answered_.append((model, version, index))

    def wrote(self, model: str, version: int, **rest: Any) -> None:
        self.wrote_.append((model, version))

    @property
    def outcomes(self) -> list[str]:
        return [found["outcome"] for found in self.done_]


class Info(NamedTuple):
    name: str = "depot"
    version: str = "1.2"
    extensions: tuple[str, ...] = ("binary_tensor_data",)


def render(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    errors.note(error, request.url.path)
    text = errors.text_of(error)
    return Response(errors.body_v2(text), status_code=errors.status_v2(error))


class Faces(Litestar):
    """Any call of .../infer goes to the raw route."""

    infer: Any

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_infer = scope["type"] == "http" and scope["path"].endswith("/infer")
        await (self.infer if is_infer else super().__call__)(scope, receive, send)


class Stage:
    """A repository where `m` (versions 1 and 2) and `org/n` serve, the app on it, and its meter.
    `fast`: on a socket, inference is answered below ASGI."""

    fast = False

    def __init__(self, authorize: Any = lambda headers: None, **limits: Any) -> None:
        self.models = FakeRepository(answers=double)
        self.models.add("m", 1, 2)
        for version in (1, 2):
            self.models.bring_up("m", version).loaded = ROWS
        self.models.add("org/n", loaded=True)
        self.meter = Counted()
        self.app = Faces(
            [v2_health.router],
            dependencies={
                "models": Provide(lambda: self.models, sync_to_thread=False),
                "info": Provide(lambda: Info(), sync_to_thread=False),
            },
            exception_handlers={Exception: render},
            request_class=StrictRequest,
            openapi_config=None,
            logging_config=None,
        )
        self.door = Door(models=self.models, authorize=authorize, meter=self.meter, **limits)
        self.app.infer = partial(v2_infer.infer, door=self.door)

    @property
    def leases(self) -> int:
        return sum(g.leases for gens in self.models.generations.values() for g in gens)

    @property
    def client(self) -> AsyncClient:
        return AsyncClient(transport=ASGITransport(self.app), base_url="http://t")


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.up.set()


@asynccontextmanager
async def listening(stage: Stage, *, watched: bool = False) -> AsyncGenerator[int]:
    """The port of a real server in this loop. `watched`: it looks at its connections' clocks."""
    http: Any = partial(FastProtocol, door=stage.door) if stage.fast else Protocol
    config = uvicorn.Config(
        stage.app, port=0, http=http, loop="none", lifespan="off", log_config=None
    )
    server = _Server(config)
    task = asyncio.create_task(server._serve())
    watching = asyncio.create_task(watch_over(server.server_state.connections if watched else ()))
    try:
        await server.up.wait()
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        watching.cancel()
        server.should_exit = True
        await task
