"""ModelInfer: what is asked, what is answered, what is refused, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import logging

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from repository.tensors import Tensor
from server.rpc.wire import field
from tests.rpc import CODE, asking, floats_of, request_of, rpcs


async def test_a_request_is_answered_with_raw_contents_and_counted_as_grpc() -> None:
    async with rpcs() as server:
        for _ in range(2):  # the second time its form is known
            answer = await server.stub.ModelInfer(asking(1, 2, id="seven"))
            assert floats_of(answer) == [2.0, 4.0]
            assert (answer.model_name, answer.model_version, answer.id) == ("double", "2", "seven")
            (y,) = answer.outputs
            assert (y.name, y.datatype, list(y.shape)) == ("y", "FP32", [1, 2])
        assert server.counted() == {("grpc", "success"): 2}
        assert server.models.leases == 0


async def test_a_version_and_outputs_may_be_named() -> None:
    async with rpcs() as server:
        answer = await server.stub.ModelInfer(asking(version="1", outputs=["y"]))
        assert answer.model_version == "1" and [o.name for o in answer.outputs] == ["y"]
        error = await server.refused(server.stub.ModelInfer(asking(outputs=["z"])))
        assert error.code() is CODE.INVALID_ARGUMENT
        error = await server.refused(server.stub.ModelInfer(asking(version="one")))
        assert error.code() is CODE.INVALID_ARGUMENT and "version string 'one'" in error.details()


async def test_a_request_may_bring_its_values_one_by_one() -> None:
    asked = service_pb2.ModelInferRequest(model_name="double")
    x = asked.inputs.add(name="x", datatype="FP32", shape=[2, 2])
    x.contents.fp32_contents.extend([1, 2, 3, 4])
    async with rpcs() as server:
        assert floats_of(await server.stub.ModelInfer(asked)) == [2.0, 4.0, 6.0, 8.0]


async def test_parameters_come_back_as_the_model_says_them() -> None:
    said = {"a": True, "b": 7, "c": "text", "d": 0.5}
    async with rpcs() as server:
        answer = await server.stub.ModelInfer(asking(model="named", parameters=said))
    found = answer.parameters
    assert found["a"].bool_param is True and found["b"].int64_param == 7
    assert found["c"].string_param == "text" and found["d"].double_param == 0.5


async def test_the_adapter_may_be_named_in_the_metadata() -> None:
    async with rpcs() as server:
        answer = await server.stub.ModelInfer(
            asking(model="named"), metadata=(("x-amzn-sagemaker-adapter-identifier", "mine"),)
        )
    assert answer.parameters["adapter"].string_param == "mine"


@pytest.mark.parametrize(
    ("model", "code", "text"),
    [
        ("nobody", CODE.NOT_FOUND, "Request for unknown model: 'nobody' is not found"),
        ("broken", CODE.INTERNAL, "the model failed: no such luck"),
        ("full", CODE.UNAVAILABLE, "Exceeds maximum queue size"),
        ("gone", CODE.INTERNAL, "its worker has died; ask again"),
        ("stuck", CODE.INTERNAL, "internal server error; its log says more"),
    ],
)
async def test_an_error_has_the_text_that_http_gives_it(
    model: str, code: object, text: str
) -> None:
    async with rpcs() as server:
        error = await server.refused(server.stub.ModelInfer(asking(model=model)))
        assert error.code() is code and error.details() == text
        assert "x-modeldepot-code" in dict(error.trailing_metadata())
        assert server.models.leases == 0


async def test_when_to_ask_again_is_in_the_trailing_metadata() -> None:
    async with rpcs() as server:
        error = await server.refused(server.stub.ModelInfer(asking(model="full")))
    trailing = dict(error.trailing_metadata())
    assert trailing["retry-after"] == "3" and trailing["x-modeldepot-code"] == "queue_full"


def both_ways() -> service_pb2.ModelInferRequest:
    asked = asking()
    asked.inputs[0].contents.fp32_contents.extend([1, 2])
    return asked


def without_data() -> service_pb2.ModelInferRequest:
    asked = asking()
    asked.ClearField("raw_input_contents")
    return asked


def one_too_many() -> service_pb2.ModelInferRequest:
    asked = asking()
    asked.raw_input_contents.append(b"1234")
    return asked


def shaped(*shape: int) -> service_pb2.ModelInferRequest:
    asked = asking()
    del asked.inputs[0].shape[:]
    asked.inputs[0].shape.extend(shape)
    return asked


def twice() -> service_pb2.ModelInferRequest:
    x = Tensor.of("x", np.ones((1, 2), np.float32))
    return request_of([x, x])


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (both_ways(), "contents field must not be specified when using raw_input_contents"),
        (without_data(), "unable to find data for input tensor 'x' for model 'double'"),
        (one_too_many(), "unexpected additional input data for model 'double'"),
        (shaped(1, 3), "unexpected shape for input 'x'"),
        (shaped(3, 2), "input byte size mismatch for input 'x'. Expected 24"),
        (shaped(-1, 2), "has a negative dimension"),
        (shaped(2**62, 2**62), "larger than any memory"),
        (shaped(*[1] * 100_000), "dimensions; at most 64"),
        (twice(), "input 'x' already exists in request"),
        (request_of([]), "expected 1 inputs but got 0 inputs"),
        (asking(parameters={"triton_x": True}), "reserved and cannot be specified"),
        (asking(parameters={"priority": "high"}), "Unable to parse 'priority'"),
        (asking(outputs=["y", "y"]), "output 'y' already exists in request"),
    ],
    ids=lambda v: v[:30] if isinstance(v, str) else "",
)
async def test_what_does_not_fit_is_an_invalid_argument(
    asked: service_pb2.ModelInferRequest, text: str
) -> None:
    async with rpcs() as server:
        error = await server.refused(server.stub.ModelInfer(asked))
        assert error.code() is CODE.INVALID_ARGUMENT and text in error.details()


HOSTILE = {
    "not a message": b"\xff" * 40,
    "cut off": asking().SerializeToString()[:-3],
    "a length beyond its end": b"\x3a\xff\xff\xff\xff\x7f1234",
    "a number without an end": b"\x08" + b"\xff" * 20,
    "a group": b"\x0b\x0c",
    "text that is not UTF-8": b"\x0a\x02\xc3\x28",
    "a million inputs": b"\x2a\x00" * 1_000_000,
    "a field of another kind": b"\x38\x01",
}


@pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE)
async def test_what_is_no_request_is_told_so_and_not_logged(
    message: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with rpcs() as server:
        infer = server.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        with caplog.at_level(logging.WARNING):
            found = await infer(message, timeout=20).code()
        assert found is CODE.INVALID_ARGUMENT and caplog.records == []
        assert floats_of(await server.stub.ModelInfer(asking())) == [2.0, 4.0]


async def test_fields_that_nobody_knows_are_passed_over() -> None:
    message = asking().SerializeToString() + field(99, b"from a later day")
    async with rpcs() as server:
        infer = server.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        answer = service_pb2.ModelInferResponse.FromString(await infer(message))
    assert floats_of(answer) == [2.0, 4.0]


async def test_a_client_that_leaves_takes_its_request_with_it() -> None:
    async with rpcs() as server:
        call = server.stub.ModelInfer(asking(model="held"))
        await server.until(lambda: bool(server.models.waiting))
        call.cancel()
        await server.until(lambda: server.models.unwanted == 1)
        await server.until(lambda: server.models.leases == 0)
        assert server.counted("held") == {("grpc", "canceled"): 1}


async def test_a_deadline_ends_the_request_that_it_is_of() -> None:
    async with rpcs() as server:
        error = await server.refused(server.stub.ModelInfer(asking(model="held"), timeout=0.2))
        assert error.code() is CODE.DEADLINE_EXCEEDED
        await server.until(lambda: server.models.unwanted == 1 and server.models.leases == 0)


async def test_a_message_beyond_the_limit_is_refused() -> None:
    async with rpcs(grpc_max_message=10_000) as server:
        error = await server.refused(server.stub.ModelInfer(asking(*[1] * 8000, model="wide")))
        assert error.code() is CODE.RESOURCE_EXHAUSTED
        assert floats_of(await server.stub.ModelInfer(asking())) == [2.0, 4.0]


async def test_a_small_message_that_grows_beyond_the_limit_is_refused() -> None:
    asked = asking(*[0.0] * 4_000_000, model="wide")
    async with rpcs(grpc_max_message=1_000_000) as server:
        call = server.stub.ModelInfer(asked, compression=grpc.Compression.Gzip, timeout=20)
        error = await server.refused(call)
        assert error.code() is CODE.RESOURCE_EXHAUSTED
        assert floats_of(await server.stub.ModelInfer(asking())) == [2.0, 4.0]


async def test_a_large_answer_comes_whole() -> None:
    size = 9 * 1024 * 1024
    async with rpcs() as server:
        answer = await server.stub.ModelInfer(asking(size, 0, model="large"))
    (raw,) = answer.raw_output_contents
    assert raw == np.arange(size, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("how", ["gzip", "deflate"])
async def test_a_client_may_compress(how: str) -> None:
    compression = {"gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}[how]
    values = [1.0] * 4000
    async with rpcs() as server:
        answer = await server.stub.ModelInfer(
            asking(*values, model="wide"), compression=compression
        )
    assert floats_of(answer) == [2.0] * 4000


async def test_what_runs_when_the_server_goes_is_answered() -> None:
    async with rpcs() as server:
        call = server.stub.ModelInfer(asking(model="held"))
        await server.until(lambda: bool(server.models.waiting))
        closing = asyncio.create_task(server.port.close(20))
        await asyncio.sleep(0)
        server.models.release()
        assert floats_of(await call) == [2.0, 4.0]
        await closing
