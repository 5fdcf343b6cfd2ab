"""The native face, as PolarGrid documents it, over the real app and a fake repository."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest

from repository.config import ModelConfig
from repository.errors import InvalidRequestError, LoadFailedError, NoRoomError, SupersededError
from repository.lifecycle.states import Event
from repository.reports import DryRun
from repository.snapshot import Problem
from server import run
from server.limits import decode
from tests.fakes.repository import FakeRepository
from tests.fakes.serving import listening, serving


def depot(*names: str, loaded: bool = False) -> FakeRepository:
    models = FakeRepository()
    for name in names:
        models.add(name, loaded=loaded)
    return models


# load -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model_name", "model", "model_id"])
async def test_load_answers_when_the_model_serves_whatever_the_name_is_called(key: str) -> None:
    async with serving(depot("a")) as client:
        answer = await client.post("/v1/models/load", json={key: "a"})
        assert answer.status_code == 200
        assert answer.json() == {
            "status": "success",
            "model": "a",
            "force_reload": False,
            "message": "Model a loaded successfully",
        }


async def test_force_reload_is_passed_on_and_shown() -> None:
    models = depot("a", loaded=True)
    async with serving(models) as client:
        answer = await client.post(
            "/v1/models/load", json={"model_name": "a", "force_reload": True}
        )
        assert answer.json()["force_reload"] is True
        assert models.calls == [("load", "a", True)]


async def test_a_failed_load_says_why_in_both_spellings() -> None:
    models = depot("a")
    models.fail["a"] = LoadFailedError("model 'a': no opset 99")
    async with serving(models) as client:
        answer = await client.post("/v1/models/load", json={"model_name": "a"})
        assert answer.status_code == 500
        body = answer.json()
        assert body["detail"] == body["error"]["message"] == "model 'a': no opset 99"
        assert body["error"]["code"] == "load_failed" and body["error"]["type"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NoRoomError("needs 3, free 1", needed=3, free=1, residents={"b:1": 2}), 507),
        (SupersededError("overtaken"), 409),
    ],
)
async def test_each_family_has_its_number(error: Any, status: int) -> None:
    models = depot("a")
    models.fail["a"] = error
    async with serving(models) as client:
        answer = await client.post("/v1/models/load", json={"model_name": "a"})
        assert answer.status_code == status
        if status == 507:
            inner = answer.json()["error"]
            assert (inner["needed"], inner["free"], inner["residents"]) == (3, 1, {"b:1": 2})


async def test_an_unknown_model_is_404_and_draining_is_503_with_a_time_to_come_back() -> None:
    models = depot("a")
    async with serving(models) as client:
        assert (await client.post("/v1/models/load", json={"model": "b"})).status_code == 404
        models.drain()
        answer = await client.post("/v1/models/load", json={"model": "a"})
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1


async def test_a_dry_run_loads_nothing_and_tells_what_would_happen() -> None:
    models = depot("a")
    models.plans["a"] = DryRun("a", True, 700, 300, "cuda:0", ("b:1",), "b:1 would leave")
    async with serving(models) as client:
        answer = await client.post("/v1/models/load", json={"model_name": "a", "dry_run": True})
        assert answer.json() == {
            "status": "success",
            "model": "a",
            "dry_run": True,
            "would_load": True,
            "bytes_needed": 700,
            "bytes_free": 300,
            "device": "cuda:0",
            "would_evict": ["b:1"],
            "message": "b:1 would leave",
            "devices": ["cuda:0"],
            "needs": {"cuda:0": 700},
            "source": "estimate",
            "would_replace": False,
            "would_wake": False,
            "would_wait": False,
        }
        assert models.calls == []


BAD_BODIES = {
    "nothing": (b"", 400, "body"),
    "malformed": (b"{", 400, "JSON"),
    "not an object": (b"[1]", 400, "object"),
    "no name": (b"{}", 400, "model_name"),
    "an empty name": (b'{"model_name": ""}', 400, "model_name"),
    "two names": (b'{"model_name": "a", "model": "b"}', 400, "more than one"),
    "a number for a name": (b'{"model_name": 5}', 400, "str"),
    "a text for a flag": (b'{"model_name": "a", "force_reload": "no"}', 400, "bool"),
    "an unknown field": (b'{"model_name": "a", "force_relod": true}', 400, "'force_reload'"),
    "deep": (b'{"model_name": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", 400, ""),
    "deep unknown": (b'{"x": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"}", 400, ""),
    "not UTF-8": (b'{"model_name": "\xff"}', 400, ""),
    "huge": (b'{"model_name": "' + b"a" * 2_000_000 + b'"}', 413, ""),
}


@pytest.mark.parametrize("case", BAD_BODIES)
async def test_a_bad_body_is_a_clear_4xx_and_changes_nothing(case: str) -> None:
    raw, status, word = BAD_BODIES[case]
    models = depot("a")
    async with serving(models) as client:
        for call in ("load", "unload"):
            if call == "unload" and "force" in raw.decode("latin-1"):
                continue
            headers = {"content-type": "application/json"}
            answer = await client.post(f"/v1/models/{call}", content=raw, headers=headers)
            assert answer.status_code == status, answer.text
            assert word in answer.json()["detail"], answer.text
            assert answer.json()["error"]["message"]
        assert models.calls == []


async def test_a_body_that_is_not_json_by_its_own_word_is_415() -> None:
    async with serving(depot("a")) as client:
        answer = await client.post("/v1/models/load", data={"model_name": "a"})
        assert answer.status_code == 415 and "application/json" in answer.json()["detail"]


@pytest.mark.parametrize("one", [b"[", b'{"a":'])
def test_a_body_nested_without_end_is_a_request_that_is_wrong(one: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="deep"):
        decode(one * 100_000, Any)


# unload -----------------------------------------------------------------------------------------


async def test_unload_is_idempotent_and_says_what_came_back() -> None:
    async with serving(depot("a", loaded=True)) as client:
        for freed in (1000, 0):
            answer = await client.post("/v1/models/unload", json={"model_name": "a"})
            assert answer.status_code == 200
            body = answer.json()
            assert body.pop("freed_bytes") == freed
            assert body == {
                "status": "success",
                "model": "a",
                "message": "Model a unloaded successfully",
                "leaked_bytes": 0,
                "confirmed": True,
            }


async def test_unload_all_lists_what_failed_and_unloads_the_rest() -> None:
    models = depot("a", "b", "c", loaded=True)
    models.unload_errors["b"] = "its worker does not stop"
    async with serving(models) as client:
        answer = await client.post("/v1/models/unload-all")
        assert answer.status_code == 200
        body = answer.json()
        assert body["status"] == "success"
        assert body["unloaded_models"] == ["a", "c"] and body["total_unloaded"] == 2
        assert body["errors"] == [{"model": "b", "error": "its worker does not stop"}]


# what is shown ----------------------------------------------------------------------------------


async def test_status_names_every_model_with_one_of_the_four_words() -> None:
    models = depot("loaded", "loading", "leaving", "failed", "never", "org/nested")
    models.bring_up("loaded")
    models.begin("loading")
    models.bring_up("leaving").step(Event.RETIRE)
    models.break_down(models.begin("failed"), LoadFailedError("bad weights"))
    async with serving(models) as client:
        body = (await client.get("/v1/models/status")).json()
        assert body["loaded"] == ["loaded"]
        assert body["loading_status"] == {
            "loaded": "loaded",
            "loading": "loading",
            "leaving": "unloaded",
            "failed": "failed",
            "never": "unloaded",
            "org/nested": "unloaded",
        }
        assert body["repository"] == "/models"
        assert body["failed"] == {"failed": "bad weights"}


async def test_the_list_is_openais() -> None:
    models = depot("b")
    models.add("a", newest_ctime=1234.9)
    async with serving(models, server_name="depot-1") as client:
        for path in ("/v1/models", "/v1/models/"):
            body = (await client.get(path)).json()
            assert body["object"] == "list"
            ids = [(m["id"], m["object"], m["created"], m["owned_by"]) for m in body["data"]]
            assert ids == [("a", "model", 1234, "depot-1"), ("b", "model", 0, "depot-1")]


async def test_one_model_tells_its_whole_story() -> None:
    models = FakeRepository()
    models.add(
        "org/digits",
        1,
        2,
        aliases=("champion",),
        config=ModelConfig(max_batch_size=8, options={"threads": 2}),
        sources={"max_batch_size": "config.yaml:3", "options.threads": "config.yaml:7"},
        problems=(Problem("digits/3", "incomplete", "half a file", "copy it again", 3),),
    )
    models.bring_up("org/digits", 1)
    models.break_down(models.begin("org/digits", 2), LoadFailedError("bad weights"))
    async with serving(models) as client:
        body = (await client.get("/v1/models/org/digits")).json()
        assert (await client.get("/v1/models/champion")).json()["name"] == "org/digits"
    assert (body["name"], body["state"], body["serving_version"]) == ("org/digits", "loaded", 1)
    assert body["wanted"] is True and body["reloading"] is False
    assert body["aliases"] == ["champion"] and body["versions"] == [1, 2]
    assert body["problems"][0]["hint"] == "copy it again"
    assert body["last_error"]["message"]
    assert body["config"]["max_batch_size"] == {"value": 8, "source": "config.yaml:3"}
    assert body["config"]["options"] == {"value": {"threads": 2}, "source": "config.yaml:7"}
    assert body["config"]["pin"] == {"value": False, "source": "default"}
    assert body["memory"]["reserved"] == 1000
    newest, serving_one = body["generations"]
    assert (newest["version"], newest["state"], newest["error"]["message"]) == (
        2,
        "failed",
        "bad weights",
    )
    assert (serving_one["version"], serving_one["state"]) == (1, "ready")
    states = [step["state"] for step in serving_one["story"]]
    assert states == ["queued", "loading", "warming", "ready"]
    assert serving_one["story"][0]["at"] == serving_one["born"]
    assert serving_one["born"].endswith("+00:00")


async def test_an_unknown_model_or_path_or_verb_is_told_in_the_face_of_its_path() -> None:
    async with serving(depot("a")) as client:
        for method, path, status in (
            ("GET", "/v1/models/b", 404),
            ("GET", "/v1/nothing", 404),
            ("DELETE", "/v1/models/status", 405),
        ):
            answer = await client.request(method, path)
            assert answer.status_code == status
            assert answer.json()["detail"] == answer.json()["error"]["message"]
        for path, status in (("/v2/nothing", 404), ("/v2/models/b", 404)):
            answer = await client.get(path)
            assert answer.status_code == status and list(answer.json()) == ["error"]
        answer = await client.post("/v2/models/a/infer", json={"inputs": []})
        assert answer.status_code == 404 or answer.status_code == 503
        assert isinstance(answer.json()["error"], str)


async def test_an_unexpected_error_is_logged_and_not_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    models = depot("a")
    models.fail["a"] = RuntimeError("/secret/path")  # type: ignore[assignment]
    async with serving(models) as client:
        with caplog.at_level(logging.ERROR):
            answer = await client.post("/v1/models/load", json={"model_name": "a"})
        assert answer.status_code == 500 and "secret" not in answer.text
        assert "/secret/path" in caplog.text and "POST '/v1/models/load'" in caplog.text


# health and ids ---------------------------------------------------------------------------------


async def test_health_is_healthy_degraded_or_going() -> None:
    models = depot("a", loaded=True)
    models.add("b")
    async with serving(models) as client:
        answer = await client.get("/health")
        body = answer.json()
        assert answer.status_code == 200 and body["status"] == "healthy"
        assert body["backend"]["healthy"] is True
        assert body["backend"]["info"]["name"] == "modeldepot"
        assert {"node", "runtime", "timestamp", "features"} <= set(body)
        models.break_down(models.begin("b"), LoadFailedError("no"))
        answer = await client.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
        models.drain()
        answer = await client.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "unhealthy")


async def test_a_draining_server_still_answers_that_it_is_not_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever routes requests here has LINGER_S to notice, before connections are refused."""
    monkeypatch.setattr(run, "LINGER_S", 20.0)
    models = depot("a", loaded=True)
    async with (
        listening(models, grace=100) as (server, url),
        httpx.AsyncClient(base_url=url) as client,
    ):
        assert (await client.get("/v2/health/ready")).status_code == 200
        server.drain("test")
        for path in ("/v2/health/ready", "/health"):
            assert (await client.get(path)).status_code == 503
        assert (await client.get("/v1/models/status")).status_code == 200
        server.should_exit = True


