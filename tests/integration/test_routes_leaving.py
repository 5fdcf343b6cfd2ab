"""On both routes: clients that leave, at every byte of what they say and hear, and what is left."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import psutil
import pytest

from tests.fakes.manners import Manners
from tests.integration.test_routes_bodies import binary, chunked, cut, wide
from tests.routes import (
    CLOSE,
    INFER,
    Depot,
    asking,
    both,
    each_route,
    in_uvloop,
    infer,
    play,
    routed,
    statuses,
)
from tests.wire import connected, head, post

BYTES_OUT = {"parameters": {"binary_data_output": True}}
MIB = 1 << 20
REQUESTS = {
    "JSON": infer("next"),
    "bytes": binary(1, 2, model="next"),
    "chunks": chunked(cut(infer("next").partition(b"\r\n\r\n")[2], 40)),
    "two": infer("slow") + infer(),
}


async def say_and_leave(
    port: int,
    said: bytes,
    *,
    reset: bool = False,
    hear: int = 0,
    after: Callable[[], Awaitable[object]] | None = None,
) -> None:
    """`hear`: so many bytes of the answer. `reset`: not as a client that closes, but as one that is
    torn away."""
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", port))
        await loop.sock_sendall(sock, said)
        while hear > 0:
            hear -= len(await loop.sock_recv(sock, hear))
        if after:
            await after()
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            await asyncio.sleep(0)


async def still_serves(depot: Depot) -> bool:
    return statuses(await play(depot.port, [infer("double", None, "Connection: close")])) == [200]


def open_files() -> int:
    return psutil.Process().num_fds()


@each_route
@in_uvloop
async def test_a_client_may_leave_after_any_byte_of_its_request(route: str) -> None:
    async with routed(route) as depot:
        before = open_files()
        for raw in REQUESTS.values():
            for n, size in enumerate([*range(0, len(raw), 3), len(raw)]):
                await say_and_leave(depot.port, raw[:size], reset=bool(n % 2))
            assert await still_serves(depot)
        await depot.quiet()
        assert open_files() == before
        counts = await depot.counts()
    kept = {k: v for k, v in counts.items() if "requests_total" in k and "success" not in k}
    assert set(kept) <= {
        f'inference_requests_total{{model="{m}",outcome="canceled",protocol="http",version="{v}"}}'
        for m, v in (("_unknown", ""), ("next", "1"), ("slow", "1"), ("double", "2"))
    }


@in_uvloop
async def test_half_a_body_counts_as_canceled_whoever_counts() -> None:
    """Of no model: nothing of it was read."""
    whole = [raw for label, raw in REQUESTS.items() if label != "two"]
    halves = [raw[:-missing] for raw in whole for missing in (1, 20, 60)]
    halves += [head("POST", INFER, "Content-Length: 9"), post(INFER, b" " * 300_000)[:-1]]
    async with both() as depots:
        for depot in depots:
            for raw in halves:
                await say_and_leave(depot.port, raw)
            await depot.quiet()
        counts = [await depot.counts() for depot in depots]
    key = 'inference_requests_total{model="_unknown",outcome="canceled",protocol="http",version=""}'
    assert counts[0][key] == counts[1][key] == len(halves)


@each_route
@in_uvloop
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_who_leaves_while_the_model_runs_is_counted_and_what_it_asked_is_given_up(
    route: str, reset: bool
) -> None:
    async with routed(route) as depot:
        for raw in (infer("held"), binary(1, 2, model="held"), infer() + infer("held") + infer()):
            depot.models.asked.clear()
            await say_and_leave(depot.port, raw, reset=reset, after=depot.models.asked.wait)
            await depot.quiet()
            assert depot.models.unwanted == 1
            depot.models.release()
            assert await still_serves(depot)
        counts = await depot.counts()
    ended = 'inference_requests_total{model="held",outcome="canceled",protocol="http",version="1"}'
    assert counts[ended] == 3 and counts.get(ended.replace("canceled", "success")) is None


@each_route
@in_uvloop
async def test_of_several_clients_only_the_one_that_left_is_given_up(route: str) -> None:
    async with routed(route) as depot, connected(depot.port) as one, connected(depot.port) as two:
        for wire in (one, two):
            await wire.send(infer("held"))
        await depot.until(lambda: len(depot.models.waiting) == 2)
        three = partial(depot.until, lambda: len(depot.models.waiting) == 3)
        await say_and_leave(depot.port, infer("held"), reset=True, after=three)
        await depot.until(lambda: depot.models.unwanted == 1)
        depot.models.release()
        assert [(await wire.answer()).status for wire in (one, two)] == [200, 200]


@each_route
@in_uvloop
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_who_leaves_amid_its_answer_leaves_nothing(route: str, reset: bool) -> None:
    large = infer("large", asking(16 * MIB, 0, **BYTES_OUT))
    async with routed(route) as depot:
        before = open_files()
        for n in range(12):
            raw = large * (1 + n % 3) + infer("next") * (n % 2)
            await say_and_leave(depot.port, raw, reset=reset, hear=(1, 1024, 5 * MIB)[n % 3])
            await depot.quiet()
        assert await still_serves(depot)
        await depot.quiet()
        assert open_files() == before


@each_route
@in_uvloop
async def test_who_leaves_behind_its_requests_hurts_nobody(route: str) -> None:
    """Whole requests, and gone before the first answer: what was not begun need not be."""
    async with routed(route) as depot:
        for raw in (infer(), infer("slow"), infer("held"), infer() * 100, infer("slow") * 100,
                    (infer() + head("GET", "/health")) * 30, infer("large", asking(MIB, 0)) * 5,
                    post(INFER, asking(), "Expect: 100-continue"), infer("stuck") * 3):  # fmt: skip
            for reset in (False, True):
                await say_and_leave(depot.port, raw, reset=reset)
        await depot.until(lambda: depot.models.leases == 0)
        await depot.quiet()
        assert await still_serves(depot)


@each_route
@in_uvloop
async def test_the_place_of_a_large_body_is_given_back_however_it_ends(route: str) -> None:
    """Where there is such a place (`Repository.room`): sent whole, half, refused."""
    models = Manners(room_from=64 * 1024)
    whole = wide(300_000)
    async with routed(route, models) as depot:
        for n in range(24):
            size = (len(whole), len(whole) - 1, 1_000, 200_000)[n % 4]
            known = whole if n % 5 == 0 else b""
            await say_and_leave(depot.port, known + whole[:size], reset=bool(n % 3))
        for model in ("none", "double", "full", "stuck", "broken"):
            other = wide(300_000, model)
            for raw in (other, other + whole, whole + infer() + other):
                heard = await play(depot.port, [raw, infer("double", None, CLOSE)])
                assert statuses(heard)[-1] == 200
        await say_and_leave(
            depot.port, wide(300_000, "wide-held"), after=models.asked.wait, reset=True
        )
        await depot.until(lambda: models.unwanted == 1)
        models.release()  # it forgets what it was asked
        await depot.quiet()
        assert models.rooms == 0 and (models.roomed > 20) == (route == "protocol")


@each_route
@in_uvloop
async def test_the_place_of_a_large_body_is_given_back_while_its_connection_stays(
    route: str,
) -> None:
    models = Manners(room_from=64 * 1024)
    async with routed(route, models) as depot, connected(depot.port) as wire:
        for model in ("wide", "wide", "none", "stuck", "wide"):
            await wire.send(wide(300_000, model))
            await wire.answer()
            await depot.until(lambda: depot.models.leases == 0)
            assert models.rooms == 0 and depot.connections == 1
        assert (models.roomed > 0) == (route == "protocol")


@each_route
@in_uvloop
async def test_leaving_half_way_through_a_large_body_again_and_again_costs_nothing(
    route: str,
) -> None:
    halves = [post(INFER, b" " * (4 * MIB))[: 2 * MIB], wide(4 * MIB)[: 2 * MIB]]
    process = psutil.Process()
    async with routed(route, Manners(room_from=65_536)) as depot:
        for n in range(10):
            await say_and_leave(depot.port, halves[n % 2])
        await depot.quiet()
        before, rss = open_files(), process.memory_info().rss
        for n in range(100):
            with suppress(OSError):
                await say_and_leave(depot.port, halves[n % 2], reset=bool(n % 3))
        await depot.quiet()
        assert open_files() == before
        assert process.memory_info().rss - rss < 32 * MIB
        assert await still_serves(depot)
