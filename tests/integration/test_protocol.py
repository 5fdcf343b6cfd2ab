"""HTTP on a real socket: bounds on heads, bodies, pieces and patience; no answer lost or out of turn."""

import asyncio
import json
from contextlib import asynccontextmanager

import numpy as np
import pytest

from repository.messages import InferResponse
from repository.tensors import Tensor
from server import protocol
from server.intake import MAX_CHUNKS
from server.protocol import MOST_HEAD, MOST_PIPELINED, Protocol
from tests.fakes.bodies import body, tensor
from tests.integration.v2 import Stage, listening
from tests.wire import asked, connected, head, post

INFER = "/v2/models/m/infer"
LIVE = head("GET", "/v2/health/live")
META = head("GET", "/v2/models/m")
BODY, _ = body(tensor("x", [1, 2], "FP32", [1, 2]))
GOOD = post(INFER, BODY)


@pytest.fixture(autouse=True, params=[False, True], ids=["asgi", "protocol"])
def fast(request, monkeypatch):
    """Every test runs on both routes."""
    monkeypatch.setattr(Stage, "fast", request.param)


@asynccontextmanager
async def a_port(**limits):
    async with listening(Stage(**limits)) as port:
        yield port


async def test_a_head_that_never_ends_is_refused_before_it_is_large():
    async with a_port() as port, connected(port) as wire:
        await wire.send(b"GET / HTTP/1.1\r\nX-A: ")
        for _ in range(10):
            await wire.send(b"a" * MOST_HEAD)
        answer = await wire.answer()
        assert answer.status == 431 and str(MOST_HEAD) in answer.text
        assert await wire.end() == b""


async def test_an_address_that_never_ends_is_refused_too():
    async with a_port() as port, connected(port) as wire:
        for piece in (b"GET /", *[b"a" * MOST_HEAD] * 10):
            await wire.send(piece)
        assert (await wire.answer()).status == 431


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        (INFER, {"error"}),
        ("/v1/models/load", {"error", "detail"}),
        ("/v1/load_model", {"error"}),
        ("/models", {"message", "code", "type", "link"}),
        ("/models/?model_name=m", {"message", "code", "type", "link"}),
        ("/models/a/b/adapters?limit=1", {"message", "code", "type"}),
    ],
)
async def test_a_head_that_is_too_large_is_refused_in_the_words_of_its_face(path, keys):
    async with a_port() as port:
        answer = await asked(port, head("GET", path, "X-A: " + "a" * MOST_HEAD))
    assert answer.status == 431 and set(json.loads(answer.body)) == keys


@pytest.mark.parametrize("size", [MOST_HEAD - 200, MOST_HEAD + 1])
async def test_the_bound_of_a_head_does_not_depend_on_how_it_is_cut(size):
    raw = head("GET", "/v2/health/live", "X-A: " + "a" * size)
    status = 200 if size < MOST_HEAD else 431
    async with a_port() as port:
        assert (await asked(port, raw)).status == status
        async with connected(port) as wire:
            for at in range(0, len(raw), 5000):
                await wire.send(raw[at : at + 5000])
                await asyncio.sleep(0)
            assert (await wire.answer()).status == status


async def test_a_large_body_and_the_next_head_in_one_piece_are_no_large_head():
    big = post(INFER, b" " * (3 * MOST_HEAD) + BODY)
    async with a_port() as port, connected(port) as wire:
        await wire.send(GOOD + big + GOOD[:30])
        assert [(await wire.answer()).status for _ in range(2)] == [200, 200]
        await wire.send(GOOD[30:])
        assert (await wire.answer()).status == 200


