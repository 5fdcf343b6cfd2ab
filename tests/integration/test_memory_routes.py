"""Sleep, wake, pin and the devices by call, over the real app and a fake repository."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from repository.errors import NoRoomError
from repository.lifecycle.placement import Placement
from repository.reports import DryRun
from tests.e2e.described import KEYS, key_file
from tests.fakes.repository import FakeRepository
from tests.fakes.serving import serving

CALLS = ("sleep", "wake", "pin")


def depot(*names: str, loaded: bool = True) -> FakeRepository:
    models = FakeRepository()
    for name in names:
        models.add(name, loaded=loaded)
    return models


async def said(client: httpx.AsyncClient, verb: str, model: str, **more: Any) -> dict[str, Any]:
    answer = await client.post(f"/v1/models/{verb}", json={"model_name": model, **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def shown(client: httpx.AsyncClient, model: str) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get(f"/v1/models/{model}")).json()
    return found


# sleep and wake ---------------------------------------------------------------------------------


async def test_a_model_sleeps_and_wakes_by_call_and_the_bytes_are_told() -> None:
    async with serving(depot("a")) as client:
        assert await said(client, "sleep", "a") == {
            "status": "success",
            "model": "a",
            "message": "Model a sleeps with 1000B in host memory; 1000B are free again",
            "asleep": True,
            "generations": 1,
            "unloaded": 0,
            "why": "",
            "freed_bytes": 1000,
            "freed": {"cpu": 1000},
            "host_bytes": 1000,
            "took_s": 0.25,
        }
        found = await shown(client, "a")
        assert (found["state"], found["asleep"]) == ("unloaded", True)
        assert found["memory"]["devices"] == {"host": {"reserved": 1000, "measured": {}}}
        status = (await client.get("/v1/models/status")).json()
        assert status["asleep"] == ["a"] and status["loading_status"] == {"a": "unloaded"}

        woken = await said(client, "wake", "a")
        assert woken.pop("took_s") == 0.01
        assert woken == {
            "status": "success",
            "model": "a",
            "message": "Model a woken; it holds 1000B",
            "versions": [1],
            "woken": True,
            "already": False,
            "reserved_bytes": 1000,
            "reserved": {"cpu": 1000},
        }
        found = await shown(client, "a")
        assert (found["state"], found["asleep"]) == ("loaded", False)
        assert found["memory"]["devices"] == {"cpu": {"reserved": 1000, "measured": {}}}


async def test_calls_that_are_repeated_change_nothing_and_say_so() -> None:
    async with serving(depot("a")) as client:
        assert (await said(client, "sleep", "a"))["freed_bytes"] == 1000
        again = await said(client, "sleep", "a")
        assert (again["asleep"], again["freed_bytes"], again["host_bytes"]) == (True, 0, 1000)
        assert (await said(client, "wake", "a"))["woken"] is True
        again = await said(client, "wake", "a")
        assert (again["woken"], again["already"], again["reserved_bytes"]) == (False, True, 1000)
        assert again["message"] == "Model a was awake; it holds 1000B"
        for _ in range(2):
            assert (await said(client, "pin", "a"))["honoured"] is True
        for _ in range(2):
            assert (await said(client, "pin", "a", pinned=False))["pinned"] is False


async def test_what_is_not_loaded_or_cannot_sleep_is_a_conflict_and_stays_as_it_is() -> None:
    models = depot("b")
    models.add("a")
    models.awake["b"] = "backend 'x' cannot let a model sleep"
    async with serving(models) as client:
        for name, word in (("a", "not loaded"), ("b", "backend 'x'")):
            answer = await client.post("/v1/models/sleep", json={"model_name": name})
            assert answer.status_code == 409 and word in answer.json()["detail"]
        assert (await client.get("/v1/models/status")).json()["loaded"] == ["b"]


async def test_a_model_that_does_not_sleep_is_loaded_by_a_wake() -> None:
    async with serving(depot("a", loaded=False)) as client:
        found = await said(client, "wake", "a")
        assert (found["woken"], found["already"], found["reserved_bytes"]) == (False, False, 1000)
        assert found["message"] == "Model a loaded; it holds 1000B"


async def test_a_model_that_finds_no_place_to_sleep_is_unloaded_and_the_answer_says_why() -> None:
    models = depot("a")
    models.bedless["a"] = "the host tier has no place for 1000B"
    async with serving(models) as client:
        found = await said(client, "sleep", "a")
        assert (found["asleep"], found["unloaded"], found["freed_bytes"]) == (False, 1, 1000)
        assert found["why"] == "the host tier has no place for 1000B"
        assert found["message"].startswith("Model a was unloaded instead: the host tier has no")
        assert (await shown(client, "a"))["asleep"] is False


# pin --------------------------------------------------------------------------------------------


async def test_a_model_is_pinned_and_the_pin_is_taken_back() -> None:
    models = depot("a", "b")
    async with serving(models) as client:
        assert await said(client, "pin", "a") == {
            "status": "success",
            "model": "a",
            "message": "Model a is pinned",
            "pinned": True,
            "honoured": True,
            "why": "",
        }
        found = await shown(client, "a")
        assert found["pinned"] is True and found["pin_refused"] is None
        assert found["generations"][0]["pinned"] is True
        assert (await client.get("/v1/models/status")).json()["pinned"] == ["a"]
        found = await said(client, "pin", "a", pinned=False)
        assert found["message"] == "Model a is not pinned"
        assert (await shown(client, "a"))["pinned"] is False
        assert models.calls == [("pin", "a", True), ("pin", "a", False)]


async def test_a_pin_beyond_the_operators_cap_is_kept_and_not_honoured() -> None:
    models = depot("a")
    models.unpinned["a"] = "pinned models may hold 500B of cpu (--pin-cap), and it needs 1000B"
    async with serving(models) as client:
        found = await said(client, "pin", "a")
        assert (found["pinned"], found["honoured"]) == (True, False)
        assert "--pin-cap" in found["why"] and found["why"] in found["message"]
        shown_now = await shown(client, "a")
        assert shown_now["pinned"] is False and "--pin-cap" in shown_now["pin_refused"]


# what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
async def test_bad_calls_are_clear_errors_in_the_native_form(call: str) -> None:
    models = depot("a")
    async with serving(models) as client:
        for body, status, word in (
            ({"model_name": "b"}, 404, "b"),
            ({}, 400, "model_name"),
            ({"model_name": "a", "model": "b"}, 400, "more than one"),
            ({"model_name": "a", "level": 1}, 400, "level"),
        ):
            answer = await client.post(f"/v1/models/{call}", json=body)
            found = answer.json()
            assert answer.status_code == status, answer.text
            assert found["detail"] == found["error"]["message"] and word in found["detail"]
            assert found["error"]["type"] and answer.headers["x-request-id"]
        assert (await client.get(f"/v1/models/{call}")).status_code == 405
        models.drain()
        if call != "pin":
            answer = await client.post(f"/v1/models/{call}", json={"model_name": "a"})
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1


async def test_a_wake_that_finds_no_room_is_507_with_the_numbers() -> None:
    models = depot("a", loaded=False)
    models.fail["a"] = NoRoomError("needs 3, free 1", needed=3, free=1, residents={"b:1": 2})
    async with serving(models) as client:
        answer = await client.post("/v1/models/wake", json={"model_name": "a"})
        assert answer.status_code == 507
        inner = answer.json()["error"]
        assert (inner["needed"], inner["free"], inner["residents"]) == (3, 1, {"b:1": 2})


@pytest.mark.parametrize("key", ["model_name", "model", "model_id"])
async def test_the_name_may_be_under_any_of_the_three_keys(key: str) -> None:
    models = depot("a")
    async with serving(models) as client:
        for call in CALLS:
            assert (await client.post(f"/v1/models/{call}", json={key: "a"})).status_code == 200
    assert [call[:2] for call in models.calls] == [(call, "a") for call in CALLS]


async def test_who_may_and_what_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = key_file(tmp_path / "keys.yaml")
    models = depot("a")
    with caplog.at_level(logging.INFO, "modeldepot.audit"):
        async with serving(models, api_keys=keys) as client:
            for scope, status in (("inference", 403), ("metrics", 403), ("admin", 200)):
                headers = {"x-api-key": KEYS[scope]}
                for call in CALLS:
                    body = {"model_name": "a"}
                    answer = await client.post(f"/v1/models/{call}", json=body, headers=headers)
                    assert answer.status_code == status
            for scope, status in (("inference", 403), ("metrics", 200), ("admin", 200)):
                headers = {"x-api-key": KEYS[scope]}
                assert (await client.get("/v1/devices", headers=headers)).status_code == status
    noted = [
        record.getMessage() for record in caplog.records if "status=200" in record.getMessage()
    ]
    assert [line.split()[3] for line in noted] == [f"'/v1/models/{call}'" for call in CALLS]
    assert all("key='admin'" in line and "model_name='a'" in line for line in noted)


# what is shown ----------------------------------------------------------------------------------


async def test_the_devices_are_told_with_what_is_reserved_of_them() -> None:
    models = depot("a", "b")
    async with serving(models) as client:
        await said(client, "sleep", "b")
        cpu, host = (await client.get("/v1/devices")).json()["devices"]
        assert (cpu["device"], cpu["budget"], cpu["reserved"], cpu["free"]) == (
            "cpu",
            10_000,
            1000,
            9000,
        )
        assert (host["device"], host["reserved"], host["free"]) == ("host", 1000, 4000)
        assert cpu["total"] is None and cpu["unattributed"] is None and cpu["driver"] is None


async def test_memory_is_shown_by_device_and_kind_with_where_the_estimate_came_from() -> None:
    models = FakeRepository()
    models.add("a", n_bytes=700)
    gen = models.bring_up("a")
    gen.placement = Placement(("cuda:0", "cuda:1"), {"cuda:0": 400, "cuda:1": 500}, "measured")
    gen.held = dict(gen.placement.needs)
    gen.measured = {"cuda:0": {"weights": 300, "context": 90}, "cuda:1": {"weights": 310}}
    async with serving(models) as client:
        found = await shown(client, "a")
        memory = found["memory"]
        assert (memory["estimated"], memory["source"], memory["reserved"]) == (900, "measured", 900)
        assert memory["measured"] == {"weights": 610, "context": 90}
        assert memory["devices"] == {
            "cuda:0": {"reserved": 400, "measured": {"weights": 300, "context": 90}},
            "cuda:1": {"reserved": 500, "measured": {"weights": 310}},
        }
        (one,) = found["generations"]
        assert one["devices"] == ["cuda:0", "cuda:1"] and one["memory"] == memory


async def test_what_an_unload_did_not_get_back_is_told() -> None:
    models = depot("a", loaded=False)
    gen = models.bring_up("a")
    async with serving(models) as client:
        assert (await shown(client, "a"))["leaked_bytes"] == 0
        models.bring_down(gen)
        gen.leaked = 123
        found = await shown(client, "a")
        assert found["leaked_bytes"] == 123 and found["generations"][0]["leaked_bytes"] == 123


@pytest.mark.parametrize(("ability", "can"), [(("sleep",), True), ((), False)])
async def test_it_is_told_whether_what_runs_can_sleep(ability: tuple[str, ...], can: bool) -> None:
    models = depot("a", loaded=False)
    async with serving(models) as client:
        assert (await shown(client, "a"))["can_sleep"] is None
        gen = models.bring_up("a")
        assert gen.loaded is not None
        gen.loaded = replace(gen.loaded, abilities=ability)
        assert (await shown(client, "a"))["can_sleep"] is can


async def test_a_dry_run_tells_where_what_and_what_it_costs_the_others() -> None:
    models = depot("a", loaded=False)
    models.plans["a"] = DryRun(
        "a",
        True,
        700,
        300,
        "cuda:0",
        ("b",),
        "Model a would be loaded",
        devices=("cuda:0", "cuda:1"),
        needs={"cuda:0": 700, "cuda:1": 600},
        source="measured",
        would_replace=True,
        would_wake=True,
        would_wait=True,
    )
    async with serving(models) as client:
        found = await said(client, "load", "a", dry_run=True)
        assert found["devices"] == ["cuda:0", "cuda:1"] and found["source"] == "measured"
        assert found["needs"] == {"cuda:0": 700, "cuda:1": 600}
        assert found["would_replace"] and found["would_wake"] and found["would_wait"]
