"""V2 infer, as a client sees it."""

import asyncio
import logging

import numpy as np
import pytest

from repository.errors import (
    DrainingError,
    InferenceFailedError,
    InvalidTensorError,
    ModelNotReadyError,
    QueueFullError,
    RequestTimeoutError,
    WorkerDiedError,
)
from repository.messages import InferResponse
from repository.tensors import Tensor
from server.errors import UnauthorizedError
from tests.fakes.bodies import body, tensor
from tests.integration.v2 import Stage

X = tensor("x", [1, 2], "FP32", [1, 2])
RAW = np.array([[1, 2]], np.float32).tobytes()


async def infer(client, model="m", *, headers=None, content=None):
    content = content if content is not None else body(X)[0]
    return await client.post(f"/v2/models/{model}/infer", content=content, headers=headers)


# infer --------------------------------------------------------------------------------------------


async def test_json_in_json_out():
    stage = Stage()
    async with stage.client as client:
        reply = await infer(client, content=body(X, id="7")[0])
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert "inference-header-content-length" not in reply.headers
    assert reply.content == (
        b'{"id":"7","model_name":"m","model_version":"2","outputs":'
        b'[{"name":"y","datatype":"FP32","shape":[1,2],"data":[2.0,4.0]}]}'
    )
    assert stage.leases == 0


async def test_binary_in_binary_out_of_the_version_asked_for():
    content, length = body(
        tensor("x", [1, 2], "FP32", binary_data_size=8),
        parameters={"binary_data_output": True},
        blobs=RAW,
    )
    headers = {"Inference-Header-Content-Length": length.decode()}
    async with Stage().client as client:
        reply = await infer(client, "m/versions/1", content=content, headers=headers)
    assert reply.headers["content-type"] == "application/octet-stream"
    cut = int(reply.headers["inference-header-content-length"])
    assert b'"model_version":"1"' in reply.content[:cut]
    assert np.frombuffer(reply.content[cut:], np.float32).tolist() == [2.0, 4.0]


async def test_a_raw_binary_request_is_a_batch_of_one():
    headers = {"Inference-Header-Content-Length": "0"}
    async with Stage().client as client:
        reply = await infer(client, content=RAW, headers=headers)
        wrong = await infer(client, content=RAW[:3], headers=headers)
    assert np.frombuffer(reply.content[-8:], np.float32).tolist() == [2.0, 4.0]
    assert wrong.status_code == 400


async def test_a_large_answer_arrives_whole():
    stage = Stage()
    large = np.arange(1 << 20, dtype=np.float32)
    stage.models.answers = lambda _: InferResponse([Tensor.of("y", large)])
    content = body(X, parameters={"binary_data_output": True})[0]
    async with stage.client as client:
        reply = await infer(client, content=content)
    assert reply.content.endswith(large.tobytes())


async def test_a_success_is_counted_with_its_times_and_its_rows():
    stage = Stage()
    content = body(tensor("x", [3, 2], "FP32", [0] * 6))[0]
    async with stage.client as client:
        await infer(client, content=content)
    (done,) = stage.meter.done_
    whole_s = done.pop("duration_s")
    assert 0 < done.pop("input_s") < whole_s and 0 < done.pop("output_s") < whole_s
    assert done == {
        "model": "m",
        "version": 2,
        "outcome": "success",
        "queue_s": 0.25,
        "compute_s": 0.5,
        "samples": 3,
        "batch_size": 4,
        "trace": None,
    }
    assert stage.meter.begun == [("m", 2)]


async def test_a_model_that_is_not_there_is_refused_in_tritons_words():
    stage = Stage()
    stage.models.add("idle")
    stage.models.add("new")
    stage.models.begin("new")
    async with stage.client as client:
        replies = [
            await infer(client, name)
            for name in ("no", "m/versions/9", "idle", "idle/versions/1", "new")
        ]
    assert [(r.status_code, r.json()["error"]) for r in replies] == [
        (404, "Request for unknown model: 'no' is not found"),
        (404, "Request for unknown model: 'm' version 9 is not found"),
        (404, "Request for unknown model: 'idle' has no available versions"),
        (503, "Request for unknown model: 'idle' version 1 is not at ready state"),
        (503, "model 'new' is still loading"),
    ]
    assert replies[4].headers["retry-after"] == "1"
    assert {d["model"] for d in stage.meter.done_} == {"_unknown"}