MALFORMED = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01",
    "no verb": b"FOO / HTTP/1.1\r\n\r\n",
    "a proxy's": b"CONNECT a:1 HTTP/1.1\r\n\r\n",
    "length and chunks": head("POST", INFER, "Content-Length: 4", "Transfer-Encoding: chunked")
    + b"0\r\n\r\n" + LIVE,
    "two lengths": head("POST", INFER, "Content-Length: 4", "Content-Length: 5") + b"abcde",
    "a length below zero": head("POST", INFER, "Content-Length: -4") + b"abcd",
    "a length with a sign": head("POST", INFER, "Content-Length: +4") + b"abcd",
    "a length in hex": head("POST", INFER, "Content-Length: 0x4") + b"abcd",
    "a length beyond 64 bits": head("POST", INFER, "Content-Length: " + "9" * 30),
    "space before the colon": head("POST", INFER, "Content-Length : 4") + b"abcd",
    "an unknown coding": head("POST", INFER, "Transfer-Encoding: xchunked") + b"0\r\n\r\n",
    "chunked not last": head("POST", INFER, "Transfer-Encoding: chunked, identity") + b"0\r\n\r\n",
    "a chunk without a size": head("POST", INFER, "Transfer-Encoding: chunked") + b"zz\r\nabc",
    "a chunk below zero": head("POST", INFER, "Transfer-Encoding: chunked") + b"-1\r\nabc",
    "a chunk beyond 64 bits": head("POST", INFER, "Transfer-Encoding: chunked") + b"f" * 17 + b"\r\n",
    "a chunk longer than it says": head("POST", INFER, "Transfer-Encoding: chunked") + b"1\r\nabc\r\n",
    "a folded header": head("GET", "/v2/health/live", "X-A: b\r\n c"),
    "bare line feeds": b"GET /v2/health/live HTTP/1.1\n\n",
    "a NUL": head("GET", "/v2/models/\0"),
    "no ASCII": "GET /v2/models/é HTTP/1.1\r\n\r\n".encode(),
}  # fmt: skip


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED)
async def test_what_is_not_http_is_told_so_in_json_and_nothing_behind_it_is_heard(raw):
    async with a_port() as port, connected(port) as wire:
        await wire.send(raw)
        answer = await wire.answer()
        assert answer.status == 400 and answer.text
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["connection"] == "close"
        assert await wire.end() == b""


async def test_pipelined_requests_are_answered_in_their_order():
    async with a_port() as port, connected(port) as wire:
        await wire.send(LIVE + GOOD + META + post(INFER, b"{") + LIVE)
        assert [(await wire.answer()).status for _ in range(5)] == [200, 200, 200, 400, 200]


async def test_what_is_broken_behind_good_requests_is_told_after_their_answers():
    async with a_port() as port, connected(port) as wire:
        await wire.send(GOOD + META + b"\x16\x03 nonsense\r\n\r\n" + LIVE)
        assert [(await wire.answer()).status for _ in range(3)] == [200, 200, 400]
        assert await wire.end() == b""
        broken = head("POST", INFER, "Transfer-Encoding: chunked") + b"zz\r\n"
    async with a_port() as port, connected(port) as wire:
        await wire.send(GOOD + META + broken + LIVE)
        assert [(await wire.answer()).status for _ in range(3)] == [200, 200, 400]
        assert await wire.end() == b""


async def test_only_so_many_requests_may_be_sent_ahead():
    async with a_port() as port, connected(port) as wire:
        await wire.send(LIVE * 5000)
        found = [(await wire.answer()).status for _ in range(MOST_PIPELINED + 1)]
        assert set(found) == {200}
        assert (await wire.answer()).status == 429
        assert await wire.end() == b""


async def test_a_body_in_countless_tiny_chunks_is_refused_and_in_large_ones_it_is_not():
    tiny = head("POST", INFER, "Transfer-Encoding: chunked")
    async with a_port() as port:
        answer = await asked(port, tiny + b"1\r\n \r\n" * (MAX_CHUNKS + 1))
        assert answer.status == 400 and "pieces" in answer.text
        few = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
        assert (await asked(port, tiny + few)).status == 200


async def test_what_follows_a_body_has_no_say_in_what_is_done_with_it():
    tiny = head("POST", INFER, "Transfer-Encoding: chunked")
    told = b"%x\r\n%b\r\n0\r\nInference-Header-Content-Length: 3\r\n\r\n" % (len(BODY), BODY)
    async with a_port() as port, connected(port) as wire:
        await wire.send(tiny + told + GOOD)
        assert [(await wire.answer()).status for _ in range(2)] == [200, 200]


