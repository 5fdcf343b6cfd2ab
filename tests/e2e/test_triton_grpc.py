"""Triton's own clients over gRPC at a real server: tritonclient.grpc and its aio twin."""

from __future__ import annotations

import asyncio
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import (
    InferenceServerException,
    np_to_triton_dtype,
    serialize_byte_tensor,
    shared_memory,
)

from tests.e2e.lasting import Lasting, lasting
from tests.triton_models import ELEMENTS, LABELS, write_all, write_simple
from tests.triton_python import SOURCES

pytestmark = pytest.mark.e2e

WITHIN_S = 40.0
ROW = np.arange(ELEMENTS, dtype=np.int32)
ONES = np.ones(ELEMENTS, np.int32)
REPEAT = """
name: "repeat_int32" backend: "python" max_batch_size: 0
model_transaction_policy { decoupled: true }
input [ { name: "IN" data_type: TYPE_INT32 dims: [ -1 ] },
        { name: "DELAY" data_type: TYPE_UINT32 dims: [ -1 ] } ]
output [ { name: "OUT" data_type: TYPE_INT32 dims: [ 1 ] },
         { name: "IDX" data_type: TYPE_UINT32 dims: [ 1 ] } ]
"""
Client = triton.InferenceServerClient


def write_repeat(repo: Path) -> None:
    folder = repo / "repeat_int32" / "1"
    folder.mkdir(parents=True)
    shutil.copy(SOURCES / "repeat.py", folder / "model.py")
    (folder.parent / "config.pbtxt").write_text(REPEAT)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lasting]:
    folder = tmp_path_factory.mktemp("triton")
    write_all(folder / "models")
    write_simple(folder / "models", "labelled", labels=LABELS[:12])
    write_repeat(folder / "models")
    with lasting(folder / "models", "--allow-client-shm", grpc=True) as running:
        yield running


@pytest.fixture
def client(server: Lasting) -> Iterator[Client]:
    with closing(Client(server.grpc)) as client:
        yield client


def inputs_of(*arrays: np.ndarray, names: str = "INPUT0 INPUT1") -> list[triton.InferInput]:
    found = []
    for name, array in zip(names.split(), arrays, strict=False):
        one = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        one.set_data_from_numpy(array)
        found.append(one)
    return found


def sums(row: int = 0) -> list[triton.InferInput]:
    return inputs_of(ROW.reshape(1, -1) + np.int32(row), ONES.reshape(1, -1))


def refused(call: Callable[[], Any]) -> InferenceServerException:
    with pytest.raises(InferenceServerException) as error:
        call()
    return error.value


# what the server says of itself -------------------------------------------------------------------


def test_health_and_metadata(client: Client) -> None:
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("simple")
    assert not client.is_model_ready("nobody") and not client.is_model_ready("simple", "7")
    about = client.get_server_metadata(as_json=True)
    assert about["name"] == "modeldepot" and "binary_tensor_data" in about["extensions"]
    model = client.get_model_metadata("simple")
    assert model.platform == "onnxruntime_onnx" and list(model.versions) == ["1"]
    assert [list(t.shape) for t in model.inputs] == [[-1, ELEMENTS]] * 2
    error = refused(partial(client.get_model_metadata, "nobody"))
    assert error.status() == "StatusCode.NOT_FOUND"
    assert "Request for unknown model: 'nobody' is not found" in error.message()


def test_config_and_statistics(client: Client) -> None:
    config = client.get_model_config("simple").config
    assert config.max_batch_size == 8 and [o.name for o in config.output] == ["OUTPUT0", "OUTPUT1"]
    before = client.get_inference_statistics("simple").model_stats[0].inference_count
    client.infer("simple", sums())
    (found,) = client.get_inference_statistics("simple").model_stats
    assert found.inference_count == before + 1 and found.inference_stats.success.count >= 1
    assert len(client.get_inference_statistics().model_stats) == 6


def test_trace_and_log_settings(client: Client) -> None:
    assert client.get_trace_settings(as_json=True)["settings"]["trace_level"]["value"] == ["OFF"]
    found = client.update_trace_settings("simple", {"trace_rate": "7"}, as_json=True)
    assert found["settings"]["trace_rate"]["value"] == ["7"]
    found = client.update_trace_settings("simple", {"trace_rate": None}, as_json=True)
    assert found["settings"]["trace_rate"]["value"] == ["1000"]
    assert client.get_log_settings(as_json=True)["settings"]["log_info"]["bool_param"] is True
    client.update_log_settings({"log_verbose_level": 0})


def test_a_model_is_unloaded_and_loaded(client: Client) -> None:
    client.unload_model("simple_int8")
    assert not client.is_model_ready("simple_int8")
    error = refused(partial(client.infer, "simple_int8", sums()))
    assert "Request for unknown model" in error.message()
    client.load_model("simple_int8")
    assert client.is_model_ready("simple_int8")
    found = {m.name: m for m in client.get_model_repository_index().models}
    assert found["simple_int8"].state == "READY" and found["simple_int8"].version == "1"
    assert "failed to load" in refused(partial(client.load_model, "wrong")).message()


