"""A real server with a few models, asked what no friend would ask, and what is true of it meanwhile."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.e2e.server import WITHIN_S, Running, serving
from tests.models import add_onnx, identity_onnx, two_by_two_onnx
from tests.routes import ROUTES, flags_of
from tests.wire import Answer, asked, post

MODELS = ("add", "org/name", "two", "words")
LONGEST_TEXT = 2000  # characters that an error may need
INTERNAL = re.compile(
    r"Traceback|litestar|msgspec|uvicorn|httptools|numpy|site-packages|repository\.|server\.|\.py\b"
    r"|(?<![\w./])/(?:work|tmp|home|usr|opt|root|var|proc)\b"
)


class Siege:
    def __init__(self, running: Running, client: httpx.AsyncClient, repo: Path) -> None:
        self.running, self.client, self.repo = running, client, repo
        self.port = int(running.url.rpartition(":")[2])

    async def truth(self) -> dict[str, Any]:
        """All that a refused request must not change: states, generations, the ledger, counters. Not
        what is measured, for that is looked at again all the time."""
        found: dict[str, Any] = {"status": (await self.client.get("/v1/models/status")).json()}
        for name in (await self.client.get("/v1/models")).json()["data"]:
            model = name["id"]
            page = found[model] = (await self.client.get(f"/v1/models/{model}")).json()
            for memory in (page["memory"], *(gen["memory"] for gen in page["generations"])):
                del memory["measured"]
                for device in memory["devices"].values():
                    del device["measured"]
            dry = {"model_name": model, "dry_run": True}
            found[f"{model}, dry"] = (await self.client.post("/v1/models/load", json=dry)).json()
        return found

    def rss(self) -> int:
        """Bytes of the server's own process."""
        rss: int = psutil.Process(self.running.process.pid).memory_info().rss
        return rss

    async def ask(self, raw: bytes) -> Answer:
        return await asked(self.port, raw)

    async def infer(self, body: Any, *headers: str, model: str = "add") -> Answer:
        return await self.ask(post(f"/v2/models/{model}/infer", body, *headers))

    async def works(self, model: str = "add") -> bool:
        return (await self.infer(GOOD, model=model)).status == 200

    @asynccontextmanager
    async def asking_on(
        self, ask: Callable[[], Awaitable[object]], *, every_s: float
    ) -> AsyncIterator[None]:
        """For what the server only does when somebody asks."""

        async def ask_on() -> None:
            while True:
                await ask()
                await asyncio.sleep(every_s)

        task = asyncio.create_task(ask_on())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def check(
        self, cases: Iterable[tuple[str, Answer]], allowed: Callable[[int], bool]
    ) -> list[str]:
        """What is wrong with these answers to bad requests, each with its label."""
        found = []
        for label, answer in cases:
            fault = fault_of(answer, allowed)
            if fault:
                found.append(f"{label}: {fault}: {answer.status} {answer.body[:300]!r}")
        if not await self.works():
            found.append("a good request is not answered any more")
        return found


async def until(holds: Callable[[], bool]) -> None:
    """For what no event tells of."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            if holds():
                return
            await asyncio.sleep(0.02)


def tensor(**change: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4], **change}


def request(*inputs: dict[str, Any], **change: Any) -> dict[str, Any]:
    return {"inputs": list(inputs) or [tensor()], **change}


GOOD = request()


def fault_of(answer: Answer, allowed: Callable[[int], bool] = lambda n: 400 <= n < 500) -> str:
    """Why this is no clear refusal; empty if it is one."""
    if not allowed(answer.status):
        return "status"
    if answer.headers.get("content-type") != "application/json":
        return "not JSON"
    try:
        text = answer.text
    except (ValueError, KeyError, TypeError):
        return "no error text"
    if not text or len(text) > LONGEST_TEXT:
        return f"a text of {len(text)} characters"
    inside = INTERNAL.search(json.dumps(json.loads(answer.body), ensure_ascii=False))
    return f"tells '{inside[0]}'" if inside else ""


def four_models(repo: Path) -> None:
    add_onnx(repo / "add" / "1" / "model.onnx")
    add_onnx(repo / "org" / "name" / "1" / "model.onnx")
    two_by_two_onnx(repo / "two" / "1" / "model.onnx")
    identity_onnx(repo / "words" / "1" / "model.onnx", "BYTES", (-1,))


@asynccontextmanager
async def besieged(
    tmp_path: Path,
    *flags: str,
    build: Callable[[Path], None] = four_models,
    headers: dict[str, str] | None = None,
) -> AsyncIterator[Siege]:
    """All models that can serve do when the block begins."""
    repo = tmp_path / "models"
    repo.mkdir()
    build(repo)
    async with serving(repo, "--settle", "0.1", *flags) as running:
        await running.said(r"ready after")
        async with httpx.AsyncClient(base_url=running.url, timeout=60, headers=headers) as client:
            yield Siege(running, client, repo)


@asynccontextmanager
async def besieged_each_way(home: Path, *flags: str) -> AsyncIterator[dict[str, Siege]]:
    """One server for each route, by route; for many tests, so that each must leave it as it was."""
    async with AsyncExitStack() as stack:
        found = {}
        for route in ROUTES:
            (home / route).mkdir()
            siege = besieged(home / route, *flags_of(route), *flags)
            found[route] = await stack.enter_async_context(siege)
        yield found