@pytest.mark.parametrize("begin", [b"0\r\nX-A: ", b"1;"], ids=["trailer", "extension"])
async def test_what_frames_a_body_is_bounded(begin):
    async with a_port() as port, connected(port) as wire:
        await wire.send(head("POST", INFER, "Transfer-Encoding: chunked") + begin)
        for _ in range(10):
            await wire.send(b"a" * MOST_HEAD)
        assert (await wire.answer()).status == 431
        assert await wire.end() == b""


async def test_old_http_is_answered_and_hung_up_on():
    async with a_port() as port, connected(port) as wire:
        await wire.send(b"GET /v2/health/live HTTP/1.0\r\n\r\n")
        assert (await wire.answer()).status == 200
        assert await wire.end() == b""


@pytest.mark.parametrize("wish", ["websocket", "h2c"])
async def test_a_wish_for_another_protocol_is_not_heard(wish):
    """Some clients add it to every first request (Java's, curl --http2)."""
    wishes = (
        "Connection: Upgrade, HTTP2-Settings", f"Upgrade: {wish}", "HTTP2-Settings: AAMAAABk"
    )  # fmt: skip
    async with a_port() as port, connected(port) as wire:
        await wire.send(post(INFER, BODY, *wishes) + head("GET", "/v2/health/live", *wishes) + LIVE)
        assert [(await wire.answer()).status for _ in range(3)] == [200, 200, 200]
        for at, byte in enumerate(raw := post(INFER, BODY, *wishes)):
            await wire.send(bytes([byte]))
            if at % 50 == 0:
                await asyncio.sleep(0)
        assert (await wire.answer()).status == 200 and raw


async def test_who_is_refused_early_reads_why_while_it_still_sends():
    async with a_port(max_body=1000) as port, connected(port) as wire:
        await wire.send(head("POST", INFER, f"Content-Length: {64 << 20}"))
        for _ in range(64):
            await wire.send(b"x" * (1 << 20))
        answer = await wire.answer()
        assert answer.status == 400 and "exceeds" in answer.text
        assert await wire.end() == b""


# patience -----------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    """Limits that are over at once."""
    monkeypatch.setattr(protocol, "LOOK_S", 0.01)
    for name in ("head_s", "body_s", "unread_s"):
        monkeypatch.setattr(Protocol, name, 0.05)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("said", "status"),
    [(b"GET / HT", 408), (head("POST", INFER, "Content-Length: 99") + b"0123456789", 408)],
    ids=["head", "body"],
)
async def test_half_a_request_is_waited_for_only_so_long(said, status):
    stage = Stage()
    async with listening(stage, watched=True) as port, connected(port) as wire:
        await wire.send(said)
        answer = await wire.answer()
        assert answer.status == status and answer.text
        assert await wire.end() == b""
    assert stage.leases == 0


@pytest.mark.usefixtures("impatient")
async def test_who_says_nothing_is_let_go_and_who_waits_for_an_answer_is_not():
    stage = Stage()
    asked_, future = asyncio.Event(), asyncio.get_running_loop().create_future()

    def hold(request):
        asked_.set()
        return future

    stage.models.answers = hold
    async with listening(stage, watched=True) as port, connected(port) as waiting:
        await waiting.send(GOOD)
        await asked_.wait()
        async with connected(port) as silent:
            assert await silent.end() == b""
        future.set_exception(RuntimeError("enough"))
        assert (await waiting.answer()).status == 500


@pytest.mark.usefixtures("impatient")
async def test_who_does_not_read_its_answer_gives_the_lease_back():
    stage = Stage()
    large, _ = body(tensor("x", [8, 2], "FP32", [0] * 16), parameters={"binary_data_output": True})

    def much(request):
        return InferResponse([Tensor.of("y", np.zeros(64 << 20, np.uint8)) for _ in range(2)])

    stage.models.answers = much
    async with listening(stage, watched=True) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.transport.pause_reading()
        writer.write(post(INFER, large))
        async with asyncio.timeout(30):
            await stage.meter.ended.wait()
        assert stage.leases == 0
        writer.transport.abort()
