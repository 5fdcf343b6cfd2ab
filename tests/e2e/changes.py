"""Changing a repository as people do, and following what the server tells of it on /v1/events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import msgspec

from repository.events import Event
from tests.e2e.server import WITHIN_S, Running

ROWS = 2  # of a request: all of an answer must come from one generation
ENDED = ("gone", "failed")


async def shell(command: str, folder: Path) -> None:
    """Runs a command line in `folder`; it must succeed."""
    process = await asyncio.create_subprocess_shell(
        command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, f"{command}: {said.decode()}"


class Told:
    """All events from the server's first one on, in order; `until` waits for one that is to come.

    Serials of generations rise and never repeat, so "a later one than this" needs no clock.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._more = asyncio.Event()

    async def read(self, lines: AsyncIterator[str]) -> None:
        async for line in lines:
            if line.startswith("data: "):
                event = msgspec.json.decode(line.removeprefix("data: "), type=Event)
                assert event.kind != "lost"
                self.events.append(event)
                self._more.set()

    async def until(self, wanted: Callable[[Event], bool], after: int = 0) -> Event:
        """The first event that is wanted, of those with an id above `after`."""
        seen = 0
        try:
            async with asyncio.timeout(WITHIN_S):
                while True:
                    for event in self.events[seen:]:
                        if event.id > after and wanted(event):
                            return event
                    seen = len(self.events)
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            raise AssertionError("\n".join(map(str, self.events))) from None

    async def ready(self, model: str, *, after: int = 0, version: int | None = None) -> Event:
        """The model's first generation with a serial above `after` that serves."""

        def wanted(event: Event) -> bool:
            return (
                event.model == model
                and event.generation > after
                and event.data.get("state") == "ready"
                and version in (None, event.version)
            )

        return await self.until(wanted)

    async def ended(self, generation: int) -> Event:
        return await self.until(
            lambda event: event.generation == generation and event.data.get("state") in ENDED
        )

    async def failed(self, model: str, *, after: int = 0) -> Event:
        return await self.until(
            lambda event: (
                event.model == model
                and event.generation > after
                and event.data.get("state") == "failed"
            )
        )

    async def problem(self, model: str, text: str = "", after: int = 0) -> Event:
        """What is wrong in its folder was told; `after` is an event's id."""
        return await self.until(
            lambda event: (
                event.kind == "model.problem"
                and event.model == model
                and text in event.data["message"]
            ),
            after,
        )

    async def removed(self, model: str) -> None:
        """Its folder is gone, and so is all that ran of it."""
        await self.until(lambda e: e.kind == "model.removed" and e.model == model)
        for generation in self.generations(model):
            await self.ended(generation)

    def kinds(self, model: str) -> list[str]:
        return [e.kind for e in self.events if e.model == model]

    def generations(self, model: str, version: int | None = None) -> list[int]:
        """Serials of all that were ever begun, oldest first."""
        found = {
            e.generation
            for e in self.events
            if e.model == model and e.generation and version in (None, e.version)
        }
        return sorted(found)

    def failures(self) -> list[Event]:
        return [e for e in self.events if e.data.get("state") in ("failing", "failed")]


@asynccontextmanager
async def told_by(server: Running, headers: dict[str, str] | None = None) -> AsyncIterator[Told]:
    told = Told()
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=None, headers=headers) as client,
        client.stream("GET", "/v1/events", params={"after": "0"}) as stream,
    ):
        reader = asyncio.create_task(told.read(stream.aiter_lines()))
        try:
            yield told
        finally:
            reader.cancel()
            await asyncio.wait([reader])


async def answer(client: httpx.AsyncClient, model: str, version: int | None = None) -> float:
    """`value` of the model y = x + value."""
    at = f"/v2/models/{model}" + (f"/versions/{version}" if version else "")
    data = [float(n) for n in range(4 * ROWS)]
    x = {"name": "x", "datatype": "FP32", "shape": [ROWS, 4], "data": data}
    got = await client.post(f"{at}/infer", json={"inputs": [x]})
    assert got.status_code == 200, got.text
    (y,) = got.json()["outputs"]
    (value,) = {after - before for before, after in zip(data, y["data"], strict=True)}
    return float(value)


async def status_of(client: httpx.AsyncClient, model: str) -> int:
    """What a request to the model is answered with, as an HTTP number."""
    x = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0.0] * 4}
    got = await client.post(f"/v2/models/{model}/infer", json={"inputs": [x]})
    return got.status_code


async def shown(client: httpx.AsyncClient, model: str) -> dict[str, object]:
    """GET /v1/models/{name}."""
    got = await client.get(f"/v1/models/{model}")
    assert got.status_code == 200, got.text
    found: dict[str, object] = got.json()
    return found
