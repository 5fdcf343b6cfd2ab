"""A server that is told to go while everybody uses it: who stops when told loses nothing."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests import models
from tests.e2e.changes import answer
from tests.e2e.processes import inside, left_behind, started
from tests.e2e.server import REQUEST, Running, add_model, gone, open_gate, reached

pytestmark = pytest.mark.e2e

GRACE_S = 30
HELD = 6
CLIENTS = 8


class Callers:
    """Clients that ask until they hear that the server drains, as a load balancer would."""

    def __init__(self, server: Running) -> None:
        self.answered: Counter[str] = Counter()
        self.draining = asyncio.Event()
        self.busy = asyncio.Event()
        self._server = server

    async def listen(self) -> list[str]:
        """Everything that the event stream says, to its end."""
        told = []
        async with self._server.client() as client, client.stream("GET", "/v1/events") as stream:
            async for line in stream.aiter_lines():
                told.append(line)
                if line == "event: server.draining":
                    self.draining.set()
        return told

    async def ask(self, model: str) -> None:
        """Each with a connection of its own. Whatever is not an answer is an error."""
        async with self._server.client() as client:
            while not self.draining.is_set():
                assert await answer(client, model) == 1.0
                self.answered[model] += 1
                if self.answered.total() >= 20 * CLIENTS:
                    self.busy.set()


@pytest.mark.parametrize(
    ("number", "group"), [(signal.SIGTERM, False), (signal.SIGINT, True)], ids=["SIGTERM", "ctrl-c"]
)
async def test_nobody_who_stops_asking_when_told_loses_a_request(
    repo: Path, gates: Path, number: signal.Signals, group: bool
) -> None:
    names = ("a", "b", "c", "d")
    for name in names:
        models.add_onnx(repo / name / "1" / "model.onnx")
    add_model(repo, gates, "slow", infer="slow")
    async with started(repo, "--grace", str(GRACE_S)) as (server, client, _):
        children = server.children()
        callers = Callers(server)
        async with asyncio.TaskGroup() as crowd:
            listener = crowd.create_task(callers.listen())
            for position in range(CLIENTS):
                crowd.create_task(callers.ask(names[position % len(names)]))
            slow = [crowd.create_task(held(server)) for _ in range(HELD)]
            await callers.busy.wait()
            await reached(gates, "slow")
            await inside(client, "slow", HELD)
            began = time.monotonic()
            server.signal(number, group=group)
            await callers.draining.wait()
            open_gate(gates, "slow")
        assert [task.result() for task in slow] == [200] * HELD
        assert listener.result()[-1] == "" and set(callers.answered) == set(names)
        assert await server.code() == 0, server.log
        assert time.monotonic() - began < GRACE_S
        assert gone(children) and left_behind(repo) == []
        with pytest.raises(httpx.ConnectError):
            await client.get("/health")


async def held(server: Running) -> int:
    async with server.client() as client:
        return (await client.post("/v2/models/slow/infer", json=REQUEST)).status_code