async def test_a_model_whose_worker_died_is_on_its_way_back():
    stage = Stage()
    for gen in stage.models.generations["m"]:
        stage.models.break_down(gen, WorkerDiedError("killed"))
    async with stage.client as client:
        reply = await infer(client)
        stage.models.wanted.clear()
        unwanted = await infer(client)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert unwanted.status_code == 404


@pytest.mark.parametrize("name", ["a%2f..%2fb", "%2e%2e%2fetc", "a b", "a//b", "%00", "x" * 300])
async def test_a_name_that_cannot_be_one_is_a_bad_request(name):
    async with Stage().client as client:
        reply = await infer(client, name)
    assert reply.status_code == 400
    assert reply.headers["x-modeldepot-code"] == "invalid_name"


async def test_what_fails_is_told_by_the_one_map():
    stage = Stage()
    found = {}
    async with stage.client as client:
        for error in (
            InvalidTensorError("odd shape"),
            QueueFullError("Exceeds maximum queue size", retry_after_s=2.1),
            WorkerDiedError("the worker died"),
            InferenceFailedError("bad model"),
            ModelNotReadyError("leaving"),
        ):
            stage.models.answers = lambda _, error=error: error
            reply = await infer(client)
            assert reply.content == b'{"error":"%s"}' % str(error).encode()
            found[reply.headers["x-modeldepot-code"]] = (
                reply.status_code,
                reply.headers.get("retry-after"),
            )
    assert found == {
        "invalid_tensor": (400, None),
        "queue_full": (503, "3"),
        "worker_died": (500, "1"),
        "inference_failed": (500, None),
        "model_not_ready": (503, None),
    }
    assert stage.meter.outcomes == [
        "bad_request",
        "rejected",
        "backend_error",
        "backend_error",
        "rejected",
    ]
    assert stage.leases == 0


async def test_what_is_turned_away_for_want_of_room_or_time_is_told_by_its_reason():
    reasons = []
    stage = Stage(shed=reasons.append, max_body=1000)
    async with stage.client as client:
        for error in (QueueFullError("full"), DrainingError("going"), RequestTimeoutError("late")):
            stage.models.answers = lambda _, error=error: error
            assert (await infer(client)).status_code == 503
        await infer(client, content=b" " * 1001)
        stage.models.answers = lambda _: InferenceFailedError("bad model")
        await infer(client)
    assert reasons == ["queue_full", "draining", "deadline", "body_size"]


async def test_a_refusal_at_once_ends_the_lease_too():
    stage = Stage()

    def refuse(_):
        raise InvalidTensorError("does not fit")

    stage.models.answers = refuse
    async with stage.client as client:
        assert (await infer(client)).status_code == 400
    assert stage.leases == 0


async def test_a_foreign_exception_is_logged_and_leaks_nothing(caplog):
    stage = Stage()
    stage.models.answers = lambda _: ZeroDivisionError("secret /srv/models/m")
    async with stage.client as client:
        reply = await infer(client)
    assert (reply.status_code, reply.headers["x-modeldepot-code"]) == (500, "internal")
    assert b"secret" not in reply.content
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.exc_info and "secret" in str(record.exc_info[1])
    assert stage.leases == 0


async def test_bad_bodies_are_clear_and_take_no_lease():
    stage = Stage()
    over = {"Inference-Header-Content-Length": "999"}
    deep = b'{"inputs":' + b"[" * 10_000 + b"]" * 10_000 + b"}"
    async with stage.client as client:
        replies = [
            await infer(client, content=b"{"),
            await infer(client, content=b""),
            await infer(client, content=deep),
            await infer(client, headers=over),
            await infer(client, content=body(tensor("x", [1], "FP32", [1, 2]))[0]),
        ]
    assert [r.status_code for r in replies] == [400] * 4 + [500]  # as Triton counts elements
    assert all(r.json().keys() == {"error"} for r in replies)
    assert stage.meter.outcomes == ["bad_request"] * 5 and stage.meter.begun == []