async def test_strict_readiness_waits_for_every_wanted_model_and_the_default_does_not() -> None:
    models = depot("a", loaded=True)
    models.add("b")
    models.break_down(models.begin("b"), LoadFailedError("no"))
    for strict, before in ((False, 200), (True, 400)):
        async with serving(models, strict_readiness=strict) as client:
            assert (await client.get("/v2/health/ready")).status_code == before
    models.bring_up("b")
    async with serving(models, strict_readiness=True) as client:
        assert (await client.get("/v2/health/ready")).status_code == 200


async def test_health_and_status_answer_while_a_model_loads() -> None:
    models = depot("a")
    models.load_gate = asyncio.Event()
    async with serving(models) as client:
        load = asyncio.create_task(client.post("/v1/models/load", json={"model": "a"}))
        while not models.calls:
            assert (await client.get("/health")).status_code == 200
        assert (await client.get("/v1/models/status")).status_code == 200
        assert not load.done()
        models.load_gate.set()
        assert (await load).status_code == 200


@pytest.mark.parametrize("sent", ["abc-123", "x" * 128])
async def test_a_request_id_comes_back(sent: str) -> None:
    async with serving(depot()) as client:
        for path in ("/v1/models", "/v1/models/none", "/nowhere"):
            answer = await client.get(path, headers={"x-request-id": sent})
            assert answer.headers["x-request-id"] == sent


@pytest.mark.parametrize("sent", ["x" * 129, "é", "a\tb", ""])
async def test_a_request_id_that_is_not_plain_is_replaced(sent: str) -> None:
    async with serving(depot()) as client:
        headers = [(b"x-request-id", sent.encode())]
        found = (await client.get("/health", headers=headers)).headers["x-request-id"]
        assert found != sent and len(found) == 32
        assert (await client.get("/health")).headers["x-request-id"] != found


async def test_management_calls_leave_an_audit_line(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(depot("a")) as client:
        with caplog.at_level(logging.INFO, "modeldepot.audit"):
            await client.get("/v1/models")
            await client.post("/v1/models/load", json={"model_name": "a\nb"})
        (record,) = [r for r in caplog.records if r.name == "modeldepot.audit"]
        assert "status=404" in record.message and "'/v1/models/load'" in record.message
        assert "a\\nb" in record.message and "\n" not in record.message


async def test_the_repository_runs_as_long_as_the_app() -> None:
    models = depot()
    async with serving(models):
        assert (models.entered, models.left) == (1, 0)
    assert (models.entered, models.left) == (1, 1)
