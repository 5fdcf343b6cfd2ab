"""PolarGrid's model loading API against a real server, row by row of what it documents."""

from __future__ import annotations

import asyncio
import shlex
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.e2e.grid import HUGE, Grid, grid_in, is_native_error
from tests.e2e.server import open_gate, reached

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

SEED_LOAD = """
curl -X POST https://api.ymq-01.edge.polargrid.ai:55111/v1/models/load \\
  -H "Authorization: Bearer pg_your_api_key" \\
  -H "Content-Type: application/json" \\
  -d '{
    "model_name": "llama-3.1-70b",
    "force_reload": false
  }'
"""
SEED_HOST = "https://api.ymq-01.edge.polargrid.ai:55111"
NAMES = ("llama-3.1-70b", "llama-3.1-8b", "whisper-1", "gpt2", "org/nested")
GATED = {name: {"load": name} for name in ("joined", "forced_join", "rising")} | {
    name: {"infer": name} for name in ("busy", "leaving")
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def grid(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Grid]:
    async with grid_in(tmp_path_factory.mktemp("grid"), *NAMES, **GATED) as found:
        yield found


# load -------------------------------------------------------------------------------------------


async def test_the_documents_own_curl_line_loads_a_model(grid: Grid) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    await grid.clear()
    line = SEED_LOAD.replace(SEED_HOST, grid.running.url)
    process = await asyncio.create_subprocess_exec(
        *shlex.split(line.replace("\\\n", " ")), "--silent", stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    assert httpx.Response(200, content=said).json() == {
        "status": "success",
        "model": "llama-3.1-70b",
        "force_reload": False,
        "message": "Model llama-3.1-70b loaded successfully",
    }
    assert (await grid.infer("llama-3.1-70b")).status_code == 200


@pytest.mark.parametrize("key", ["model_name", "model", "model_id"])
async def test_each_spelling_of_the_name_loads_and_unloads(grid: Grid, key: str) -> None:
    await grid.clear()
    assert (await grid.post("/v1/models/load", json={key: "gpt2"})).json()["model"] == "gpt2"
    found = (await grid.post("/v1/models/unload", json={key: "gpt2"})).json()
    assert found["status"] == "success" and found["model"] == "gpt2"


async def test_two_loads_at_once_are_one_load(grid: Grid) -> None:
    await grid.clear()
    calls = [asyncio.create_task(grid.load("joined")) for _ in range(3)]
    await reached(grid.gates, "joined")
    assert (await grid.states())["joined"] == "loading"
    open_gate(grid.gates, "joined")
    assert [(await call).status_code for call in calls] == [200] * 3
    assert len(await grid.serials("joined")) == 1


async def test_a_forced_load_joins_the_one_in_flight(grid: Grid) -> None:
    await grid.clear()
    first = asyncio.create_task(grid.load("forced-join"))
    await reached(grid.gates, "forced_join")
    second = asyncio.create_task(grid.load("forced-join", force_reload=True))
    await grid.load("gpt2")  # its look at the folder comes behind the other's
    open_gate(grid.gates, "forced_join")
    assert ((await first).status_code, (await second).status_code) == (200, 200)
    assert (await second).json()["force_reload"] is True
    assert len(await grid.serials("forced-join")) == 1


async def test_a_second_load_changes_nothing(grid: Grid) -> None:
    await grid.clear("gpt2")
    before = await grid.serials("gpt2")
    assert (await grid.load("gpt2")).json()["status"] == "success"
    assert await grid.serials("gpt2") == before


async def test_no_request_fails_while_a_forced_reload_replaces_the_model(grid: Grid) -> None:
    await grid.clear("gpt2")
    before, over, said = await grid.serials("gpt2"), asyncio.Event(), []

    async def ask() -> None:
        while not over.is_set():
            said.append((await grid.infer("gpt2")).status_code)

    asking = [asyncio.create_task(ask()) for _ in range(2)]
    for _ in range(2):
        assert (await grid.load("gpt2", force_reload=True)).status_code == 200
    over.set()
    await asyncio.gather(*asking)
    assert said and set(said) == {200}
    assert (await grid.serials("gpt2"))[0] >= before[0] + 2


async def test_a_dry_run_says_what_a_load_would_do_and_does_nothing(grid: Grid) -> None:
    await grid.clear()
    found = (await grid.load("gpt2", dry_run=True)).json()
    assert found.pop("message") and found.pop("bytes_needed") > 0 and found.pop("bytes_free") > 0
    assert list(found.pop("needs")) == ["cpu"]
    assert found == {
        "status": "success",
        "model": "gpt2",
        "dry_run": True,
        "would_load": True,
        "device": "cpu",
        "devices": ["cpu"],
        "source": "estimate",
        "would_evict": [],
        "would_replace": False,
        "would_wake": False,
        "would_wait": False,
    }
    big = (await grid.load("huge", dry_run=True)).json()
    assert big["would_load"] is False and big["bytes_needed"] == HUGE
    assert (await grid.states())["gpt2"] == "unloaded" and await grid.serials("gpt2") == []


# unload, status, list ---------------------------------------------------------------------------


async def test_an_unload_answers_as_documented_and_again_without_an_error(grid: Grid) -> None:
    await grid.clear("gpt2")
    first, again = [(await grid.unload("gpt2")).json() for _ in range(2)]
    assert first.pop("freed_bytes") > 0 and again.pop("freed_bytes") == 0
    expected = {
        "status": "success",
        "model": "gpt2",
        "message": "Model gpt2 unloaded successfully",
        "leaked_bytes": 0,
        "confirmed": True,
    }
    assert first == again == expected


async def test_unload_all_with_a_body_that_was_meant_for_unload_unloads_nothing(grid: Grid) -> None:
    await grid.clear("gpt2")
    meant = await grid.post("/v1/models/unload-all", json={"model_name": "whisper-1"})
    assert "/v1/models/unload" in is_native_error(meant, 400, "invalid_request")
    assert (await grid.states())["gpt2"] == "loaded"
    assert (await grid.post("/v1/models/unload-all", json={})).status_code == 200


async def test_unload_all_names_what_it_unloaded(grid: Grid) -> None:
    await grid.clear("llama-3.1-8b", "whisper-1")
    found = (await grid.post("/v1/models/unload-all")).json()
    assert found.pop("freed_bytes") > 0
    assert found == {
        "status": "success",
        "unloaded_models": ["llama-3.1-8b", "whisper-1"],
        "errors": [],
        "total_unloaded": 2,
        "leaked_bytes": 0,
        "confirmed": True,
    }
    again = (await grid.post("/v1/models/unload-all")).json()
    assert again["unloaded_models"] == [] and again["total_unloaded"] == 0


async def test_the_status_has_a_word_for_every_model(grid: Grid) -> None:
    await grid.clear("llama-3.1-8b", "whisper-1")
    assert (await grid.load("broken")).status_code == 500
    found = (await grid.get("/v1/models/status")).json()
    assert found["loaded"] == ["llama-3.1-8b", "whisper-1"]
    assert found["repository"] == str(grid.gates.parent / "models")
    every = {*NAMES, *(name.replace("_", "-") for name in GATED), "huge", "broken"}
    assert set(found["loading_status"]) == every
    words = found["loading_status"]
    assert words["gpt2"] == "unloaded" and words["whisper-1"] == "loaded"
    assert words["broken"] == "failed" and "no weights today" in found["failed"]["broken"]
    await grid.unload("broken")


async def test_a_model_that_is_unloading_is_shown_as_unloaded(grid: Grid) -> None:
    await grid.clear("leaving")
    request = asyncio.create_task(grid.infer("leaving"))
    await reached(grid.gates, "leaving")
    unload = asyncio.create_task(grid.unload("leaving"))
    while (await grid.get("/v1/models/leaving")).json()["state"] == "loaded":
        pass
    shown = (await grid.get("/v1/models/leaving")).json()["state"]
    assert (shown, (await grid.states())["leaving"]) == ("unloading", "unloaded")
    open_gate(grid.gates, "leaving")
    assert ((await request).status_code, (await unload).status_code) == (200, 200)


async def test_the_list_is_openais(grid: Grid) -> None:
    found = (await grid.get("/v1/models")).json()
    assert found["object"] == "list"
    cards = {card["id"]: card for card in found["data"]}
    assert {*NAMES} <= set(cards)
    assert all(c["object"] == "model" and c["owned_by"] and c["created"] for c in cards.values())


# GPUs and health --------------------------------------------------------------------------------


def is_now(text: str) -> bool:
    return abs(datetime.now(UTC) - datetime.fromisoformat(text)) < timedelta(minutes=1)


async def test_the_gpus_are_told_in_their_documented_shape(grid: Grid) -> None:
    """With figures from a driver: tests/integration/test_gpus.py."""
    status, memory = [(await grid.get(f"/v1/gpu/{what}")).json() for what in ("status", "memory")]
    assert is_now(status.pop("timestamp")) and is_now(memory.pop("timestamp"))
    assert status.pop("total_gpus") == len(status["gpus"]) == len(memory["memory"])
    assert set(status) == {"status", "gpus", "processes"} and set(memory) == {"status", "memory"}
    assert status["status"] == memory["status"] == "success"


@pytest.mark.parametrize("body", [None, {}, {"force": False}, {"force": True}])
async def test_a_purge_unloads_everything(grid: Grid, body: Any) -> None:
    await grid.clear("llama-3.1-8b", "whisper-1")
    found = (await grid.post("/v1/gpu/purge", json=body)).json()
    assert found.pop("freed_bytes") > 0
    assert found == {
        "status": "success",
        "unloaded_models": ["llama-3.1-8b", "whisper-1"],
        "errors": [],
        "total_unloaded": 2,
        "leaked_bytes": 0,
        "confirmed": True,
    }
    assert "loaded" not in (await grid.states()).values()


async def test_a_purge_waits_for_leave_while_a_request_runs(grid: Grid) -> None:
    await grid.clear("busy", "gpt2")
    request = asyncio.create_task(grid.infer("busy"))
    await reached(grid.gates, "busy")
    before = await grid.states()
    for body in (None, {}, {"force": False}):
        text = is_native_error(await grid.post("/v1/gpu/purge", json=body), 409, "conflict")
        assert "busy (1)" in text and '"force": true' in text
    assert await grid.states() == before and before["gpt2"] == "loaded"
    forced = asyncio.create_task(grid.post("/v1/gpu/purge", json={"force": True}))
    while (await grid.states())["busy"] != "unloaded":
        pass
    open_gate(grid.gates, "busy")
    assert (await request).status_code == 200
    assert (await forced).json()["unloaded_models"] == ["busy", "gpt2"]


async def test_a_purge_gives_up_a_load_in_flight_and_its_caller_is_told(grid: Grid) -> None:
    await grid.clear()
    load = asyncio.create_task(grid.load("rising"))
    await reached(grid.gates, "rising")
    assert (await grid.post("/v1/gpu/purge")).json()["unloaded_models"] == ["rising"]
    assert "overtaken" in is_native_error(await load, 409, "superseded")
    assert (await grid.states())["rising"] == "unloaded"


async def test_two_purges_at_once_both_end_with_nothing_loaded(grid: Grid) -> None:
    await grid.clear("llama-3.1-8b", "gpt2")
    answers = await asyncio.gather(*(grid.post("/v1/gpu/purge") for _ in range(2)))
    assert [a.status_code for a in answers] == [200, 200]
    assert {n for a in answers for n in a.json()["unloaded_models"]} == {"llama-3.1-8b", "gpt2"}
    assert "loaded" not in (await grid.states()).values()


async def test_health_is_open_and_says_what_is_true_now(grid: Grid) -> None:
    await grid.clear("gpt2")
    async with httpx.AsyncClient(base_url=grid.running.url) as anyone:
        found = (await anyone.get("/health")).json()
        assert found["status"] == "healthy" and is_now(found["timestamp"])
        assert found["node"] and found["runtime"].startswith("python 3")
        assert found["backend"]["healthy"] is True
        assert set(found["backend"]["info"]) == {"name", "version", "extensions"}
        features = found["features"]
        assert features["hot_reload"] and features["model_loading"] and features["durable"]
        assert not (features["on_demand"] or features["text_generation"] or features["adapters"])
        assert (await grid.load("broken")).status_code == 500
        assert (await anyone.get("/health")).json()["status"] == "degraded"
    await grid.unload("broken")
    assert (await grid.get("/health")).json()["status"] == "healthy"
