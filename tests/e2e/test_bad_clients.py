"""Clients that stop half-way, say nothing, or lie about lengths: the others do not notice.

The tests share one server for each route: whatever a test does to it, the next one finds it well.
"""

from __future__ import annotations

import resource
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from tests.e2e.siege import GOOD, Siege, besieged, besieged_each_way, fault_of, until
from tests.routes import ROUTES, each_route
from tests.wire import JSON, Wire, connected, head, post

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

INFER = "/v2/models/add/infer"
CLIENTS = 200
CALM_S = 5.0  # for a request that takes milliseconds; nobody waits for the 200 on this machine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sieges(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, Siege]]:
    async with besieged_each_way(tmp_path_factory.mktemp("sieges")) as found:
        yield found


@pytest.fixture
def siege(sieges: dict[str, Siege], route: str) -> Siege:
    return sieges[route]


@asynccontextmanager
async def crowd(siege: Siege, said: bytes) -> AsyncIterator[list[Wire]]:
    """Clients that each have said this much, and now wait."""
    async with AsyncExitStack() as stack:
        wires = []
        for _ in range(CLIENTS):
            wire = await stack.enter_async_context(connected(siege.port))
            await wire.send(said)
            wires.append(wire)
        yield wires


def fds(siege: Siege) -> int:
    found: int = psutil.Process(siege.running.process.pid).num_fds()
    return found


STOPPED = {
    "nothing": b"",
    "half a line": b"GET /hea",
    "half a head": head("POST", INFER, "Content-Length: 1000000", JSON)[:-2],
    "half a body": head("POST", INFER, "Content-Length: 1000000", JSON) + b'{"inputs"',
    "half a chunk": head("POST", INFER, "Transfer-Encoding: chunked", JSON) + b"ff\r\n{",
    "events": head("GET", "/v1/events"),
    "idle": post(INFER, GOOD),
}
ON_EACH_ROUTE = ("half a body", "half a chunk", "idle")  # where the routes part


@pytest.mark.parametrize(
    ("route", "label"),
    [(r, k) for k in STOPPED for r in ROUTES if r == ROUTES[-1] or k in ON_EACH_ROUTE],
)
async def test_two_hundred_clients_that_stop_half_way_hurt_nobody(siege: Siege, label: str) -> None:
    said = STOPPED[label]
    assert await siege.works()
    open_files = fds(siege)
    async with crowd(siege, said):
        began = time.monotonic()
        for _ in range(20):
            assert await siege.works() and await siege.works("org/name")
        assert (await siege.client.get("/health")).status_code == 200
        again = await siege.client.post(
            "/v1/models/load", json={"model_name": "add", "force_reload": True}
        )
        assert again.status_code == 200
        assert time.monotonic() - began < CALM_S
    assert await siege.works()
    await until(lambda: fds(siege) <= open_files + 20)  # those that left are forgotten
    shown = (await siege.client.get("/v1/models/add")).json()
    assert [g["leases"] for g in shown["generations"] if g["state"] == "ready"] == [0]


async def test_a_low_limit_of_open_files_does_not_let_idle_clients_shut_others_out(
    tmp_path: Path,
) -> None:
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with AsyncExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, usual[1]))
        try:
            siege = await stack.enter_async_context(besieged(tmp_path))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, usual)
        async with crowd(siege, b"GET /hea"):
            assert await siege.works()
            answer = await siege.client.post(
                "/v1/models/load", json={"model_name": "add", "force_reload": True}
            )
            assert answer.status_code == 200, answer.text


async def test_a_head_without_an_end_takes_neither_memory_nor_time(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:  # a fresh one: it has no memory to spare
        assert await siege.works()
        rss = siege.rss()
        for said in (b"GET /health HTTP/1.1\r\nX-A: ", b"GET /", b"GET / HTTP/1.1\r\n"):
            async with connected(siege.port) as wire:
                await wire.send(said)
                more = b"X-B: b\r\n" * 131_072 if said.endswith(b"\r\n") else b"a" * (1 << 20)
                for _ in range(64):
                    await wire.send(more)
                    assert await siege.works()
                answer = await wire.answer()
                assert answer.status == 431 and fault_of(answer) == ""
        assert siege.rss() - rss < 32 << 20


SMUGGLED = head("POST", "/v1/models/unload-all", "Content-Length: 0")
TWO_WAYS = {
    "length, then chunks": head(
        "POST", INFER, f"Content-Length: {len(SMUGGLED) + 5}", "Transfer-Encoding: chunked"
    ) + b"0\r\n\r\n",
    "chunks, then length": head(
        "POST", INFER, "Transfer-Encoding: chunked", "Content-Length: 5"
    ) + b"0\r\n\r\n",
    "two lengths": head("POST", INFER, "Content-Length: 0", "Content-Length: 5"),
    "a length with a plus": head("POST", INFER, "Content-Length: +0"),
    "a length in a list": head("POST", INFER, "Content-Length: 0, 5"),
    "chunks in a disguise": head("POST", INFER, "Transfer-Encoding: \x0bchunked"),
    "chunks twice": head("POST", INFER, "Transfer-Encoding: chunked, chunked"),
    "a space before the colon": head("POST", INFER, "Content-Length : 0"),
    "a line feed in a header": head("POST", INFER, "X-A: b\nContent-Length: 0"),
    "a chunk's size with a blank": head("POST", INFER, "Transfer-Encoding: chunked") + b" 0\r\n\r\n",
    "a chunk's size in two": head("POST", INFER, "Transfer-Encoding: chunked") + b"0x0\r\n\r\n",
    "a chunk without its end": head("POST", INFER, "Transfer-Encoding: chunked") + b"1\r\na0\r\n\r\n",
}  # fmt: skip


@each_route
async def test_no_request_is_smuggled_behind_another(siege: Siege) -> None:
    before = await siege.truth()
    faults = []
    for label, raw in TWO_WAYS.items():
        async with connected(siege.port) as wire:
            await wire.send(raw + SMUGGLED)
            answer = await wire.answer()
            fault = fault_of(answer)
            if answer.status != 400 or fault or await wire.end():
                faults.append((label, fault, answer))
    assert faults == []
    assert await siege.truth() == before
    assert not [line for line in siege.running.log if "unload-all" in line]


@each_route
async def test_pipelined_requests_old_http_and_what_was_never_meant_for_us(
    siege: Siege,
) -> None:
    good = post(INFER, GOOD)
    async with connected(siege.port) as wire:
        await wire.send(good * 50 + post(INFER, b"{") + head("GET", "/health") + good)
        found = [(await wire.answer()).status for _ in range(53)]
        assert found == [200] * 50 + [400, 200, 200]
    async with connected(siege.port) as wire:
        await wire.send(good.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert (await wire.answer()).status == 200
        assert await wire.end() == b""
    for raw in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"SSH-2.0-OpenSSH_9.6\r\n", b"\0" * 100, b"OPTIONS * HTTP/1.1\r\n\r\n"):  # fmt: skip
        answer = await siege.ask(raw)
        assert fault_of(answer) == "", (raw, answer)
    assert await siege.works()


@each_route
async def test_a_client_that_leaves_while_its_body_is_refused_hurts_nobody(
    siege: Siege,
) -> None:
    for _ in range(50):
        async with connected(siege.port) as wire:
            await wire.send(head("POST", INFER, "Content-Length: 999999999999", JSON))
            await wire.send(b"x" * 100_000)
            wire.writer.transport.abort()
    assert await siege.works()
    assert not [line for line in siege.running.log if "Traceback" in line or "ERROR" in line]
