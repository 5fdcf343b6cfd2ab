"""V2 infer on a real socket: slow, lying and leaving clients, and Triton's own."""

import asyncio
import json
from contextlib import asynccontextmanager

import numpy as np
import pytest

from repository.lifecycle.states import Event
from repository.messages import InferResponse
from repository.tensors import Tensor
from tests.fakes.bodies import body, tensor
from tests.integration.v2 import Stage, double, listening

BODY, _ = body(tensor("x", [1, 2], "FP32", [1, 2]))


@pytest.fixture(autouse=True, params=[False, True], ids=["asgi", "protocol"])
def fast(request, monkeypatch):
    """Every test runs on both routes."""
    monkeypatch.setattr(Stage, "fast", request.param)


over_asgi = pytest.mark.parametrize("fast", [False], indirect=True)


def head(length, *more):
    lines = ["POST /v2/models/m/infer HTTP/1.1", "Host: t", f"Content-Length: {length}", *more]
    return "\r\n".join([*lines, "", ""]).encode()


@asynccontextmanager
async def connected(port):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()


async def reply_of(reader):
    async with asyncio.timeout(10):
        top = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(top.split("content-length: ")[1].split("\r\n")[0])
        return int(top.split()[1]), top, await reader.readexactly(length)


class Held:
    """A model that answers when it is told to."""

    def __init__(self, stage):
        self.asked = asyncio.Event()
        self.future = asyncio.get_running_loop().create_future()
        stage.models.answers = self

    def __call__(self, request):
        self.asked.set()
        self.request = request
        return self.future

    async def given_up(self):
        async with asyncio.timeout(10):
            await asyncio.wait([self.future])
        return self.future.cancelled()


async def test_a_slow_client_is_waited_for():
    stage = Stage()
    async with listening(stage) as port, connected(port) as (reader, writer):
        writer.write(head(len(BODY)))
        for i in range(len(BODY)):
            writer.write(BODY[i : i + 1])
            await writer.drain()
        status, _, answer = await reply_of(reader)
    assert status == 200 and json.loads(answer)["outputs"][0]["data"] == [2.0, 4.0]


async def test_a_connection_serves_request_after_request():
    async with listening(Stage()) as port, connected(port) as (reader, writer):
        writer.write((head(len(BODY)) + BODY) * 2 + head(1) + b"{" + head(len(BODY)) + BODY)
        assert [(await reply_of(reader))[0] for _ in range(4)] == [200, 200, 400, 200]


async def test_a_gigabyte_announced_is_refused_before_it_comes():
    stage = Stage()
    async with listening(stage) as port, connected(port) as (reader, writer):
        writer.write(head(10**9) + b"0123456789")
        status, top, answer = await reply_of(reader)
        assert status == 400 and b"exceeds the maximum allowed" in answer
        assert "connection: close" in top
        assert await reader.read() == b""
    assert stage.meter.outcomes == ["bad_request"]


async def test_a_client_that_leaves_before_its_body_has_come_changes_nothing():
    stage = Stage()
    async with listening(stage) as port:
        async with connected(port) as (_, writer):
            writer.write(head(1000) + b"0123456789")
            await writer.drain()
        async with asyncio.timeout(10):
            await stage.meter.ended.wait()
    assert stage.meter.outcomes == ["canceled"] and stage.meter.begun == []


async def test_a_client_that_leaves_while_it_waits_ends_its_work_and_its_lease():
    stage = Stage()
    held = Held(stage)
    async with listening(stage) as port:
        async with connected(port) as (_, writer):
            writer.write(head(len(BODY)) + BODY)
            await held.asked.wait()
            assert stage.leases == 1
        assert await held.given_up()
        await stage.meter.ended.wait()
        assert stage.leases == 0
        assert stage.meter.outcomes == ["canceled"]

        stage.models.answers = double
        async with connected(port) as (reader, writer):
            writer.write(head(len(BODY)) + BODY)
            assert (await reply_of(reader))[0] == 200


