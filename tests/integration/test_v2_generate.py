"""/generate and /generate_stream, as a client sees them."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest

from repository.errors import InferenceFailedError, QueueFullError
from repository.messages import InferRequest, InferResponse
from repository.signature import Signature
from repository.tensors import Tensor
from server.faces.v2_generate import generate, verb_of
from tests.integration.v2 import ROWS, Stage
from tests.openai_clients import writing

AT = "/v2/models/m/generate"


def counted(*counts: int) -> list[Any]:
    return [InferResponse([Tensor.of("y", np.array([[n]], np.float32))]) for n in counts]


class Plain(Stage):
    """Every call goes to the face."""

    def __init__(self, *answers: Any) -> None:
        super().__init__()
        for gen in self.models.generations["m"]:
            gen.signature = Signature("m", ROWS)
        self.models.answers = lambda request: self._ask(request, list(answers))
        self.asked: list[InferRequest] = []
        self.app.infer = partial(generate, door=self.door, keepalive_s=5.0)

    def _ask(self, request: InferRequest, answers: list[Any]) -> list[Any]:
        self.asked.append(request)
        return answers

    async def post(self, path: str, **how: Any) -> httpx.Response:
        app = self.app.infer
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            return await client.post(path, **how)


def events(got: httpx.Response) -> list[Any]:
    assert got.headers["content-type"] == "text/event-stream; charset=utf-8"
    parts = got.text.split("\n\n")
    assert parts.pop() == ""
    return [json.loads(part.removeprefix("data: ")) for part in parts if not part.startswith(":")]


async def test_one_answer_is_one_json_object() -> None:
    stage = Plain(*counted(3))
    form = {"content-type": "application/x-www-form-urlencoded"}  # as curl -d says
    got = await stage.post(AT, content=b'{"x": [1, 2], "id": "7"}', headers=form)
    assert got.status_code == 200 and got.headers["content-type"] == "application/json"
    assert got.content == b'{"model_name":"m","model_version":"2","id":"7","y":3.0}'
    (request,) = stage.asked
    assert request.inputs[0].shape == (1, 2)
    assert stage.leases == 0 and stage.meter.outcomes == ["success"]


@pytest.mark.parametrize("answers", [(), counted(1, 2)])
async def test_any_other_number_of_answers_is_for_the_stream(answers: Any) -> None:
    stage = Plain(*answers)
    got = await stage.post(AT, json={"x": [1, 2]})
    assert got.status_code == 500
    assert got.json()["error"].startswith("generate expects model to produce exactly 1 response")
    assert stage.leases == 0 and stage.meter.outcomes == ["backend_error"]


async def test_a_stream_tells_each_answer_as_an_event() -> None:
    stage = Plain(*counted(1, 2, 3))
    got = await stage.post("/v2/models/m/versions/1/generate_stream", json={"x": [1, 2]})
    assert [(e["model_version"], e["y"]) for e in events(got)] == [("1", 1), ("1", 2), ("1", 3)]
    assert stage.leases == 0 and stage.meter.outcomes == ["success"]


async def test_an_error_before_the_first_answer_has_its_own_status() -> None:
    got = await Plain(QueueFullError("full")).post(f"{AT}_stream", json={"x": [1, 2]})
    assert got.status_code == 503 and got.json() == {"error": "full"}
    got = await Plain().post("/v2/models/none/generate_stream", json={"x": 1})
    assert got.status_code == 404


async def test_an_error_behind_answers_is_the_last_event() -> None:
    stage = Plain(*counted(1), InferenceFailedError("it broke"))
    got = await stage.post(f"{AT}_stream", json={"x": [1, 2]})
    first, last = events(got)
    assert got.status_code == 200 and first["y"] == 1 and last == {"error": "it broke"}
    assert stage.leases == 0 and stage.meter.outcomes == ["backend_error"]


async def test_a_stream_without_any_answer_is_an_empty_one() -> None:
    got = await Plain().post(f"{AT}_stream", json={"x": [1, 2]})
    assert got.status_code == 200 and events(got) == []


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ({"content": b"{"}, 400),
        ({"content": b""}, 400),
        ({"content": b"[]"}, 400),
        ({"json": {"x": [1, 2, 3]}}, 400),
        ({"content": b"{}", "headers": {"content-encoding": "gzip"}}, 400),
    ],
)
async def test_a_bad_request_is_refused_and_asks_no_model(how: Any, status: int) -> None:
    stage = Plain(*counted(1))
    got = await stage.post(AT, **how)
    assert got.status_code == status and got.json()["error"]
    assert stage.leases == 0


async def test_a_client_that_leaves_closes_the_answers() -> None:
    stage = Plain(*counted(1))
    stage.models.hold_open = True
    sent: list[Any] = []
    said = iter([{"type": "http.request", "body": b'{"x":[1,2]}', "more_body": False}])

    async def receive() -> Any:
        return next(said, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        sent.append(message)

    scope: Any = {
        "type": "http", "method": "POST", "path": f"{AT}_stream", "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    await stage.app.infer(scope, receive, send)
    (responses,) = stage.models.opened
    assert responses.over and stage.leases == 0
    assert stage.meter.outcomes == ["canceled"]


async def test_a_model_that_writes_texts_is_asked_by_text_input() -> None:
    async with (
        writing() as (depot, models, _),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{depot.port}") as client,
    ):
        asked = {"text_input": "Once", "parameters": {"max_tokens": 4, "temperature": 0}}
        got = await client.post("/v2/models/plain/generate", json=asked)
        assert got.status_code == 200, got.text
        whole = got.json()["text_output"]
        (pen,) = models.pens
        assert pen.request.text == "Once" and pen.request.sampling.max_tokens == 4
        got = await client.post("/v2/models/plain/generate_stream", json=asked)
        pieces = [event["text_output"] for event in events(got)]
        assert "".join(pieces) == whole and whole


def test_only_addresses_of_models_are_taken() -> None:
    assert verb_of("/v2/models/org/m/versions/1/generate_stream") == "/generate_stream"
    assert verb_of("/v2/models/m/generate") == "/generate"
    assert verb_of("/v2/models/generate") is None
    assert verb_of("/v1/generate") is None
