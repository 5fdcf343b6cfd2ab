"""The two ways of an inference request through the server, and the same bytes sent down both.

asgi       uvicorn makes an ASGI call of every request
protocol   infer is answered where the parser is, below ASGI; everything else goes the other way

What a client sees must not depend on the way: every test that is named for the routes runs on each,
and `same` sends one script of bytes down both and compares what comes back, byte by byte. Servers run
here on uvloop, as the product's do.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
import uvloop

from server.app import build_app
from server.metrics.http import Metrics
from server.run import Server, bind
from server.settings import FIELDS, Settings
from tests.fakes.manners import Manners
from tests.wire import Answer, post

SWITCH = "fast_path"
ROUTES: tuple[str, ...] = ("asgi", "protocol") if SWITCH in FIELDS else ("asgi",)
BOTH = (ROUTES * 2)[:2]  # one beside itself still shows that answers depend on nothing else
WITHIN_S = 30.0
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

Test = Callable[..., Awaitable[None]]


def settings_of(route: str) -> dict[str, Any]:
    return {SWITCH: route == "protocol"} if SWITCH in FIELDS else {}


def flags_of(route: str) -> tuple[str, ...]:
    """For `modeldepot serve`."""
    if SWITCH not in FIELDS:
        return ()
    return ("--fast-path",) if route == "protocol" else ("--no-fast-path",)


each_route = pytest.mark.parametrize("route", ROUTES)


def in_uvloop(test: Test) -> Callable[..., None]:
    """A test that pytest sees as a plain function."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(test(*args, **kwargs))  # type: ignore[arg-type]

    return run


class Depot:
    """The real app and server in this loop, over models known by how they behave."""

    def __init__(self, server: Server, models: Manners, metrics: Metrics, port: int) -> None:
        self.server, self.models, self.metrics, self.port = server, models, metrics, port

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    async def until(self, holds: Callable[[], bool]) -> None:
        """For what no event tells of."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                if holds():
                    return
                await asyncio.sleep(0.001)

    async def quiet(self) -> None:
        """All clients have been forgotten, and nothing of theirs is left."""
        state = self.server.server_state
        await self.until(lambda: not state.connections and not state.tasks)
        await self.until(lambda: self.models.leases == 0 and self.models.rooms == 0)

    async def counts(self) -> dict[str, float]:
        """What was counted of requests: label values -> number. Times that are measured are 1.0 where
        there are any: no two requests take the same."""
        page = (await self.metrics.render())[0].decode()
        found = {at[1] + at[2]: float(at[3]) for at in COUNTED.finditer(page)}
        return {k: float(n > 0) if MEASURED.search(k) else n for k, n in found.items()}


MEASURED = re.compile(r'phase="(input|output)"')
COUNTED = re.compile(
    r"^modeldepot_(inference_requests_total|load_shed_total|auth_failures_total|inference_in_flight"
    r"|inference_duration_seconds_count|inference_queue_duration_seconds_count"
    r"|inference_batch_size_count|inference_phase_seconds_total)(\{.*\}) ([0-9.e+-]+)$",
    re.M,
)


class Prompt(Server):
    """It ends when it is told to, not at uvicorn's next look at the clock."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.over = asyncio.Event()

    async def main_loop(self) -> None:
        await self.over.wait()


@asynccontextmanager
async def routed(
    route: str, models: Manners | None = None, **settings: Any
) -> AsyncIterator[Depot]:
    """It ends at once: what clients have left open is closed."""
    found = models or Manners()
    chosen = Settings(**settings_of(route), **settings)
    metrics = Metrics(clock=functools.partial(next, itertools.count(step=10)))
    app = build_app(found, chosen, metrics)
    server = Prompt(app, chosen)
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    running = asyncio.create_task(server.serve([sock]))
    try:
        await server.up.wait()
        yield Depot(server, found, metrics, port)
    finally:
        found.release()
        app.drain()
        server.should_exit = True
        server.over.set()
        await running


# the same bytes down both -------------------------------------------------------------------------


@asynccontextmanager
async def both(
    make: Callable[[], Manners] = Manners, **settings: Any
) -> AsyncIterator[list[Depot]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(routed(route, make(), **settings)) for route in BOTH]


async def same(depots: Sequence[Depot], pieces: bytes | Iterable[bytes]) -> bytes:
    """What came back until the server hung up: the same from each."""
    script = [pieces] if isinstance(pieces, bytes) else list(pieces)
    heard = [plain(await play(depot.port, script)) for depot in depots]
    if heard[0] != heard[1]:
        pytest.fail(difference(script, *heard), pytrace=False)
    return heard[0]


def difference(script: Sequence[bytes], first: bytes, second: bytes) -> str:
    at = next(n for n in range(len(first) + 1) if first[n : n + 1] != second[n : n + 1])
    said = [
        f"{BOTH[n]} said ...{h[max(0, at - 200) : at + 200]!r}"
        for n, h in enumerate((first, second))
    ]
    asked = repr([piece[:600] for piece in script[:30]])[:6000]
    return "\n".join([f"the routes differ from byte {at} on", *said, f"asked: {asked}"])


async def play(port: int, pieces: Iterable[bytes]) -> bytes:
    """Sends each piece when the one before it has been heard; what comes until the end."""
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_connect(sock, ("127.0.0.1", port))
        async with asyncio.timeout(WITHIN_S):
            heard = asyncio.create_task(_until_end(sock))
            try:
                with suppress(OSError):  # it may hang up on us
                    for piece in pieces:
                        await loop.sock_sendall(sock, piece)
                        for _ in range(2):  # once for the loop to see it, once to be called
                            await asyncio.sleep(0)
                return await heard
            finally:
                heard.cancel()
                await asyncio.wait([heard])


async def _until_end(sock: socket.socket) -> bytes:
    loop, found = asyncio.get_running_loop(), bytearray()
    with suppress(ConnectionResetError):
        while data := await loop.sock_recv(sock, 1 << 18):
            found += data
    return bytes(found)


def plain(heard: bytes) -> bytes:
    """Without what differs from one time to the next, and without the go-aheads, which a server may
    leave out for a body that is there already."""
    return VOLATILE.sub(rb"\1", heard.replace(CONTINUE, b""))


# The second is the framework's, which keeps its verbs in a set.
VOLATILE = re.compile(rb"(\r\nx-request-id: |\r\nallow: (?=[A-Z]+,))[0-9a-fA-Z, ]+")


def answers_in(heard: bytes) -> list[Answer]:
    found = []
    while heard:
        top, _, rest = heard.partition(b"\r\n\r\n")
        first, *lines = top.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        found.append(Answer(int(first.split()[1]), headers, rest[:length]))
        heard = rest[length:]
    return found


def statuses(heard: bytes) -> list[int]:
    return [answer.status for answer in answers_in(heard)]


# what is asked ------------------------------------------------------------------------------------

CLOSE = "Connection: close"
INFER = "/v2/models/double/infer"


def tensor(*values: float, **change: Any) -> dict[str, Any]:
    x = list(values or (1, 2))
    return {"name": "x", "datatype": "FP32", "shape": [len(x) // 2, 2], "data": x, **change}


def asking(*values: float, **change: Any) -> dict[str, Any]:
    return {"inputs": [tensor(*values)], **change}


def infer(model: str = "double", body: Any = None, *headers: str) -> bytes:
    return post(f"/v2/models/{model}/infer", asking() if body is None else body, *headers)


LAST = infer("double", None, CLOSE)
