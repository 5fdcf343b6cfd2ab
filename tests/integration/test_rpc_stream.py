"""ModelStreamInfer: many requests under way, answers in order, any number of them, and the ends of a
stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from grpc import aio

from repository.errors import InferenceFailedError
from repository.lifecycle.generation import Generation
from repository.messages import InferRequest, InferResponse
from repository.responding import Responses
from repository.signature import Signature
from repository.tensors import Tensor
from server.rpc.answers import FINAL
from server.rpc.stream import MOST_AT_ONCE, Stream
from tests.fakes.manners import ROWS, Manners
from tests.integration.test_routes_keys import write_keys
from tests.rpc import CODE, Rpcs, asking, floats_of, key, rpcs

EMPTY_FINAL = {"triton_enable_empty_final_response": True}


def answer(*values: float) -> InferResponse:
    return InferResponse([Tensor.of("y", np.array([values], np.float32))])


class Many(Manners):
    """`many` answers as often as the test says, by `opened`."""

    def __init__(self) -> None:
        super().__init__()
        self.add("many")
        gen = self.bring_up("many")
        gen.loaded = msgspec.structs.replace(ROWS, abilities=("ask", "decoupled"))
        gen.signature = Signature("many", gen.loaded)
        self.came = asyncio.Event()  # a request has
        self.hold_open = True
        self.answers = lambda request: []

    async def nth(self, n: int) -> Responses:
        while len(self.opened) <= n:
            await self.came.wait()
            self.came.clear()
        return self.opened[n]

    def stream(self, gen: Generation, request: InferRequest) -> Responses:
        self.came.set()
        return super().stream(gen, request)


@asynccontextmanager
async def stream(server: Rpcs, *metadata: tuple[str, str]) -> AsyncIterator[Any]:
    call = server.stub.ModelStreamInfer(metadata=metadata)
    try:
        yield call
    finally:
        call.cancel()


async def status_of(call: Any) -> Any:
    with suppress(aio.AioRpcError):
        assert await call.read() is aio.EOF
    return await call.code()


async def rest_of(call: Any) -> list[Any]:
    found = []
    while (told := await call.read()) is not aio.EOF:
        found.append(told)
    return found


async def test_answers_come_in_the_order_of_the_requests() -> None:
    models = ["held", "double", "slow", "next", "double"]
    async with rpcs() as server, stream(server) as call:
        for n, model in enumerate(models):
            await call.write(asking(n, n, model=model, id=str(n)))
        await call.done_writing()
        await server.until(lambda: server.counted("slow") != {} or bool(server.models.waiting))
        server.models.release()
        found = await rest_of(call)
        assert [t.infer_response.id for t in found] == [str(n) for n in range(5)]
        assert [floats_of(t.infer_response)[0] for t in found] == [0, 2, 4, 6, 8]
        assert all(t.infer_response.parameters[FINAL].bool_param for t in found)
        assert await call.code() is CODE.OK
        assert server.counted("held") == {("grpc", "success"): 1}
        assert server.models.leases == 0


async def test_an_error_is_an_answer_and_the_stream_goes_on() -> None:
    async with rpcs() as server, stream(server) as call:
        for model in ("broken", "nobody", "full", "double"):
            await call.write(asking(model=model, id=model))
        await call.done_writing()
        found = await rest_of(call)
        assert [t.error_message for t in found] == [
            "the model failed: no such luck",
            "Request for unknown model: 'nobody' is not found",
            "Exceeds maximum queue size",
            "",
        ]
        assert [t.infer_response.id for t in found] == ["broken", "nobody", "full", "double"]
        assert await call.code() is CODE.OK
        ended = {model: server.counted(model) for model in ("broken", "full", "double")}
        assert ended == {
            "broken": {("grpc", "backend_error"): 1},
            "full": {("grpc", "rejected"): 1},
            "double": {("grpc", "success"): 1},
        }


async def test_a_request_that_cannot_be_read_is_an_error_among_the_others() -> None:
    async with rpcs() as server:
        path = "/inference.GRPCInferenceService/ModelStreamInfer"
        call = server.channel.stream_stream(path)()
        await call.write(b"\xff" * 9)
        await call.write(asking().SerializeToString())
        await call.done_writing()
        first, second = [await call.read() for _ in range(2)]
        assert b"the message is not what the protocol says" in first and b"\x22" in second
        assert await status_of(call) is CODE.OK


async def test_an_error_ends_the_stream_where_the_client_wants_a_status() -> None:
    async with rpcs() as server, stream(server, ("triton_grpc_error", "true")) as call:
        await call.write(asking(model="held"))
        await call.write(asking(model="nobody"))
        await server.until(lambda: server.counted("_unknown") != {})
        assert await status_of(call) is CODE.NOT_FOUND
        assert await call.details() == "Request for unknown model: 'nobody' is not found"
        await server.until(lambda: server.models.unwanted == 1 and server.models.leases == 0)


async def test_a_model_answers_as_often_as_it_likes() -> None:
    models = Many()
    async with rpcs(models) as server, stream(server) as call:
        await call.write(asking(model="many", id="a"))
        first = await models.nth(0)
        for n in range(3):
            first.tell(answer(n, n))
            told = await call.read()
            assert floats_of(told.infer_response) == [n, n]
            assert told.infer_response.parameters[FINAL].bool_param is False
        first.end()
        await call.write(asking(model="many", id="b", parameters=EMPTY_FINAL))
        second = await models.nth(1)
        second.tell(answer(7, 7))
        second.end()
        await call.done_writing()
        told, last = await rest_of(call)
        assert floats_of(told.infer_response) == [7, 7]
        assert last.infer_response.parameters[FINAL].bool_param is True
        assert last.infer_response.id == "b" and not last.infer_response.outputs
        assert (last.infer_response.model_name, last.infer_response.model_version) == ("many", "1")
        assert server.counted("many") == {("grpc", "success"): 2}
        assert server.models.leases == 0


async def test_models_that_answer_often_wait_for_nobody() -> None:
    models = Many()
    async with rpcs(models) as server, stream(server) as call:
        await call.write(asking(model="held", id="slow"))
        await call.write(asking(model="many", id="quick"))
        (await models.nth(0)).tell(answer(1, 1))
        assert (await call.read()).infer_response.id == "quick"
        models.release()
        assert (await call.read()).infer_response.id == "slow"


async def test_what_a_model_ends_with_comes_after_what_it_said() -> None:
    models = Many()
    async with rpcs(models) as server, stream(server) as call:
        await call.write(asking(model="many", id="a"))
        asked = await models.nth(0)
        asked.tell(answer(1, 1))
        asked.end(InferenceFailedError("no more of this"))
        await call.done_writing()
        told, last = await rest_of(call)
        assert floats_of(told.infer_response) == [1, 1]
        assert last.error_message == "no more of this" and last.infer_response.id == "a"
        assert server.counted("many") == {("grpc", "backend_error"): 1}


async def test_one_answer_of_many_is_refused_where_only_one_can_be_told() -> None:
    async with rpcs(Many()) as server:
        error = await server.refused(server.stub.ModelInfer(asking(model="many")))
        assert error.code() is CODE.UNIMPLEMENTED
        assert "doesn't support models with decoupled transaction policy" in error.details()
        assert server.models.leases == 0


async def test_a_client_that_leaves_takes_all_its_requests_with_it() -> None:
    models = Many()
    async with rpcs(models) as server, stream(server) as call:
        for model in ("held", "many", "held"):
            await call.write(asking(model=model))
        await models.nth(0)
        await server.until(lambda: len(models.waiting) == 2)
        call.cancel()
        await server.until(lambda: models.unwanted == 2 and models.opened[0].over)
        await server.until(lambda: models.leases == 0)
        assert server.counted("held") == {("grpc", "canceled"): 2}
        assert server.counted("many") == {("grpc", "canceled"): 1}


async def test_no_more_requests_are_read_than_may_be_under_way() -> None:
    models = Many()
    async with rpcs(models) as server, stream(server) as call:
        for _ in range(MOST_AT_ONCE + 5):
            await call.write(asking(model="held"))
        await server.until(lambda: len(models.waiting) == MOST_AT_ONCE)
        await call.write(asking(model="held"))
        assert models.leases == MOST_AT_ONCE
        models.release()
        await call.read()
        await server.until(lambda: len(models.waiting) == 6)


async def test_who_does_not_read_is_not_written_to() -> None:
    models, size = Many(), 1 << 20
    async with rpcs(models) as server, stream(server) as call:
        await call.write(asking(model="many"))
        asked = await models.nth(0)
        big = InferResponse([Tensor.of("y", np.zeros(size, np.uint8))])
        for _ in range(100):
            asked.tell(big)
        await call.read()
        before = -1
        while before != asked.waiting:  # until it takes no more
            before = asked.waiting
            for _ in range(50):
                await asyncio.sleep(0.001)
        assert asked.waiting > 50  # sockets and windows hold a few tens of MiB
        for _ in range(99):
            await call.read()
        assert asked.waiting == 0


async def test_the_end_of_the_requests_waits_for_their_answers() -> None:
    async with rpcs() as server, stream(server) as call:
        await call.write(asking(model="held"))
        await call.done_writing()
        await server.until(lambda: bool(server.models.waiting))
        server.models.release()
        assert len(await rest_of(call)) == 1 and await call.code() is CODE.OK


async def test_a_server_that_goes_answers_what_runs_and_ends_the_stream() -> None:
    async with rpcs() as server, stream(server) as call:
        await call.write(asking(model="held", id="last"))
        await server.until(lambda: bool(server.models.waiting))
        server.depot.closing.set()
        server.models.release()
        assert (await call.read()).infer_response.id == "last"
        assert await status_of(call) is CODE.UNAVAILABLE


async def test_a_key_that_is_taken_back_ends_its_streams(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys.yaml", inference="key-i", admin="key-a")
    async with rpcs(api_keys=path) as server, stream(server, *key("key-i")) as call:
        await call.write(asking())
        assert floats_of((await call.read()).infer_response) == [2.0, 4.0]
        write_keys(path, admin="key-a")
        server.depot.gate._look_at = 0.0
        await call.write(asking())
        assert await status_of(call) is CODE.UNAUTHENTICATED
        server.models.release()


class Leaving:
    """gRPC's side of a stream whose client leaves while its `message` is being read."""

    def __init__(self, message: bytes) -> None:
        self.messages = [message]
        self.run: asyncio.Task[None] | None = None

    async def read(self) -> Any:
        if not self.messages:
            await asyncio.Event().wait()
        assert self.run is not None
        self.run.cancel()
        return self.messages.pop()


@pytest.mark.parametrize("model", ["double", "many", "nobody"])
async def test_what_was_asked_for_as_the_client_left_is_left_too(model: str) -> None:
    """Its answer has no chance to begin."""
    models = Many()
    async with rpcs(models) as server:
        context = Leaving(asking(1, 2, model=model).SerializeToString())
        context.run = asyncio.create_task(Stream(server.depot, (), context).run())
        await asyncio.wait((context.run,))
        assert context.run.cancelled()
        await server.until(lambda: models.leases == 0)
        assert server.counted(model) == ({("grpc", "canceled"): 1} if model != "nobody" else {})
        assert all(answers.over for answers in models.opened)