# inference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("model", ["simple", "simple_int8"])
def test_sums_and_differences(client: Client, model: str, coding: str | None) -> None:
    kind = np.int8 if model.endswith("8") else np.int32
    a, b = np.tile(ROW.astype(kind), (3, 1)), np.tile(ONES.astype(kind) * 100, (3, 1))
    asked = [triton.InferRequestedOutput(name) for name in ("OUTPUT1", "OUTPUT0")]
    answer = client.infer(
        model, inputs_of(a, b), outputs=asked, request_id="i", compression_algorithm=coding
    )
    assert np.array_equal(answer.as_numpy("OUTPUT0"), a + b)
    assert np.array_equal(answer.as_numpy("OUTPUT1"), a - b)
    assert (answer.get_response().id, answer.get_response().model_name) == ("i", model)


def test_texts_come_back_as_they_are(client: Client) -> None:
    sent = np.array([["é".encode(), b"", b"x" * 70_000, b'"\\']], object)
    answer = client.infer("simple_identity", inputs_of(sent))
    assert answer.as_numpy("OUTPUT0").tolist() == sent.tolist()


def explicit(model: str, datatype: str, **contents: Any) -> service_pb2.ModelInferRequest:
    asked = service_pb2.ModelInferRequest(model_name=model)
    for name in ("INPUT0", "INPUT1"):
        one = asked.inputs.add(name=name, datatype=datatype, shape=[1, ELEMENTS])
        for field, values in contents.items():
            getattr(one.contents, field).extend(values)
    return asked


def test_values_may_come_one_by_one(server: Lasting) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        negative = [-n for n in range(ELEMENTS)]
        for model, datatype, dtype in (("simple", "INT32", "<i4"), ("simple_int8", "INT8", "i1")):
            answer = infer(explicit(model, datatype, int_contents=negative))
            found = np.frombuffer(answer.raw_output_contents[0], dtype)
            assert found.tolist() == [-2 * n for n in range(ELEMENTS)]
        texts = [str(n).encode() for n in range(ELEMENTS)]
        answer = infer(explicit("simple_string", "BYTES", bytes_contents=texts))
        doubled = np.array([str(2 * n).encode() for n in range(ELEMENTS)], object)
        assert answer.raw_output_contents[0] == serialize_byte_tensor(doubled).item()


def test_classes_in_place_of_an_output(client: Client) -> None:
    asked = [triton.InferRequestedOutput("OUTPUT0", class_count=2)]
    answer = client.infer("labelled", sums(), outputs=asked)
    assert answer.as_numpy("OUTPUT0").tolist() == [[b"16:15", b"15:14"]]


def test_shared_memory_both_ways(client: Client) -> None:
    size, name = ELEMENTS * 4, f"modeltest_{os.getpid()}"
    region = shared_memory.create_shared_memory_region("here", f"/{name}", 4 * size)
    try:
        shared_memory.set_shared_memory_region(region, [ROW, ONES])
        client.register_system_shared_memory("here", f"/{name}", 4 * size)
        (status,) = client.get_system_shared_memory_status().regions.values()
        assert (status.name, status.key, status.byte_size) == ("here", f"/{name}", 4 * size)
        error = refused(partial(client.register_system_shared_memory, "here", f"/{name}", size))
        assert error.status() == "StatusCode.ALREADY_EXISTS"
        inputs = [triton.InferInput(f"INPUT{n}", [1, ELEMENTS], "INT32") for n in range(2)]
        outputs = [triton.InferRequestedOutput(f"OUTPUT{n}") for n in range(2)]
        for n, one in enumerate(inputs):
            one.set_shared_memory("here", size, n * size)
        outputs[1].set_shared_memory("here", size, 3 * size)
        answer = client.infer("simple", inputs, outputs=outputs)
        assert np.array_equal(answer.as_numpy("OUTPUT0")[0], ROW + 1)
        found = shared_memory.get_contents_as_numpy(region, np.int32, [ELEMENTS], 3 * size)
        assert np.array_equal(found, ROW - 1)
        said = answer.get_output("OUTPUT1").parameters
        assert said["shared_memory_region"].string_param == "here"
        error = refused(partial(client.register_cuda_shared_memory, "c", b"", 0, 4))
        assert "failed to register CUDA shared memory region: 'c'" in error.message()
    finally:
        client.unregister_system_shared_memory()
        shared_memory.destroy_shared_memory_region(region)
    assert not client.get_system_shared_memory_status().regions


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"inputs": sums()[:1]}, "expected 2 inputs but got 1 inputs for model 'simple'"),
        ({"model_name": "nobody"}, "Request for unknown model: 'nobody' is not found"),
        ({"model_version": "7"}, "version 7"),
        ({"outputs": [triton.InferRequestedOutput("OUT")]}, "unexpected inference output 'OUT'"),
        ({"inputs": inputs_of(*[np.zeros((9, ELEMENTS), np.int32)] * 2)}, "must be <= 8"),
    ],
)
def test_an_error_says_what_it_says_over_http(
    server: Lasting, client: Client, change: dict[str, Any], text: str
) -> None:
    error = refused(lambda: client.infer(**{"model_name": "simple", "inputs": sums()} | change))
    assert text in error.message()


