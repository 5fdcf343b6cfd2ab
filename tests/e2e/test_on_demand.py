"""Models that load when a request asks for them, in a real server: two that do not fit together take
turns, and nobody is refused for it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import tiny
from tests.e2e.server import (
    CONFIG,
    REQUEST,
    WITHIN_S,
    Running,
    add_model,
    open_gate,
    reached,
    serving,
)

pytestmark = pytest.mark.e2e

MIB = 1024**2
ROUTES = ("/v2/models/{}/infer", "/v2//models/{}/infer")  # by the protocol, and over ASGI
TEXT = {"prompt": "the quick brown fox", "max_tokens": 4}
CHAT = {"messages": [{"role": "user", "content": "drop a folder"}], "max_tokens": 4}


def needs(folder: Path, mib: int, config: str = CONFIG) -> None:
    (folder / "config.yaml").write_text(f"{config}memory: {mib * MIB}\n")


@asynccontextmanager
async def depot(repo: Path, *flags: str) -> AsyncIterator[tuple[Running, httpx.AsyncClient]]:
    """A device of 100 MiB, nothing loaded at first."""
    common = (
        "--model-control-mode", "explicit", "--settle", "0.1", "--enable-inline-model-loading",
        "--memory-budget", "cpu=100MiB", "--min-residency", "0.1",
    )  # fmt: skip
    async with serving(repo, *common, *flags) as running, running.client() as client:
        await running.said(r"ready after")
        yield running, client


async def asked(client: httpx.AsyncClient, path: str, body: dict[str, Any] = REQUEST) -> int:
    return (await client.post(path, json=body)).status_code


def told(answer: httpx.Response) -> tuple[int, str, int]:
    return (
        answer.status_code,
        answer.headers["x-modeldepot-code"],
        int(answer.headers.get("retry-after", 0)),
    )


async def test_two_models_that_do_not_fit_together_answer_every_request_in_turns(
    repo: Path, gates: Path
) -> None:
    for name in ("a", "b", "huge"):
        add_model(repo, gates, name)
        needs(repo / name, 200 if name == "huge" else 60)
    async with depot(repo) as (_, client):
        for route in ROUTES:
            paths = [route.format("ab"[i % 2]) for i in range(20)]
            statuses = await asyncio.gather(*[asked(client, path) for path in paths])
            assert statuses == [200] * 20

        healths: list[float] = []
        done = asyncio.Event()

        async def look() -> None:
            while not done.is_set():
                began = time.perf_counter()
                assert (await client.get("/health")).status_code == 200
                healths.append(time.perf_counter() - began)

        async def work(at: int) -> Counter[int]:
            turns = range(20)
            return Counter(
                [await asked(client, ROUTES[n % 2].format("ab"[(at + n // 4) % 2])) for n in turns]
            )

        looking = asyncio.create_task(look())
        counts = await asyncio.gather(*[work(at) for at in range(16)])
        done.set()
        await looking
        assert sum(counts, Counter()) == {200: 320}
        assert max(healths) < 1

        for path, known in (
            ("/v2/models/nobody/infer", (404, "model_not_found", 0)),
            ("/v2/models/a/versions/7/infer", (404, "version_not_found", 0)),
            ("/v2/models/huge/infer", (507, "no_room", 0)),
        ):
            assert told(await client.post(path, json=REQUEST)) == known
        metrics = (await client.get("/metrics")).text
        assert 'trigger="demand"' in metrics and 'demand_waiting{model="a"} 0.0' in metrics

        await client.post("/v2/repository/models/a/unload")
        assert await asked(client, ROUTES[0].format("a")) == 200  # unloaded by hand, and back


async def test_who_waits_too_long_or_in_a_full_queue_is_told_when_to_come_again(
    repo: Path, gates: Path
) -> None:
    add_model(repo, gates, "slow", load="slow")
    flags = ("--demand-timeout", "2", "--demand-queue", "2")
    async with depot(repo, *flags) as (running, client):
        path = ROUTES[0].format("slow")
        asking = [asyncio.create_task(client.post(path, json=REQUEST)) for _ in range(3)]
        done, leaving = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        assert [told(task.result()) for task in done] == [(503, "queue_full", 1)]
        for task in leaving:
            task.cancel()
        await asyncio.wait(leaving)
        await reached(gates, "slow")
        for answer in await asyncio.gather(*[_let_in(client, route) for route in ROUTES]):
            status, code, again_s = told(answer)
            assert (status, code) == (503, "still_loading") and again_s >= 1
        shed = (await client.get("/metrics")).text
        assert 'load_shed_total{reason="deadline"} 2.0' in shed
        open_gate(gates, "slow")
        await running.said(r"model=slow .*→ready")
        assert await asked(client, path) == 200  # the load went on


async def _let_in(client: httpx.AsyncClient, route: str) -> httpx.Response:
    """Who has left holds no place, as soon as the server knows of it."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            answer = await client.post(route.format("slow"), json=REQUEST)
            if answer.headers["x-modeldepot-code"] != "queue_full":
                return answer


async def test_two_texts_models_that_do_not_fit_together_answer_on_the_openai_faces(
    repo: Path,
) -> None:
    for name in ("a", "b"):
        tiny.write_text_model(repo / name)
        needs(repo / name, 60, config="")
    async with depot(repo) as (_, client):
        asks = [
            asked(client, path, {"model": "ab"[i % 2], **body})
            for i in range(10)
            for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT))
        ]
        assert await asyncio.gather(*asks) == [200] * 20
