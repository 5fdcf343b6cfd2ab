"""Several people at once order loads, unloads and forced loads of one model, while it is used.

Every call ends, with a status that is documented for it; afterwards one state is true everywhere.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.siege import GOOD, Siege, besieged, until

pytestmark = pytest.mark.e2e

CLIENTS, CALLS = 8, 300
LOAD, UNLOAD = "/v1/models/load", "/v1/models/unload"
ORDERS: tuple[tuple[str, dict[str, object]], ...] = (
    (LOAD, {}),
    (LOAD, {"force_reload": True}),
    (LOAD, {"dry_run": True}),
    (UNLOAD, {}),
)
DOCUMENTED = {LOAD: {200, 409}, UNLOAD: {200}, "/v1/models/unload-all": {200}}
ANSWERED = {200, 404, 503}  # an inference meanwhile; never a failure that was not asked for


async def admin(siege: Siege, seed: int, said: Counter[tuple[str, int]]) -> None:
    random_ = random.Random(seed)
    for _ in range(CALLS // CLIENTS + 1):
        path, order = random_.choice(ORDERS)
        if random_.random() < 0.03:
            path, order = "/v1/models/unload-all", {}
        named = path in (LOAD, UNLOAD)
        answer = await siege.client.post(
            path, json={"model_name": "add", **order} if named else None
        )
        said[path, answer.status_code] += 1
        told = answer.json()
        assert answer.status_code in DOCUMENTED[path], (path, order, answer.text)
        assert told.get("status") == "success" or told["error"]["message"]
        if answer.status_code == 409:
            assert told["error"]["code"] == "superseded"


async def user(siege: Siege, said: Counter[tuple[str, int]], end: asyncio.Event) -> None:
    while not end.is_set():
        answer = await siege.client.post("/v2/models/add/infer", json=GOOD)
        said["infer", answer.status_code] += 1
        assert answer.status_code in ANSWERED, answer.text


def pages(text: str, name: str) -> dict[str, float]:
    """The series of one metric: labels and value."""
    lines = [line for line in text.splitlines() if line.startswith(name + "{")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


async def agree(siege: Siege, *, loaded: bool, accept: str = "text/plain") -> None:
    """The model's page, the list, the ledger and the metrics tell one story. `accept`: a page of
    metrics is kept for a second, each kind for itself."""
    shown: dict[str, Any] = (await siege.client.get("/v1/models/add")).json()
    alive = [g for g in shown["generations"] if g["state"] not in ("gone", "failed")]
    assert [g["state"] for g in alive] == ["ready"] * loaded
    assert shown["state"] == ("loaded" if loaded else "unloaded") and not shown["reloading"]
    assert all(g["leases"] == 0 for g in shown["generations"])
    status = (await siege.client.get("/v1/models/status")).json()
    assert ("add" in status["loaded"]) is loaded
    ready = (await siege.client.get("/v2/models/add/ready")).status_code
    assert ready == (200 if loaded else 404)
    views = [
        (await siege.client.get(f"/v1/models/{name}")).json() for name in status["loading_status"]
    ]
    reserved = sum(view["memory"]["reserved"] for view in views)
    page = (await siege.client.get("/metrics", headers={"accept": accept})).text
    assert pages(page, "modeldepot_device_memory_reserved_bytes") == {
        'modeldepot_device_memory_reserved_bytes{device="cpu"}': reserved,
        'modeldepot_device_memory_reserved_bytes{device="host"}': 0,
    }
    assert re.search(r"^modeldepot_illegal_moves_total 0", page, re.MULTILINE)


async def test_a_storm_of_orders_ends_and_leaves_one_truth(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        before = {child.pid for child in siege.running.children()}
        said: Counter[tuple[str, int]] = Counter()
        end = asyncio.Event()
        async with asyncio.TaskGroup() as users:
            for _ in range(2):
                users.create_task(user(siege, said, end))
            async with asyncio.TaskGroup() as admins:
                for seed in range(CLIENTS):
                    admins.create_task(admin(siege, seed, said))
            end.set()
        assert sum(n for (path, _), n in said.items() if path != "infer") >= CALLS
        assert said[LOAD, 200] and said[UNLOAD, 200]

        names = ("add", "org/name", "two", "words")
        for name in names:
            answer = await siege.client.post(LOAD, json={"model_name": name})
            assert answer.status_code == 200, answer.text
        assert await siege.works()
        await agree(siege, loaded=True)
        await until(lambda: len(workers(siege)) == len(before))
        answer = await siege.client.post("/v1/models/unload-all")
        told = answer.json()
        assert (answer.status_code, told["errors"]) == (200, [])
        assert told["unloaded_models"] == sorted(names)
        await agree(siege, loaded=False, accept="application/openmetrics-text")
        assert (await siege.client.get("/v1/models/org/name")).json()["memory"]["reserved"] == 0
        assert not [line for line in siege.running.log if "Traceback" in line]


def workers(siege: Siege) -> list[psutil.Process]:
    return [p for p in siege.running.children() if p.status() != psutil.STATUS_ZOMBIE]


async def test_a_storm_over_files_that_change_ends_too(tmp_path: Path) -> None:
    """Someone copies a new version in, time and again, while two admins load and unload."""
    async with besieged(tmp_path) as siege:
        said: Counter[tuple[str, int]] = Counter()
        model = tmp_path / "models" / "add" / "1" / "model.onnx"
        raw = model.read_bytes()
        end = asyncio.Event()

        async def writer() -> None:
            while not end.is_set():
                model.with_suffix(".part").write_bytes(raw)
                model.with_suffix(".part").rename(model)
                await siege.client.get("/health")

        async def orders(seed: int) -> None:
            for _ in range(6):
                path, order = random.Random(seed).choice(ORDERS)
                answer = await siege.client.post(path, json={"model_name": "add", **order})
                said[path, answer.status_code] += 1
                assert answer.status_code in (200, 409, 500, 503), answer.text
                seed += 100

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(writer())
            async with asyncio.TaskGroup() as admins:
                for seed in range(4):
                    admins.create_task(orders(seed))
            end.set()
        answer = await siege.client.post(LOAD, json={"model_name": "add"})
        assert answer.status_code == 200, answer.text
        assert await siege.works()
        await agree(siege, loaded=True)