def test_many_at_once_and_all_are_answered(client: Client) -> None:
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for n in range(100):
        client.async_infer(
            "simple", sums(n), callback=lambda result, error: done.put((result, error)),
            request_id=str(n),
        )  # fmt: skip
    found = [done.get(timeout=WITHIN_S) for _ in range(100)]
    assert [error for _, error in found if error] == []
    for result, _ in found:
        n = int(result.get_response().id)
        assert np.array_equal(result.as_numpy("OUTPUT0")[0], ROW + n + 1)


# streams ------------------------------------------------------------------------------------------


@contextmanager
def streaming(client: Client, **more: Any) -> Iterator[Callable[[], Any]]:
    """Gives the next result; an error is raised."""
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client.start_stream(callback=lambda result, error: done.put((result, error)), **more)

    def following() -> Any:
        result, error = done.get(timeout=WITHIN_S)
        if error is not None:
            raise error
        return result

    try:
        yield following
    finally:
        client.stop_stream()


def test_a_stream_answers_in_order_and_outlives_an_error(client: Client) -> None:
    with streaming(client) as following:
        for n in range(20):
            client.async_stream_infer("simple", sums(n), request_id=str(n))
        assert [following().get_response().id for _ in range(20)] == [str(n) for n in range(20)]
        client.async_stream_infer("nobody", sums())
        assert "'nobody' is not found" in refused(following).message()
        client.async_stream_infer("simple", sums())
        assert np.array_equal(following().as_numpy("OUTPUT0")[0], ROW + 1)


def repeat(*values: int, delay_ms: int = 0) -> list[triton.InferInput]:
    delays = np.full(len(values), delay_ms, np.uint32)
    return inputs_of(np.array(values, np.int32), delays, names="IN DELAY")


def test_a_decoupled_model_answers_as_often_as_it_likes(client: Client) -> None:
    with streaming(client) as following:
        client.async_stream_infer("repeat_int32", repeat(4, 2, 7))
        found = [following() for _ in range(3)]
        assert [int(r.as_numpy("OUT")[0]) for r in found] == [4, 2, 7]
        assert [int(r.as_numpy("IDX")[0]) for r in found] == [0, 1, 2]
        client.async_stream_infer("repeat_int32", repeat(), enable_empty_final_response=True)
        last = following().get_response()
        assert last.parameters["triton_final_response"].bool_param is True and not last.outputs
    error = refused(partial(client.infer, "repeat_int32", repeat(1)))
    assert error.status() == "StatusCode.UNIMPLEMENTED"


def test_a_client_that_leaves_a_stream_takes_its_requests_with_it(server: Lasting) -> None:
    with closing(Client(server.grpc)) as leaving:
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        leaving.start_stream(callback=lambda result, error: done.put(result))
        leaving.async_stream_infer("repeat_int32", repeat(*range(200), delay_ms=100))
        assert done.get(timeout=WITHIN_S) is not None
        leaving.stop_stream(cancel_requests=True)
    wanted = 'outcome="canceled",protocol="grpc"', 'protocol="grpc",outcome="canceled"'
    waited = threading.Event()
    for _ in range(400):
        page = httpx.get(f"{server.url}/metrics").text
        lines = [w for line in page.splitlines() for w in wanted if w in line and "repeat" in line]
        if lines:
            return
        waited.wait(0.1)  # the page is renewed once a second
    raise AssertionError("nobody heard that it had left")


async def test_the_aio_client_and_its_streams(server: Lasting) -> None:
    async with triton_aio.InferenceServerClient(server.grpc) as client:
        assert await client.is_server_live() and await client.is_model_ready("simple")
        answers = await asyncio.gather(*[client.infer("simple", sums(n)) for n in range(30)])
        for n, answer in enumerate(answers):
            assert np.array_equal(answer.as_numpy("OUTPUT0")[0], ROW + n + 1)

        async def asked() -> Any:
            for n in range(5):
                yield {"model_name": "simple", "inputs": sums(n), "request_id": str(n)}

        found = client.stream_infer(asked())
        ids = [result.get_response().id async for result, error in found if error is None]
        assert ids == [str(n) for n in range(5)]


def test_a_body_that_http_would_call_too_large_comes_through(client: Client) -> None:
    sent = np.array([[b"0123456789abcdef" * (65 << 16)]], object)
    answer = client.infer("simple_identity", inputs_of(sent))
    assert answer.as_numpy("OUTPUT0")[0, 0] == sent[0, 0]


def test_a_keepalive_client_is_served(server: Lasting) -> None:
    options = triton.KeepAliveOptions(
        keepalive_time_ms=10_000, keepalive_timeout_ms=5_000, keepalive_permit_without_calls=True
    )
    with closing(Client(server.grpc, keepalive_options=options)) as client:
        assert client.is_server_ready()