async def test_a_body_compressed_in_a_way_that_nobody_knows_is_refused_with_what_would_do():
    async with Stage().client as client:
        reply = await infer(client, headers={"Content-Encoding": "br"})
        plain = await infer(client, headers={"Content-Encoding": "identity"})
    assert (reply.status_code, reply.headers["accept-encoding"]) == (501, "gzip, deflate")
    assert plain.status_code == 200


async def test_another_verb_is_not_allowed():
    async with Stage().client as client:
        reply = await client.put("/v2/models/m/infer", content=b"{}")
    assert (reply.status_code, reply.json()["error"]) == (405, "Method Not Allowed")


async def test_an_address_without_a_model_is_not_found():
    async with Stage().client as client:
        reply = await client.post("/v2/models/infer", content=b"{}")
    assert (reply.status_code, reply.content) == (404, b'{"error":"Not Found"}')


async def test_a_request_without_a_key_is_neither_read_nor_counted():
    def nobody(scope):
        raise UnauthorizedError("API key missing")

    stage = Stage(authorize=nobody)
    async with stage.client as client:
        reply = await infer(client, content=b"{")
    assert (reply.status_code, reply.json()) == (401, {"error": "API key missing"})
    assert reply.headers["www-authenticate"] == "Bearer"
    assert stage.meter.done_ == []


async def test_a_body_beyond_the_limit_is_refused_whether_it_says_so_or_not():
    async def chunks():
        for _ in range(4):
            yield b" " * 400

    stage = Stage(max_body=1000)
    async with stage.client as client:
        said = await infer(client, content=b" " * 1001)
        unsaid = await client.post("/v2/models/m/infer", content=chunks())
        enough = await infer(client)
    for reply in (said, unsaid):
        assert reply.status_code == 400
        assert "exceeds the maximum allowed" in reply.json()["error"]
        assert reply.headers["connection"] == "close"
    assert enough.status_code == 200 and "connection" not in enough.headers


async def test_a_body_in_too_many_pieces_is_refused():
    async def pieces(number):
        whole = body(X)[0]
        for at in range(number - 1):
            yield whole[at : at + 1]
        yield b""
        yield whole[number - 1 :]

    async with Stage(max_chunks=5).client as client:
        good = await client.post("/v2/models/m/infer", content=pieces(5))
        bad = await client.post("/v2/models/m/infer", content=pieces(6))
    assert (good.status_code, bad.status_code) == (200, 400)
    assert "pieces" in bad.json()["error"]


async def test_a_request_whose_time_is_over_is_told_and_counted_so():
    stage = Stage()
    stage.models.answers = lambda _: RequestTimeoutError("Request timeout expired", retry_after_s=2)
    async with stage.client as client:
        reply = await infer(client, content=body(X, parameters={"timeout": 1000})[0])
    assert (reply.status_code, reply.json()["error"]) == (503, "Request timeout expired")
    assert reply.headers["retry-after"] == "2"
    assert stage.leases == 0 and stage.meter.outcomes == ["timeout"]


async def test_a_host_that_gives_a_request_up_is_an_error_not_a_silence():
    stage = Stage()
    pending = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(pending.cancel)
    stage.models.answers = lambda _: pending
    async with stage.client as client:
        reply = await infer(client)
    assert (reply.status_code, reply.headers["x-modeldepot-code"]) == (500, "worker_died")


async def test_a_cancelled_request_cancels_its_work_and_ends_its_lease():
    stage = Stage()
    asked = asyncio.Event()
    pending = asyncio.get_running_loop().create_future()

    def answer(_):
        asked.set()
        return pending

    stage.models.answers = answer
    async with stage.client as client:
        task = asyncio.create_task(infer(client))
        await asked.wait()
        assert stage.leases == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert pending.cancelled() and stage.leases == 0
    assert stage.meter.outcomes == ["canceled"]


async def test_a_reply_that_cannot_be_told_in_the_form_asked_for_is_the_clients_to_change():
    stage = Stage()
    half = Tensor.of("y", np.array([1], np.float16))
    stage.models.answers = lambda _: InferResponse([half])
    async with stage.client as client:
        reply = await infer(client)
    assert reply.status_code == 400
    assert reply.json()["error"].startswith("sending FP16 data via JSON is not supported")
