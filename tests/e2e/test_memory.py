"""More models than memory: who gets in, who leaves, who stays, and what is told of it.

Nobody measures here: the sizes are those that configs declare, and the ledger's books must balance.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import models
from tests.e2e.changes import answer, shown
from tests.e2e.processes import inside, started, workers
from tests.e2e.server import CONFIG, REQUEST, WITHIN_S, add_model, open_gate, reached

pytestmark = pytest.mark.e2e

MIB = 2**20
EXPLICIT = ("--model-control-mode", "explicit")


def budget(mib: int) -> tuple[str, str]:
    return "--memory-budget", f"cpu={mib}MiB"


def add(repo: Path, name: str, mib: int, more: str = "") -> None:
    models.add_onnx(repo / name / "1" / "model.onnx")
    (repo / name / "config.yaml").write_text(f"memory: {mib}MiB\n{more}")


async def post(client: httpx.AsyncClient, verb: str, model: str, **more: Any) -> httpx.Response:
    return await client.post(f"/v1/models/{verb}", json={"model": model, **more})


async def load(client: httpx.AsyncClient, *names: str) -> None:
    for name in names:
        got = await post(client, "load", name)
        assert got.status_code == 200, got.text


async def foretold(client: httpx.AsyncClient, model: str) -> dict[str, Any]:
    """What a load would do; it must not have done any of it."""
    before = await books(client)
    got = await post(client, "load", model, dry_run=True)
    assert got.status_code == 200, got.text
    assert await books(client) == before
    found: dict[str, Any] = got.json()
    return found


async def books(client: httpx.AsyncClient) -> dict[str, tuple[str, list[int], int]]:
    """Of every model: its state, its generations and the bytes that it holds."""
    found = {}
    for name in (await client.get("/v1/models/status")).json()["loading_status"]:
        model: Any = await shown(client, name)
        serials = [gen["serial"] for gen in model["generations"]]
        found[name] = model["state"], serials, model["memory"]["reserved"]
    return found


async def loaded(client: httpx.AsyncClient) -> set[str]:
    return set((await client.get("/v1/models/status")).json()["loaded"])


async def ledger(client: httpx.AsyncClient) -> float:
    text = (await client.get("/metrics")).text
    (line,) = [
        row
        for row in text.splitlines()
        if row.startswith('modeldepot_device_memory_reserved_bytes{device="cpu"')
    ]
    return float(line.rsplit(" ", 1)[1])


async def ledger_is(client: httpx.AsyncClient, n_bytes: int) -> None:
    """A page of /metrics may be a second old."""
    async with asyncio.timeout(WITHIN_S):
        while await ledger(client) != n_bytes:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.1)


async def test_a_start_takes_what_fits_and_tells_of_the_rest_with_numbers(repo: Path) -> None:
    for name in ("a", "b", "c", "d"):
        add(repo, name, 100)
    async with started(repo, *budget(250)) as (server, client, told):
        status = (await client.get("/v1/models/status")).json()
        assert status["loaded"] == ["a", "b"] and set(status["failed"]) == {"c", "d"}
        assert "needs 100MiB on cpu; 50MiB of 250MiB are free" in status["failed"]["c"]
        assert "a:1#" in status["failed"]["c"] and "--memory-budget" in status["failed"]["c"]
        found: Any = await shown(client, "d")
        assert found["last_error"]["code"] == "no_room" and found["memory"]["reserved"] == 0
        assert (await client.get("/health")).json()["status"] == "degraded"
        await server.said(r"ready .*: 2 of 4 wanted models serve; failed: c, d")
        await ledger_is(client, 200 * MIB)

        # Nobody was evicted at the start, and what was wanted comes in when there is room again.
        assert (await post(client, "unload", "a")).json()["freed_bytes"] == 100 * MIB
        await told.ready("c")
        assert await loaded(client) == {"b", "c"}
        assert len(workers(server)) == 2


async def test_a_load_evicts_the_smallest_sufficient_set_as_the_dry_run_foretold(
    repo: Path,
) -> None:
    add(repo, "pinned", 100, "pin: true")
    add(repo, "small", 40)
    add(repo, "large", 100)
    add(repo, "dear", 100, "priority: 1")
    add(repo, "new", 90)
    async with started(repo, *EXPLICIT, *budget(350)) as (_, client, told):
        await load(client, "pinned", "small", "large", "dear")  # small is the longest unused
        before = await books(client)
        would = await foretold(client, "new")
        assert would["would_load"] and would["would_evict"] == ["large"]
        assert (would["bytes_needed"], would["bytes_free"]) == (90 * MIB, 10 * MIB)
        await load(client, "new")
        evicted = [e for e in told.events if e.kind == "model.evicted"]
        assert [(e.model, e.data["reason"]) for e in evicted] == [("large", "memory")]
        after = await books(client)
        assert await loaded(client) == {"pinned", "small", "dear", "new"}
        assert all(after[name] == before[name] for name in ("pinned", "small", "dear"))
        assert after["large"][0] == "unloaded" and after["large"][2] == 0
        await ledger_is(client, 330 * MIB)


async def test_the_longest_unused_leaves_first_and_use_counts(repo: Path) -> None:
    for name in ("a", "b", "c"):
        add(repo, name, 100)
    async with started(repo, *EXPLICIT, *budget(200)) as (_, client, _):
        await load(client, "a", "b")
        assert await answer(client, "a") == 1.0
        assert (await foretold(client, "c"))["would_evict"] == ["b"]
        await load(client, "c")
        assert await loaded(client) == {"a", "c"}


async def test_a_refusal_is_507_with_the_numbers_that_the_dry_run_told(repo: Path) -> None:
    add(repo, "pinned", 150, "pin: true")
    add(repo, "idle", 40)
    add(repo, "large", 100)
    add(repo, "huge", 300)
    async with started(repo, *EXPLICIT, *budget(200)) as (server, client, told):
        await load(client, "pinned", "idle")
        for name, needed in (("large", 100), ("huge", 300)):
            would = await foretold(client, name)
            assert not would["would_load"] and would["would_evict"] == []
            got = await post(client, "load", name)
            assert got.status_code == 507
            error = got.json()["error"]
            assert error["code"] == "no_room" and error["type"] == "capacity_error"
            assert (error["needed"], error["free"], error["device"]) == (
                needed * MIB,
                10 * MIB,
                "cpu",
            )
            assert sorted(error["residents"].values()) == [40 * MIB, 150 * MIB]
            assert [pinned.split(":")[0] for pinned in error["pinned"]] == ["pinned"]
            assert error["message"] == would["message"] == got.json()["detail"]
        assert await loaded(client) == {"pinned", "idle"} and len(workers(server)) == 2
        assert not [e for e in told.events if e.kind == "model.evicted"]
        assert (await client.post("/v2/models/large/infer", json=REQUEST)).status_code == 404


async def test_a_busy_model_stays_until_it_rests(repo: Path, gates: Path) -> None:
    add_model(repo, gates, "busy", infer="busy")
    (repo / "busy" / "config.yaml").write_text(CONFIG + "memory: 150MiB\n")
    add(repo, "new", 100)
    async with started(repo, *EXPLICIT, *budget(200)) as (_, client, told):
        await load(client, "busy")
        asked = asyncio.create_task(client.post("/v2/models/busy/infer", json=REQUEST))
        await reached(gates, "busy")
        would = await foretold(client, "new")
        assert would["would_load"] and "busy or leaving" in would["message"]
        loading = asyncio.create_task(load(client, "new"))
        await told.until(lambda e: e.model == "new" and e.data.get("state") == "queued")
        await inside(client, "busy", 1)
        assert await loaded(client) == {"busy"}
        open_gate(gates, "busy")
        assert (await asked).status_code == 200
        await loading
        assert await loaded(client) == {"new"}


async def test_a_model_leaves_when_its_time_is_over_and_comes_back_when_asked(
    repo: Path, gates: Path
) -> None:
    add(repo, "brief", 100, "ttl_s: 0.3")
    add(repo, "other", 50)
    add_model(repo, gates, "busy", infer="busy")
    (repo / "busy" / "config.yaml").write_text(CONFIG + "memory: 10MiB\nttl_s: 2\n")
    async with started(repo, *EXPLICIT, *budget(200)) as (_, client, told):
        await load(client, "other", "busy")
        asked = asyncio.create_task(client.post("/v2/models/busy/infer", json=REQUEST))
        await reached(gates, "busy")
        last = 0
        for _ in range(2):
            await load(client, "brief")
            assert await answer(client, "brief") == 1.0
            over = await told.until(lambda e: e.kind == "model.evicted", last)
            assert over.model == "brief" and over.data["reason"] == "idle_ttl"
            await told.ended(over.generation)
            last = over.id
        found: Any = await shown(client, "brief")
        assert found["state"] == "unloaded" and found["memory"]["reserved"] == 0
        open_gate(gates, "busy")
        assert (await asked).status_code == 200
        over = await told.until(lambda e: e.kind == "model.evicted", last)
        assert over.model == "busy"
        await told.ended(over.generation)
        assert await loaded(client) == {"other"}
        await ledger_is(client, 50 * MIB)


async def test_unloading_tells_the_bytes_and_balances_the_books(repo: Path) -> None:
    sizes = {"a": 30, "b": 50, "c": 70}
    for name, mib in sizes.items():
        add(repo, name, mib)
    async with started(repo, *budget(200)) as (server, client, _):
        for name, mib in sizes.items():
            found: Any = await shown(client, name)
            assert found["memory"]["reserved"] == found["memory"]["estimated"] == mib * MIB
            assert found["memory"]["measured"]["workspace"] > 0
        await ledger_is(client, 150 * MIB)
        assert (await post(client, "unload", "b")).json()["freed_bytes"] == 50 * MIB
        assert (await post(client, "unload", "b")).json()["freed_bytes"] == 0
        await ledger_is(client, 100 * MIB)
        everything = (await client.post("/v1/models/unload-all")).json()
        assert everything["unloaded_models"] == ["a", "c"] and everything["errors"] == []
        assert everything["freed_bytes"] == 100 * MIB
        assert {held for _, _, held in (await books(client)).values()} == {0}
        await ledger_is(client, 0)
        text = (await client.get("/metrics")).text
        assert "modeldepot_model_memory_reserved_bytes{" not in text
        assert workers(server) == []
