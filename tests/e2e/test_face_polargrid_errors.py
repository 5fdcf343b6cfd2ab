"""PolarGrid's model loading API against a real server: every error that it documents; request ids."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from server.turnstile import CALLS_AT_ONCE
from tests.e2e.grid import HUGE, RESERVED, USER, Grid, bearer, grid_in, is_native_error
from tests.e2e.server import REQUEST, open_gate, reached
from tests.wire import connected, post

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

GATED = {name: {"load": name} for name in ("crowded", "overtaken")}
WRITES = ("load", "unload", "unload-all")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def grid(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Grid]:
    async with grid_in(tmp_path_factory.mktemp("grid"), "gpt2", **GATED) as found:
        yield found


BAD = (
    (b"", "empty"),
    (b"{", "not JSON"),
    (b"[]", "Expected `object`"),
    (b"{}", "'model_name' is missing"),
    (b'{"model_name": ""}', "'model_name' is missing or empty"),
    (b'{"model_name": 3}', "Expected `str"),
    (b'{"model_name": "gpt2", "model": "whisper-1"}', "more than one"),
    (b'{"model_name": "gpt2", "force_relaod": true}', "did you mean 'force_reload'?"),
    (b'{"model_name": "gpt2", "force_reload": "yes"}', "Expected `bool`"),
    (b'{"model_name": "../gpt2"}', "invalid model name|path"),
    (b"\xff", "not UTF-8|not JSON"),
)


@pytest.mark.parametrize(("body", "text"), BAD, ids=range(len(BAD)))
async def test_a_body_that_cannot_be_meant_is_a_400_that_says_why(
    grid: Grid, body: bytes, text: str
) -> None:
    await grid.clear()
    headers = {"content-type": "application/json"}
    answer = await grid.post("/v1/models/load", content=body, headers=headers)
    assert answer.status_code in (400, 403) and answer.headers["x-request-id"]
    assert re.search(text, answer.json()["detail"]), answer.text
    assert set((await grid.states()).values()) == {"unloaded"}


async def test_a_purge_with_a_wrong_body_unloads_nothing(grid: Grid) -> None:
    await grid.clear("gpt2")
    for body in ({"forse": True}, {"force": "yes"}, [True]):
        text = is_native_error(await grid.post("/v1/gpu/purge", json=body), 400, "invalid_request")
        assert "forse" not in body or text == "unknown field 'forse'; did you mean 'force'?"
    assert (await grid.states())["gpt2"] == "loaded"


@pytest.mark.parametrize("call", [*(f"models/{w}" for w in WRITES), "gpu/purge"])
async def test_management_needs_a_key_and_it_must_be_an_admins(grid: Grid, call: str) -> None:
    await grid.clear("gpt2")
    body = {"model_name": "gpt2"} if call in ("models/load", "models/unload") else None
    async with httpx.AsyncClient(base_url=grid.running.url) as anyone:
        for headers in ({}, bearer("pg_wrong")):
            answer = await anyone.post(f"/v1/{call}", json=body, headers=headers)
            assert "key" in is_native_error(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        answer = await anyone.post(f"/v1/{call}", json=body, headers=bearer(USER))
        assert "admin" in is_native_error(answer, 403, "forbidden")
    assert (await grid.states())["gpt2"] == "loaded"


@pytest.mark.parametrize("path", ["models/status", "models", "gpu/status", "gpu/memory"])
async def test_looking_needs_a_key_of_any_scope(grid: Grid, path: str) -> None:
    async with httpx.AsyncClient(base_url=grid.running.url) as anyone:
        is_native_error(await anyone.get(f"/v1/{path}"), 401, "unauthorized")
        assert (await anyone.get(f"/v1/{path}", headers=bearer(USER))).status_code == 200


@pytest.mark.parametrize("call", ["load", "unload"])
async def test_a_model_that_is_not_there_is_a_404(grid: Grid, call: str) -> None:
    answer = await grid.post(f"/v1/models/{call}", json={"model_name": "gpt3"})
    assert "'gpt3'" in is_native_error(answer, 404, "model_not_found")


async def test_a_load_that_an_unload_overtakes_is_a_409(grid: Grid) -> None:
    await grid.clear()
    load = asyncio.create_task(grid.load("overtaken"))
    await reached(grid.gates, "overtaken")
    assert (await grid.unload("overtaken")).status_code == 200
    is_native_error(await load, 409, "superseded")


async def test_a_model_that_breaks_is_a_500_with_its_reason(grid: Grid) -> None:
    text = is_native_error(await grid.load("broken"), 500, "load_failed")
    assert "no weights today" in text and str(grid.gates.parent) not in text
    await grid.unload("broken")


async def test_a_model_that_does_not_fit_is_a_507_with_numbers(grid: Grid) -> None:
    await grid.clear()
    answer = await grid.load("huge")
    is_native_error(answer, 507, "no_room")
    error = answer.json()["error"]
    assert error["needed"] == HUGE and 0 < error["free"] < HUGE and error["device"] == "cpu"
    assert error["residents"] == {} and error["pinned"] == []
    status = (await grid.get("/v1/models/status")).json()
    assert status["failed"]["huge"] == error["message"]
    await grid.unload("huge")


async def test_one_client_with_too_many_calls_under_way_is_a_429_and_the_others_go_on(
    grid: Grid,
) -> None:
    """All those that were let in join one load, and are answered."""
    await grid.clear()
    port = int(grid.running.url.rpartition(":")[2])
    load = post("/v1/models/load", {"model_name": "crowded"}, *_raw(grid))
    async with AsyncExitStack() as stack:
        crowd = [await stack.enter_async_context(connected(port)) for _ in range(CALLS_AT_ONCE)]
        for wire in crowd:
            await wire.send(load)
        await reached(grid.gates, "crowded")
        while (answer := await grid.unload("gpt2")).status_code == 200:
            pass  # until the last of them has been read
        is_native_error(answer, 429, "too_many_requests")
        assert answer.headers["retry-after"] == "1"
        assert (await grid.get("/v1/models/status")).status_code == 200
        user = await grid.post("/v1/models/unload-all", headers=bearer(USER))
        is_native_error(user, 403, "forbidden")
        open_gate(grid.gates, "crowded")
        assert {(await wire.answer()).status for wire in crowd} == {200}
    assert (await grid.unload("crowded")).status_code == 200


def _raw(grid: Grid) -> list[str]:
    return [f"authorization: {grid.client.headers['authorization']}"]


async def test_a_server_that_is_going_is_a_503_with_a_time(tmp_path: Path) -> None:
    async with grid_in(tmp_path, "gpt2", patient={"infer": "patient"}) as grid:
        await grid.clear("patient")
        port = int(grid.running.url.rpartition(":")[2])
        async with connected(port) as wire:
            await wire.send(post("/v1/models/load", {"model_name": "patient"}, *_raw(grid)))
            assert (await wire.answer()).status == 200
            request = asyncio.create_task(grid.infer("patient"))
            await reached(grid.gates, "patient")
            raw = post("/v1/models/load", {"model_name": "gpt2"}, *_raw(grid))
            await wire.send(raw[:-1])  # it is on its way when the server is told to go
            grid.running.signal(signal.SIGTERM)
            await grid.running.said("drain")
            await wire.send(raw[-1:])
            answer = await wire.answer()
            assert answer.status == 503 and int(answer.headers["retry-after"]) >= 1
            assert b'"draining"' in answer.body and answer.headers["x-request-id"]
        open_gate(grid.gates, "patient")
        assert (await request).status_code == 200
        assert await grid.running.code() == 0


@pytest.mark.parametrize("name", RESERVED)
async def test_a_reserved_name_is_refused_with_a_reason(grid: Grid, name: str) -> None:
    """In the folder, where there is one of that name, and in a call."""
    assert await grid.running.said(rf"invalid model name '{name}': the server's own addresses use")
    assert name not in await grid.states()
    text = is_native_error(await grid.load(name), 400, "invalid_name")
    assert "the server's own addresses use it" in text


IDS = (
    ("GET", "/health", 200), ("GET", "/v1/models", 200), ("GET", "/v1/models/status", 200),
    ("GET", "/v1/models/none", 404), ("GET", "/v1/gpu/status", 200), ("GET", "/v1/nothing", 404),
    ("GET", "/nothing", 404), ("PUT", "/v1/models/load", 405), ("POST", "/v1/models/load", 400),
    ("POST", "/v1/models/unload-all", 200), ("POST", "/v1/gpu/purge", 200), ("GET", "/models", 200),
    ("GET", "/device/cpu", 200), ("DELETE", "/models", 422), ("GET", "/", 200), ("GET", "/v2", 200),
    ("GET", "/v2/models/none", 404), ("POST", "/v1/chat/completions", 400),
    ("POST", "/v1/completions", 400), ("POST", "/v1/embeddings", 400), ("GET", "/metrics", 200),
)  # fmt: skip


@pytest.mark.parametrize(("method", "path", "status"), IDS)
async def test_a_request_id_comes_back_or_is_made(
    grid: Grid, method: str, path: str, status: int
) -> None:
    sent = await grid.client.request(method, path, headers={"x-request-id": "call-7"})
    assert (sent.status_code, sent.headers.get_list("x-request-id")) == (status, ["call-7"])
    made = (await grid.client.request(method, path)).headers["x-request-id"]
    assert made and made != "call-7"


async def test_inference_over_v2_has_an_id_of_its_own_in_place_of_the_header(grid: Grid) -> None:
    await grid.clear("gpt2")
    headers = {"x-request-id": "call-7"}
    answer = await grid.post("/v2/models/gpt2/infer", json={**REQUEST, "id": "7"}, headers=headers)
    assert answer.json()["id"] == "7" and "x-request-id" not in answer.headers
