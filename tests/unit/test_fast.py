"""The protocol path, callback by callback: what it remembers, what it lets go, what it makes."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import uvicorn
from uvicorn.server import ServerState

from repository.errors import InferenceFailedError
from repository.messages import InferRequest, InferResponse
from repository.tensors import ALIGN, Tensor
from server.errors import UnauthorizedError
from server.exchange import ENDED
from server.fast import STRAIGHT_FROM, FastProtocol
from server.protocol import MOST_HEAD
from server.straight import Straight
from tests.fakes.bodies import body, tensor
from tests.fakes.transport import FakeTransport
from tests.integration.v2 import Stage, double
from tests.wire import head, post

INFER = "/v2/models/m/infer"
X = tensor("x", [1, 2], "FP32", [1, 2])
GOOD = post(INFER, body(X)[0])


class Noting(FastProtocol):
    """Counts what its parser tells it."""

    heads = 0

    def on_headers_complete(self) -> None:
        self.heads += 1
        super().on_headers_complete()


class Line:
    """One connection to the faces of a stage, without a socket."""

    def __init__(self, **more: Any) -> None:
        self.stage = Stage(**more)
        config = uvicorn.Config(
            self.stage.app, lifespan="off", log_config=None, date_header=False, server_header=False
        )
        self.state = ServerState()
        loop = asyncio.get_running_loop()
        self.protocol = Noting(config, self.state, {}, loop, door=self.stage.door)
        self.transport = FakeTransport()
        self.transport.protocol = self.protocol
        self.protocol.connection_made(self.transport)

    @property
    def goes_straight(self) -> bool:
        return isinstance(self.transport.protocol, Straight)

    def say(self, data: bytes) -> bytes:
        """What is answered at once."""
        to = self.transport.protocol
        if isinstance(to, Straight):
            place = to.get_buffer(len(data))
            place[: len(data)] = data
            to.buffer_updated(len(data))
        else:
            to.data_received(data)
        return self.transport.heard()


def large(n_bytes: int, model: str = "m") -> bytes:
    """A request with that many bytes of data behind its JSON."""
    content, length = body(
        tensor("x", [n_bytes // 8, 2], "FP32", binary_data_size=n_bytes), blobs=bytes(n_bytes)
    )
    assert length is not None
    said = f"Inference-Header-Content-Length: {length.decode()}"
    return post(f"/v2/models/{model}/infer", content, said)


async def test_a_head_that_comes_again_is_not_parsed_again() -> None:
    line = Line()
    first = line.say(GOOD)
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert [line.say(GOOD) for _ in range(3)] == [first] * 3
    assert line.protocol.heads == 1
    other = post("/v2/models/org/n/infer", body(X)[0])
    assert b'"model_name":"org/n"' in line.say(other) and line.protocol.heads == 2
    assert line.say(GOOD) == first and line.protocol.heads == 3
    assert line.stage.meter.outcomes == ["success"] * 6


async def test_a_known_head_may_come_with_any_body_in_any_pieces() -> None:
    line = Line()
    first = line.say(GOOD)
    again = GOOD.replace(b"[1, 2]}", b"[3, 4]}")
    for cut in range(GOOD.index(b"\r\n\r\n") + 4, len(GOOD)):
        assert line.say(again[:cut]) == b""
        assert line.say(again[cut:]) == first.replace(b"[2.0,4.0]", b"[6.0,8.0]")
    assert line.protocol.heads == 1
    assert line.say(again[:-2]) == b"" and line.say(again[-2:] + GOOD).endswith(first)


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n" + GOOD,
        post(INFER, body(X)[0], "Connection: close"),
        post(INFER, body(X)[0], "Expect: 100-continue"),
        GOOD.replace(b"HTTP/1.1", b"HTTP/1.0"),
        head("POST", INFER, "Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n",
        head("POST", INFER, "Content-Length: 2", "X-A: " + "a" * 5000) + b"{}",
        GOOD + GOOD,
        GOOD + GOOD[:20],
        post(INFER, body(X)[0], "Connection: upgrade", "Upgrade: h2c"),
    ],
    ids=[
        "not at its beginning",
        "close",
        "expect",
        "old",
        "chunks",
        "long",
        "two",
        "more",
        "upgrade",
    ],
)
async def test_a_head_is_known_only_if_nothing_was_special_about_it(raw: bytes) -> None:
    line = Line()
    assert line.say(raw)
    assert line.protocol._known is None


async def test_as_many_wishes_for_an_upgrade_as_fit_into_a_piece_are_all_answered() -> None:
    line = Line()
    wish = post(INFER, body(X)[0], "Connection: upgrade", "Upgrade: h2c")
    assert line.say(wish * 1000).count(b"HTTP/1.1 200 ") == 1000
    assert line.say(GOOD).startswith(b"HTTP/1.1 200 ") and not line.transport.closing


async def test_a_head_is_not_taken_for_long_because_much_came_before_it() -> None:
    line = Line()
    count = MOST_HEAD // len(GOOD) + 1
    piece = GOOD[20:] + GOOD * count + GOOD[:20]
    assert line.say(GOOD[:20]) == b""
    for _ in range(3):
        heard = line.say(piece)
        assert heard.count(b"HTTP/1.1 200 ") == count + 1 and b"431" not in heard


async def test_a_known_head_is_judged_again_when_the_keys_have_changed() -> None:
    epoch, known = 0, True

    def authorize(headers: Any) -> None:
        if not known:
            raise UnauthorizedError("API key not known")

    line = Line(authorize=authorize, epoch=lambda: epoch)
    first = line.say(GOOD)
    epoch = 1
    assert line.say(GOOD) == first and line.protocol.heads == 1
    epoch, known = 2, False
    refused = line.say(GOOD)
    assert refused.startswith(b"HTTP/1.1 401 ") and b"connection: close" in refused
    assert line.transport.closing
    assert line.stage.meter.outcomes == ["success"] * 2  # who has no key is not counted


async def test_no_task_is_made_for_a_request() -> None:
    line = Line()
    future = asyncio.get_running_loop().create_future()
    line.stage.models.answers = lambda _: future
    tasks = asyncio.all_tasks()
    assert line.say(GOOD) == b""
    assert asyncio.all_tasks() == tasks
    future.set_exception(InferenceFailedError("no such luck"))
    await asyncio.sleep(0)
    assert b"no such luck" in line.transport.heard()


async def test_requests_leave_no_garbage() -> None:
    line = Line()
    answers = [double, lambda _: InferenceFailedError("no"), lambda _: ZeroDivisionError("oh")]
    pending: list[asyncio.Future[InferResponse]] = []

    def later(request: InferRequest) -> asyncio.Future[InferResponse]:
        pending.append(asyncio.get_running_loop().create_future())
        return pending[-1]

    async def round_() -> None:
        for answer in answers:
            line.stage.models.answers = answer
            line.say(GOOD)
        line.say(post(INFER, b"{"))
        line.stage.models.answers = later
        line.say(GOOD)
        pending.pop().set_exception(InferenceFailedError("later"))
        await asyncio.sleep(0)
        line.transport.heard()

    await round_()
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            await round_()
        assert gc.collect() == 0
    finally:
        gc.enable()


async def test_an_idle_connection_holds_neither_its_last_body_nor_its_answer() -> None:
    line = Line()
    held: list[Any] = []

    def answer(request: InferRequest) -> InferResponse:
        found = np.zeros(4, np.float32)
        held.append(weakref.ref(found))
        base: Any = request.inputs[0].data
        held.append(weakref.ref(memoryview(base).obj))
        return InferResponse([Tensor("y", "FP32", (4,), found.data.cast("B"))])

    line.stage.models.answers = answer
    raw = large(STRAIGHT_FROM * 2)
    line.say(raw[:300])
    line.say(raw[300:])
    del line.transport.said[:]
    assert line.protocol.cycle is ENDED
    assert len(held) == 2 and [ref() for ref in held] == [None, None]


async def test_a_large_body_comes_straight_to_a_place_near_the_model() -> None:
    line = Line()
    rooms: list[tuple[str, int | None, int]] = []
    seen: list[int] = []

    def room(model: str, version: int | None, size: int) -> memoryview:
        rooms.append((model, version, size))
        return np.zeros(size, np.uint8).data

    def answer(request: InferRequest) -> InferResponse:
        data = np.frombuffer(request.inputs[0].data, np.uint8)
        seen.append(data.ctypes.data % ALIGN)
        return InferResponse([Tensor.of("y", np.array([data.sum()], np.float64))])

    line.stage.models.room = room  # type: ignore[method-assign]
    line.stage.models.answers = answer
    raw = large(STRAIGHT_FROM * 2, "m/versions/1")
    ones = raw[: -STRAIGHT_FROM * 2] + b"\1" * (STRAIGHT_FROM * 2)
    top = raw.index(b"\r\n\r\n") + 4
    for cut in (top, top + 10, top + 1000):
        assert line.say(ones[:cut]) == b""
        assert line.goes_straight
        assert line.say(ones[cut : cut + 70_000]) == b""
        answered = line.say(ones[cut + 70_000 :])
        assert b"200 OK" in answered and b"%d.0" % (STRAIGHT_FROM * 2) in answered
        assert line.transport.protocol is line.protocol and line.transport.reading
        assert line.say(GOOD).startswith(b"HTTP/1.1 200")
    size = len(raw) - top
    assert rooms == [("m", 1, size + ALIGN)] * 3
    assert seen[::2] == [0, 0, 0]
    assert line.say(ones)  # all of it at once needs no place
    assert len(rooms) == 3


async def test_a_large_body_that_stops_coming_gives_its_place_and_its_connection_back() -> None:
    line = Line()
    places: list[weakref.ref[Any]] = []

    def room(model: str, version: int | None, size: int) -> memoryview:
        place = np.zeros(size, np.uint8)
        places.append(weakref.ref(place))
        return place.data

    line.stage.models.room = room  # type: ignore[method-assign]
    line.say(large(STRAIGHT_FROM * 2)[:400])
    assert line.goes_straight and places[0]() is not None
    now = line.protocol.loop.time()
    line.protocol.look(now)
    line.protocol.look(now + line.protocol.body_s + 1)
    assert line.transport.heard().startswith(b"HTTP/1.1 408 ")
    assert line.transport.protocol is line.protocol and line.transport.eof
    assert places[0]() is None and line.stage.meter.outcomes == ["canceled"]
    assert line.say(bytes(1000)) == b""  # it is still heard out, and forgotten


async def test_who_leaves_is_given_up_wherever_its_request_is() -> None:
    for raw in (GOOD[:-1], large(STRAIGHT_FROM * 2)[:400], GOOD):
        line = Line()
        future = asyncio.get_running_loop().create_future()
        line.stage.models.answers = lambda _, future=future: future
        line.say(raw)
        line.transport.lose()
        assert line.stage.leases == 0 and line.stage.meter.outcomes == ["canceled"]
        assert future.cancelled() is (raw is GOOD)
        await asyncio.sleep(0)
        assert line.transport.said == [] and not line.state.tasks and not line.state.connections


async def test_the_older_request_of_a_lost_connection_is_given_up_too() -> None:
    line = Line()
    future = asyncio.get_running_loop().create_future()
    line.stage.models.answers = lambda _: future
    line.say(GOOD + GOOD)
    line.transport.lose()
    assert future.cancelled() and line.stage.leases == 0


async def test_a_server_that_ends_cuts_off_what_it_does_not_wait_for() -> None:
    line = Line()
    future = asyncio.get_running_loop().create_future()
    line.stage.models.answers = lambda _: future
    line.say(GOOD)
    line.protocol.shutdown()
    assert not line.transport.closing
    for task in line.state.tasks:
        task.cancel(msg="enough")
    await asyncio.sleep(0)
    heard = line.transport.heard()
    assert heard.startswith(b"HTTP/1.1 503 ") and b"shutting down" in heard
    assert line.transport.closing
    assert future.cancelled() and line.stage.leases == 0
    assert line.stage.meter.outcomes == ["rejected"] and not line.state.tasks


async def test_who_does_not_read_is_answered_the_slow_way() -> None:
    line = Line()
    line.say(GOOD)
    line.protocol.pause_writing()
    assert line.say(GOOD) == b""
    for _ in range(5):
        await asyncio.sleep(0)
    assert line.transport.heard() == b""
    line.protocol.resume_writing()
    for _ in range(5):
        await asyncio.sleep(0)
    assert line.transport.heard().startswith(b"HTTP/1.1 200 ")


async def test_a_large_answer_is_handed_over_as_it_is() -> None:
    line = Line()
    data = np.zeros(1 << 20, np.uint8)
    line.stage.models.answers = lambda _: InferResponse([Tensor.of("y", data)])
    line.protocol.data_received(post(INFER, body(X, parameters={"binary_data_output": True})[0]))
    *_, last = line.transport.said
    assert np.shares_memory(np.frombuffer(last, np.uint8), data)


async def test_an_answer_of_old_http_ends_its_connection() -> None:
    line = Line()
    answer = line.say(GOOD.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert b"\r\nconnection: close\r\n" in answer and line.transport.closing
