"""Triton's own clients at a real server: infer with numbers, texts, compression, shared memory, classes
and raw bodies, over http and http.aio."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import (
    InferenceServerException,
    np_to_triton_dtype,
    serialize_byte_tensor,
    serialized_byte_size,
    shared_memory,
)

from tests.e2e.lasting import Lasting, lasting
from tests.triton_models import ELEMENTS, LABELS, write_all, write_simple

pytestmark = pytest.mark.e2e

ROW = np.arange(ELEMENTS, dtype=np.int32)
ONES = np.ones(ELEMENTS, np.int32)
CODINGS = (None, "gzip", "deflate")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lasting]:
    folder = tmp_path_factory.mktemp("triton")
    write_all(folder / "models")
    write_simple(folder / "models", "labelled", labels=LABELS[:12])
    with lasting(folder / "models", "--allow-client-shm", "--no-allow-grpc") as running:
        yield running


@pytest.fixture
def client(server: Lasting) -> Iterator[triton.InferenceServerClient]:
    with closing(triton.InferenceServerClient(server.url.removeprefix("http://"))) as client:
        yield client
        client.unregister_system_shared_memory()


def inputs_of(*arrays: np.ndarray, binary: bool = True) -> list[triton.InferInput]:
    found = []
    for n, array in enumerate(arrays):
        one = triton.InferInput(f"INPUT{n}", list(array.shape), np_to_triton_dtype(array.dtype))
        one.set_data_from_numpy(array, binary_data=binary)
        found.append(one)
    return found


def outputs_of(*names: str, **said: Any) -> list[triton.InferRequestedOutput]:
    return [triton.InferRequestedOutput(name, **said) for name in names]


def texts(*values: object, shape: tuple[int, ...] = (1, -1)) -> np.ndarray:
    return np.array([str(v).encode() for v in values], object).reshape(shape)


# the four models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("model", ["simple", "simple_int8"])
def test_sums_and_differences(client: Any, model: str, binary: bool) -> None:
    kind = np.int8 if model.endswith("8") else np.int32
    a, b = np.tile(ROW.astype(kind), (3, 1)), np.tile(ONES.astype(kind) * 100, (3, 1))
    asked = outputs_of("OUTPUT0", "OUTPUT1", binary_data=binary)
    answer = client.infer(model, inputs_of(a, b, binary=binary), outputs=asked, request_id="i")
    assert np.array_equal(answer.as_numpy("OUTPUT0"), a + b)
    assert np.array_equal(answer.as_numpy("OUTPUT1"), a - b)
    assert (answer.get_response()["id"], answer.get_response()["model_name"]) == ("i", model)


@pytest.mark.parametrize("binary", [True, False])
def test_sums_of_texts(client: Any, binary: bool) -> None:
    a, b = texts(*ROW), texts(*ONES)
    asked = outputs_of("OUTPUT0", "OUTPUT1", binary_data=binary)
    answer = client.infer("simple_string", inputs_of(a, b, binary=binary), outputs=asked)
    assert [int(t) for t in answer.as_numpy("OUTPUT0")[0]] == [n + 1 for n in range(ELEMENTS)]
    assert [int(t) for t in answer.as_numpy("OUTPUT1")[0]] == [n - 1 for n in range(ELEMENTS)]


def test_texts_come_back_as_they_are(client: Any) -> None:
    sent = np.array([["é".encode(), b"", b"x" * 70_000, b'"\\']], object)
    answer = client.infer("simple_identity", inputs_of(sent))
    assert answer.as_numpy("OUTPUT0").tolist() == sent.tolist()


@pytest.mark.parametrize("response", CODINGS)
@pytest.mark.parametrize("request_", CODINGS)
def test_compression_both_ways(client: Any, request_: str | None, response: str | None) -> None:
    sent = np.array([[b"long text " * 500, b"a"]], object)
    answer = client.infer(
        "simple_identity",
        inputs_of(sent),
        request_compression_algorithm=request_,
        response_compression_algorithm=response,
    )
    assert answer.as_numpy("OUTPUT0").tolist() == sent.tolist()


async def test_the_asynchronous_client_finds_the_same(server: Lasting) -> None:
    address = server.url.removeprefix("http://")
    a, b = ROW.reshape(1, -1), ONES.reshape(1, -1)
    async with triton_aio.InferenceServerClient(address) as client:
        for coding in CODINGS:
            answer = await client.infer(
                "simple",
                inputs_of(a, b),
                request_compression_algorithm=coding,
                response_compression_algorithm=coding,
            )
            assert np.array_equal(answer.as_numpy("OUTPUT0"), a + b)
        sent = np.array([[b"z" * 100_000]], object)
        answer = await client.infer(
            "simple_identity",
            inputs_of(sent, binary=False),
            outputs=outputs_of("OUTPUT0", binary_data=False),
        )
        assert _text(answer.as_numpy("OUTPUT0")[0, 0]) == "z" * 100_000
        with pytest.raises(InferenceServerException, match="expected 2 inputs but got 1 inputs"):
            await client.infer("simple", inputs_of(a))
        with memory("aio", 64):
            await client.register_system_shared_memory("aio", key("aio"), 64)
            (one,) = await client.get_system_shared_memory_status("aio")
            assert one["byte_size"] == 64
            await client.unregister_system_shared_memory("aio")


def test_a_large_compressed_request_and_answer(client: Any) -> None:
    sent = np.array([[os.urandom(1 << 19).hex().encode() + bytes(1 << 20)]], object)
    for coding in ("gzip", "deflate"):
        answer = client.infer(
            "simple_identity",
            inputs_of(sent),
            request_compression_algorithm=coding,
            response_compression_algorithm=coding,
        )
        assert answer.as_numpy("OUTPUT0").tolist() == sent.tolist()


# raw ----------------------------------------------------------------------------------------------


def test_a_raw_body_is_one_text(server: Lasting) -> None:
    with httpx.Client(base_url=server.url) as client:
        answer = client.post(
            "/v2/models/simple_identity/infer",
            content=b"all of it",
            headers={"Inference-Header-Content-Length": "0"},
        )
    length = int(answer.headers["Inference-Header-Content-Length"])
    assert answer.content[length:] == b"\x09\0\0\0all of it"


# classes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [True, False])
def test_classes_with_the_labels_of_the_models_file(client: Any, binary: bool) -> None:
    a, b = np.tile(ROW, (2, 1)), np.tile(ONES, (2, 1))
    asked = outputs_of("OUTPUT0", class_count=5, binary_data=binary)
    for model, labels in (("labelled", LABELS[:12]), ("simple", ())):
        answer = client.infer(model, inputs_of(a, b), outputs=asked).as_numpy("OUTPUT0")
        row = [
            f"{n + 1}:{n}" + (f":{labels[n]}" if n < len(labels) else "") for n in range(15, 10, -1)
        ]
        assert answer.shape == (2, 5)
        assert [_text(t) for t in answer[0]] == row


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


# shared memory ------------------------------------------------------------------------------------

RUN = uuid.uuid4().hex[:12]


def key(name: str) -> str:
    return f"/mdtest-{RUN}-{name}"


@contextmanager
def memory(name: str, size: int) -> Iterator[Any]:
    """Shared memory of this process."""
    handle = shared_memory.create_shared_memory_region(name, key(name), size)
    try:
        yield handle
    finally:
        shared_memory.destroy_shared_memory_region(handle)


def taken(
    name: str, region: str, array_shape: list[int], datatype: str, size: int, offset: int = 0
) -> Any:
    found = triton.InferInput(name, array_shape, datatype)
    found.set_shared_memory(region, size, offset=offset)
    return found


def given(name: str, region: str, size: int, offset: int = 0) -> Any:
    found = triton.InferRequestedOutput(name, binary_data=True)
    found.set_shared_memory(region, size, offset=offset)
    return found


def test_numbers_through_shared_memory_as_tritons_example_does_it(client: Any) -> None:
    with memory("in", 128) as inside, memory("out", 128) as outside:
        shared_memory.set_shared_memory_region(inside, [ROW, ONES])
        client.register_system_shared_memory("in", key("in"), 128)
        client.register_system_shared_memory("out", key("out"), 128)
        assert [r["name"] for r in client.get_system_shared_memory_status()] == ["in", "out"]
        answer = client.infer(
            "simple",
            [
                taken("INPUT0", "in", [1, 16], "INT32", 64),
                taken("INPUT1", "in", [1, 16], "INT32", 64, offset=64),
            ],
            outputs=[given("OUTPUT0", "out", 64), given("OUTPUT1", "out", 64, offset=64)],
        )
        output = answer.get_output("OUTPUT1")
        assert output["parameters"] == {
            "shared_memory_region": "out",
            "shared_memory_offset": 64,
            "shared_memory_byte_size": 64,
        }
        assert (output["shape"], "data" in output) == ([1, 16], False)
        both = shared_memory.get_contents_as_numpy(outside, np.int32, [2, 16]).copy()
        assert np.array_equal(both, [ROW + ONES, ROW - ONES])
        client.unregister_system_shared_memory("in")
        with pytest.raises(
            InferenceServerException, match="Unable to find shared memory region: 'in'"
        ):
            client.infer("simple", [
                taken("INPUT0", "in", [1, 16], "INT32", 64),
                taken("INPUT1", "in", [1, 16], "INT32", 64, offset=64),
            ])  # fmt: skip


def test_texts_through_shared_memory_beside_plain_ones(client: Any) -> None:
    sent = texts("one", "", "three" * 400_000)  # more than a copy on the loop may have
    packed = serialize_byte_tensor(sent)
    size = serialized_byte_size(packed)
    with memory("text", size) as inside, memory("back", size) as outside:
        shared_memory.set_shared_memory_region(inside, [packed])
        client.register_system_shared_memory("text", key("text"), size)
        client.register_system_shared_memory("back", key("back"), size)
        asked = [taken("INPUT0", "text", [1, 3], "BYTES", size)]
        plain = client.infer("simple_identity", asked)
        assert plain.as_numpy("OUTPUT0").tolist() == sent.tolist()
        client.infer("simple_identity", asked, outputs=[given("OUTPUT0", "back", size)])
        found = shared_memory.get_contents_as_numpy(outside, np.object_, [1, 3])
        assert found.tolist() == sent.tolist()
        client.infer(
            "simple_identity", inputs_of(texts("abc")), outputs=[given("OUTPUT0", "back", 7)]
        )
        assert shared_memory.get_contents_as_numpy(outside, np.object_, [1, 1]).tolist() == [
            [b"abc"]
        ]


def test_what_does_not_fit_is_an_error_that_says_by_how_much(client: Any) -> None:
    with memory("small", 96) as inside:
        client.register_system_shared_memory("small", key("small"), 96)
        plain = inputs_of(ROW.reshape(1, -1), ONES.reshape(1, -1))
        shared_memory.set_shared_memory_region(inside, [ROW])
        for asked, outputs, text in (
            (
                plain,
                [given("OUTPUT0", "small", 60)],
                r"'OUTPUT0' \(60 bytes\) should be at least 64",
            ),
            (
                plain,
                [given("OUTPUT0", "small", 64, offset=40)],
                "Invalid offset . byte size .* 'small'",
            ),
            (
                plain,
                [given("OUTPUT0", "other", 64)],
                "Unable to find shared memory region: 'other'",
            ),
            (
                [taken("INPUT0", "small", [1, 16], "INT32", 68), plain[1]],
                None,
                "byte size mismatch for input 'INPUT0' for model 'simple'. Expected 64, got 68",
            ),
        ):
            with pytest.raises(InferenceServerException, match=text):
                client.infer("simple", asked, outputs=outputs)
        os.truncate(f"/dev/shm{key('small')}", 32)
        with pytest.raises(InferenceServerException, match="'small' has become too short"):
            client.infer("simple", [taken("INPUT0", "small", [1, 16], "INT32", 64), plain[1]])
        answer = client.infer("simple", plain)
        assert np.array_equal(answer.as_numpy("OUTPUT0")[0], ROW + ONES), "and the server lives on"
        os.truncate(f"/dev/shm{key('small')}", 96)


def test_what_triton_says_of_registering(client: Any, server: Lasting) -> None:
    with memory("twice", 64):
        client.register_system_shared_memory("twice", key("twice"), 64)
        for ask, text in (
            (("twice", key("twice"), 64), "shared memory region 'twice' already in manager"),
            (
                ("far", key("twice"), 65),
                "failed to register shared memory region 'far': invalid args",
            ),
            (("none", key("none"), 64), "Unable to open shared memory region: '/mdtest-"),
            (("ours", "triton_python_backend_shm_region_1", 64), "reserved"),
            (("up", "../etc/passwd", 64), "is no name of a POSIX shared memory object"),
        ):
            with pytest.raises(InferenceServerException, match=text) as caught:
                client.register_system_shared_memory(*ask)
            assert caught.value.status() == "400"
    with pytest.raises(InferenceServerException, match="'far'") as caught:
        client.get_system_shared_memory_status("far")
    assert caught.value.status() == "404"
    with pytest.raises(
        InferenceServerException,
        match=r"failed to register CUDA shared memory region: 'g', GPUs not supported",
    ):
        client.register_cuda_shared_memory("g", "AAAA", 0, 64)
    assert client.get_cuda_shared_memory_status() == []
    client.unregister_cuda_shared_memory()
    with httpx.Client(base_url=f"{server.url}/v2/systemsharedmemory") as raw:
        bad = raw.post("/region/r/register", json={"key": "k"})
        assert (bad.status_code, "byte_size" in bad.json()["error"]) == (400, True)
        assert raw.get("/region/r/register").status_code == 405
        assert raw.get("/status/").json() == raw.get("/status").json()


def test_regions_keep_no_memory_and_no_file_of_a_client_open_for_ever(
    client: Any, server: Lasting
) -> None:
    pid = server.process.pid
    for n in range(20):
        with memory("again", 64):
            client.register_system_shared_memory(f"again{n}", key("again"), 64)
            client.unregister_system_shared_memory(f"again{n}")
    links = [os.readlink(p) for p in Path(f"/proc/{pid}/fd").iterdir() if p.is_symlink()]
    assert not [link for link in links if "mdtest" in link]
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "mdtest" not in maps, "a client's memory is never mapped"
