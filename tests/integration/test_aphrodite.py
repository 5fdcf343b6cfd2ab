"""What Aphrodite's face tells of GPUs, of unloads that fail and of a server that is going: over the real
app and a fake repository, which has a GPU if one says so."""

from __future__ import annotations

from typing import Any

import httpx

from tests.fakes.heart import at
from tests.fakes.repository import FakeRepository
from tests.fakes.serving import serving

LOAD, UNLOAD = "/v1/load_model", "/v1/unload_model"
ALL_FREED = "All GPU memory has been freed."


def depot(**devices: str) -> FakeRepository:
    """Loaded models, and where each of them is."""
    models = FakeRepository()
    for name, device in devices.items():
        models.add(name)
        at(device, models.bring_up(name))
    return models


async def unload(client: httpx.AsyncClient, body: Any = None) -> Any:
    answer = await client.post(UNLOAD, **({"json": body} if body else {}))
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_the_last_model_that_leaves_the_gpus_frees_them() -> None:
    async with serving(depot(a="cuda:0", b="cuda:1", c="cpu")) as client:
        first = await unload(client, {"model": "a"})
        assert ALL_FREED not in first["message"] and "1000B of memory" in first["message"]
        assert (await unload(client, {"model": "b"}))["message"].endswith(ALL_FREED)
        assert ALL_FREED not in (await unload(client, {"model": "c"}))["message"]


async def test_all_models_that_leave_together_free_them_too() -> None:
    async with serving(depot(a="cuda:0", b="cpu")) as client:
        found = await unload(client)
        assert found["message"].endswith(ALL_FREED)
        assert found["unloaded_models"] == ["a", "b"] and found["freed_bytes"] == 2000


async def test_an_unload_of_all_that_leaves_one_behind_names_it_and_those_that_went() -> None:
    models = depot(a="cpu", b="cpu")
    models.unload_errors["b"] = "its worker cannot be ended"
    async with serving(models) as client:
        answer = await client.post(UNLOAD)
        error = answer.json()["error"]
        assert answer.status_code == error["code"] == 500
        assert "Unloaded: a" in error["message"]
        assert "'b': its worker cannot be ended" in error["message"]


async def test_a_server_that_is_going_refuses_loads_and_says_when_to_come_back() -> None:
    models = depot(a="cpu")
    async with serving(models, key="") as client:
        models.drain()
        for body in (None, {"model": "a"}):
            answer = await client.post(LOAD, json=body)
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "Service Unavailable"