@over_asgi
async def test_an_answer_that_takes_its_time_still_comes():
    stage = Stage()
    held = Held(stage)
    watched = asyncio.Event()
    app = stage.app

    async def watching(scope, receive, send):
        async def noting():
            if held.asked.is_set():
                watched.set()
            return await receive()

        await app(scope, noting, send)

    stage.app = watching
    async with listening(stage) as port, connected(port) as (reader, writer):
        writer.write(head(len(BODY)) + BODY)
        async with asyncio.timeout(10):
            await watched.wait()
        held.future.set_result(double(held.request))
        assert (await reply_of(reader))[0] == 200
        stage.models.answers = double
        writer.write(head(len(BODY)) + BODY)
        assert (await reply_of(reader))[0] == 200
    assert stage.leases == 0 and stage.meter.outcomes == ["success"] * 2


@over_asgi
async def test_the_lease_lasts_until_the_answer_was_handed_over():
    stage = Stage()
    leases = []
    stage.models.answers = lambda _: InferResponse([Tensor.of("y", np.zeros(1 << 22, np.uint8))])
    app = stage.app

    async def watching(scope, receive, send):
        async def noting(message):
            leases.append(stage.leases)
            await send(message)

        await app(scope, receive, noting)

    stage.app = watching
    content, _ = body(tensor("x", [1, 2], "FP32", [1, 2]), parameters={"binary_data_output": True})
    async with listening(stage) as port, connected(port) as (reader, writer):
        writer.write(head(len(content)) + content)
        assert (await reply_of(reader))[0] == 200
    assert leases == [1] * 3 and stage.leases == 0


async def test_a_generation_that_drains_answers_what_it_holds():
    stage = Stage()
    held = Held(stage)
    (_, gen) = stage.models.generations["m"]
    async with listening(stage) as port, connected(port) as (reader, writer):
        writer.write(head(len(BODY)) + BODY)
        await held.asked.wait()
        gen.step(Event.RETIRE)
        held.future.set_result(double(held.request))
        status, _, answer = await reply_of(reader)
    assert status == 200 and json.loads(answer)["model_version"] == "2"
    assert gen.idle.is_set()


async def test_the_body_is_asked_for_only_when_it_is_wanted():
    async with listening(Stage()) as port:
        async with connected(port) as (reader, writer):
            writer.write(head(len(BODY), "Expect: 100-continue"))
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
            writer.write(BODY)
            assert (await reply_of(reader))[0] == 200
        async with connected(port) as (reader, writer):
            writer.write(head(10**9, "Expect: 100-continue"))
            assert (await reply_of(reader))[0] == 400


async def test_tritons_client_is_content():
    http = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    utils = pytest.importorskip("tritonclient.utils")
    array = np.array([[1, 2], [3, 4]], np.float32)

    def speak(port):
        with http.InferenceServerClient(f"127.0.0.1:{port}") as client:
            assert client.is_server_live() and client.is_server_ready()
            assert client.is_model_ready("m") and client.is_model_ready("m", "1")
            assert not client.is_model_ready("no")
            assert client.get_server_metadata()["name"] == "depot"
            assert client.get_model_metadata("m")["versions"] == ["1", "2"]
            for binary in (True, False):
                x = http.InferInput("x", [2, 2], "FP32")
                x.set_data_from_numpy(array, binary_data=binary)
                for outputs in (None, [http.InferRequestedOutput("y", binary_data=binary)]):
                    result = client.infer("m", [x], outputs=outputs, request_id="7")
                    assert np.array_equal(result.as_numpy("y"), array * 2)
                    assert result.get_response()["id"] == "7"
            with pytest.raises(utils.InferenceServerException, match="unknown model: 'no'"):
                client.infer("no", [x])

    async with listening(Stage()) as port:
        await asyncio.to_thread(speak, port)
