"""On both routes: how long a connection lives, whose turn it is on it, and when a body is asked for."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from server import protocol
from server.app import ModelDepot, is_infer
from server.protocol import MOST_PIPELINED, Protocol
from tests.fakes.manners import Manners
from tests.integration.test_routes_bodies import wide
from tests.routes import (
    CLOSE,
    CONTINUE,
    INFER,
    LAST,
    Depot,
    asking,
    both,
    each_route,
    in_uvloop,
    infer,
    play,
    routed,
    same,
    statuses,
)
from tests.wire import connected, head, post

LIVE = head("GET", "/v2/health/live")
META = head("GET", "/v2/models/double")
OLD = infer().replace(b"HTTP/1.1", b"HTTP/1.0")
OLD_KEPT = infer("double", None, "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0")


@each_route
@in_uvloop
async def test_a_request_goes_the_way_that_was_chosen(
    route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    came = []
    usual = ModelDepot.__call__

    async def noting(self: ModelDepot, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            came.append(scope["path"])
        await usual(self, scope, receive, send)

    monkeypatch.setattr(ModelDepot, "__call__", noting)
    async with routed(route) as depot, connected(depot.port) as wire:
        for raw in (infer(), LIVE, infer("slow"), LAST):
            await wire.send(raw)
            assert (await wire.answer()).status == 200
    infers = [path for path in came if is_infer(path)]
    assert (len(came), len(infers)) == ((1, 0) if route == "protocol" else (4, 3))


@each_route
@in_uvloop
async def test_a_connection_serves_request_after_request(route: str) -> None:
    models = ("double", "next", "org/name", "slow", "none", "broken")
    async with routed(route) as depot, connected(depot.port) as wire:
        for n in range(120):
            await wire.send(infer(models[n % 6], asking(id=str(n))))
            answer = await wire.answer()
            assert answer.status == (200, 200, 200, 200, 404, 500)[n % 6]
            assert n % 6 > 3 or json.loads(answer.body)["id"] == str(n)
            assert "connection" not in answer.headers
        assert depot.connections == 1 and depot.models.leases == 0


@in_uvloop
async def test_who_is_hung_up_on_after_an_answer_does_not_depend_on_the_route() -> None:
    async with both() as depots:
        for raw in (OLD, OLD_KEPT, LAST, infer("slow", None, CLOSE), infer("none", None, CLOSE),
                    infer("double", b"{", CLOSE), infer("double", None, "connection: Close"),
                    infer("double", None, "Connection: TE, close"),
                    OLD.replace(b"Host: t\r\n", b"")):  # fmt: skip
            heard = await same(depots, raw + LIVE)
            assert len(statuses(heard)) == 1, raw
            assert b"\r\nconnection: close\r\n" in heard
        heard = await same(depots, infer("double", None, "Connection: keep-alive") + LIVE + LAST)
        assert statuses(heard) == [200] * 3


@each_route
@in_uvloop
async def test_an_idle_connection_is_closed_after_its_time(
    route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "LOOK_S", 0.005)
    async with routed(route) as depot:
        depot.server.config.timeout_keep_alive = 0
        for raw in (infer(), infer("slow"), infer("none"), infer() + LIVE + infer()):
            async with connected(depot.port) as wire:
                await wire.send(raw)
                assert (await wire.answer()).status in (200, 404)
                await wire.end()
        await depot.quiet()


@each_route
@in_uvloop
async def test_who_waits_for_an_answer_or_still_sends_is_not_idle(
    route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the answer before must not strike: not while a model runs, not in a body."""
    monkeypatch.setattr(protocol, "LOOK_S", 0.005)
    raw = infer("held")
    async with routed(route) as depot:
        depot.server.config.timeout_keep_alive = 0.02  # type: ignore[assignment]
        loop = asyncio.get_running_loop()
        async with connected(depot.port) as wire:
            await wire.send(infer())
            assert (await wire.answer()).status == 200
            await wire.send(raw[:60])
            await on(loop.time() + 0.05)
            await wire.send(raw[60:])
            await depot.models.asked.wait()
            await on(loop.time() + 0.05)
            depot.models.release()
            assert (await wire.answer()).status == 200
            assert await wire.end() == b""


async def on(until_s: float) -> None:
    loop = asyncio.get_running_loop()
    now = loop.create_future()
    loop.call_at(until_s, now.set_result, None)
    await now


@each_route
@in_uvloop
async def test_a_request_that_meets_the_end_of_an_idle_connection_is_answered_whole_or_not_at_all(
    route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "LOOK_S", 0.005)
    patience_s = 0.01
    loop = asyncio.get_running_loop()
    ends = set()
    async with routed(route) as depot:
        depot.server.config.timeout_keep_alive = patience_s  # type: ignore[assignment]
        for n in range(60):
            async with connected(depot.port) as wire:
                await wire.send(infer())
                assert (await wire.answer()).status == 200
                # around the moment at which it is closed, a fifth of a millisecond apart
                await on(loop.time() + patience_s + (n - 10) * 2e-4)
                await wire.send(infer("double", None, CLOSE))
                heard = await wire.end()
                assert heard == b"" or statuses(heard) == [200]
                ends.add(bool(heard))
        await depot.quiet()
    assert True in ends  # and most likely False, but that is for the machine to say


# whose turn it is ---------------------------------------------------------------------------------


@in_uvloop
async def test_pipelined_requests_are_answered_in_their_order_whatever_each_of_them_takes() -> None:
    kinds = (
        "slow",
        "double",
        "next",
        "none",
        "broken",
        "large",
        "full",
        "stuck",
        "gone",
        "org/name",
    )
    script = b""
    for n in range(100):
        if n % 7 == 3:
            script += (META, LIVE, head("GET", "/v2/models/none"), head("HEAD", "/v2/health/live"))[
                n % 4
            ]
        else:
            script += infer(kinds[n % 10], b"{" if n % 11 == 5 else asking(9, 9, id=str(n)))
    async with both() as depots:
        heard = await same(depots, script + LAST)
        found = re.findall(rb'"id":"(\d+)"', heard)
    assert found == sorted(found, key=int) and len(found) > 30


@each_route
@in_uvloop
async def test_a_fast_answer_waits_for_the_slow_one_before_it(route: str) -> None:
    async with routed(route) as depot, connected(depot.port) as wire:
        await wire.send(infer("held", asking(id="1")) + infer("double", asking(id="2")) + LIVE)
        await depot.models.asked.wait()
        await wire.send(infer("none") + infer("double", asking(id="3")))
        await turns()
        assert not wire.reader._buffer  # type: ignore[attr-defined]
        depot.models.release()
        found = [await wire.answer() for _ in range(5)]
        assert [a.status for a in found] == [200, 200, 200, 404, 200]
        assert [json.loads(found[n].body)["id"] for n in (0, 1, 4)] == ["1", "2", "3"]


async def turns(count: int = 50) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@each_route
@in_uvloop
async def test_only_so_many_requests_may_wait_behind_one(route: str) -> None:
    async with routed(route) as depot:
        for behind in (infer(), LIVE, infer() + META):
            async with connected(depot.port) as wire:
                depot.models.asked.clear()
                await wire.send(infer("held") + behind * 2000)
                await depot.models.asked.wait()
                await turns()
                depot.models.release()
                found = [(await wire.answer()).status for _ in range(MOST_PIPELINED + 1)]
                assert found == [200] * (MOST_PIPELINED + 1)
                answer = await wire.answer()
                assert answer.status == 429 and answer.headers["connection"] == "close"
                assert await wire.end() == b""
        await depot.quiet()


@each_route
@in_uvloop
async def test_as_many_as_may_wait_are_all_answered_again_and_again(route: str) -> None:
    async with routed(route) as depot, connected(depot.port) as wire:
        for _ in range(3):
            await wire.send((infer() + LIVE) * (MOST_PIPELINED // 2))
            found = [(await wire.answer()).status for _ in range(MOST_PIPELINED)]
            assert found == [200] * MOST_PIPELINED


# who is asked for the body ------------------------------------------------------------------------


def split_at_the_body(raw: bytes) -> tuple[bytes, bytes]:
    top, _, body = raw.partition(b"\r\n\r\n")
    return top + b"\r\n\r\n", body


@each_route
@in_uvloop
@pytest.mark.parametrize("model", ["double", "slow", "none", "broken"])
async def test_a_body_that_is_held_back_is_asked_for_and_then_answered(
    route: str, model: str
) -> None:
    top, body = split_at_the_body(infer(model, None, "Expect: 100-continue"))
    async with routed(route) as depot, connected(depot.port) as wire:
        for said in (top, top.replace(b"100-continue", b"100-Continue")):
            await wire.send(said)
            assert await wire.reader.readexactly(len(CONTINUE)) == CONTINUE
            for at in range(0, len(body), 20):
                await wire.send(body[at : at + 20])
            answer = await wire.answer()
            assert answer.status == {"none": 404, "broken": 500}.get(model, 200)
        await wire.send(infer())
        assert (await wire.answer()).status == 200


@each_route
@in_uvloop
async def test_a_body_that_is_not_wanted_is_refused_without_being_asked_for(route: str) -> None:
    wish = "Expect: 100-continue"
    refused = {
        head("POST", INFER, "Content-Length: 100001", wish): 400,
        head("POST", INFER, "Content-Length: 10", "Content-Encoding: br", wish): 501,
        head("POST", INFER, "Content-Length: 10", "Origin: http://evil.example", wish): 403,
        head("POST", INFER, "Content-Length: 10", wish).replace(
            b"Host: t", b"Host: a.example"
        ): 403,
    }
    async with routed(route, max_body=100_000) as depot:
        for raw, status in refused.items():
            async with connected(depot.port) as wire:
                await wire.send(raw)
                answer = await wire.answer()
                assert answer.status == status and answer.headers["connection"] == "close"
                assert await wire.end() == b""
        await depot.quiet()


@each_route
@in_uvloop
async def test_the_wish_for_a_go_ahead_waits_its_turn(route: str) -> None:
    """A 100 amid another's answer would be taken for that answer."""
    top, body = split_at_the_body(infer("double", asking(id="2"), "Expect: 100-continue"))
    async with routed(route) as depot, connected(depot.port) as wire:
        await wire.send(infer("held", asking(id="1")) + top)
        await depot.models.asked.wait()
        await turns()
        assert not wire.reader._buffer  # type: ignore[attr-defined]
        depot.models.release()
        assert json.loads((await wire.answer()).body)["id"] == "1"
        assert (await wire.answer()).status == 100
        await wire.send(body)
        assert json.loads((await wire.answer()).body)["id"] == "2"


# whose patience ends ------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LOOK_S", 0.01)
    for name in ("head_s", "body_s", "unread_s"):
        monkeypatch.setattr(Protocol, name, 0.05)


HALVES = {
    "a head": infer()[:40],
    "a body": infer()[:-5],
    "a chunk": head("POST", INFER, "Transfer-Encoding: chunked") + b"ff\r\n{",
    "a large body": head("POST", INFER, "Content-Length: 1000000") + b" " * 300_000,
    "a large body of bytes": wide(300_000)[:-100_000],
    "the same behind one of its kind": wide(300_000) + wide(300_000)[:-100_000],
    "a body that was asked for": head("POST", INFER, "Content-Length: 99", "Expect: 100-continue"),
    "a head behind good ones": infer() + infer("slow") + infer()[:40],
    "a body behind good ones": infer() + infer("slow") + infer()[:-5],
}


@pytest.mark.usefixtures("impatient")
@in_uvloop
async def test_half_a_request_is_waited_for_only_so_long() -> None:
    async with both(lambda: Manners(room_from=65_536)) as depots:
        for label, raw in HALVES.items():
            heard = await same(depots, [raw[:300_500], raw[300_500:]])
            assert statuses(heard)[-1] == 408, label
            for depot in depots:
                await depot.quiet()
        counts = [await depot.counts() for depot in depots]
        assert counts[0] == counts[1]


@each_route
@in_uvloop
async def test_a_body_may_be_slow_if_it_is_not_silent(
    route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "LOOK_S", 0.01)
    monkeypatch.setattr(Protocol, "body_s", 0.4)

    async def trickle(raw: bytes) -> int:
        async with connected(depot.port) as wire:
            for at in range(0, len(raw), len(raw) // 10):
                await wire.send(raw[at : at + len(raw) // 10])
                await on(asyncio.get_running_loop().time() + 0.06)
            return (await wire.answer()).status

    large = post(INFER, b" " * 300_000 + infer().partition(b"\r\n\r\n")[2])
    async with routed(route, Manners(room_from=65_536)) as depot:
        raws = (infer(), large, wide(300_000), wide(300_000, "none"))
        assert await asyncio.gather(*map(trickle, raws)) == [200, 200, 200, 404]


@pytest.mark.usefixtures("impatient")
@each_route
@in_uvloop
async def test_what_comes_of_a_body_after_all_is_not_heard_and_kept_nowhere(route: str) -> None:
    raw = wide(300_000)
    models = Manners(room_from=65_536)
    async with routed(route, models) as depot, connected(depot.port) as wire:
        await wire.send(raw[:-100_000])
        assert (await wire.answer()).status == 408
        assert depot.connections == 1 and models.rooms == 0  # it lingers, for what is still sent
        await wire.send(raw[-100_000:] + infer() * 3)
        assert await wire.end() == b""


@pytest.mark.usefixtures("impatient")
@each_route
@in_uvloop
async def test_who_does_not_read_its_answer_is_let_go(route: str) -> None:
    body = asking(64 << 20, 0, parameters={"binary_data_output": True})
    async with routed(route) as depot:
        _, writer = await asyncio.open_connection("127.0.0.1", depot.port, limit=1)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(infer("large", body))
        await depot.until(lambda: depot.connections == 1)
        await depot.quiet()
        writer.transport.abort()
        assert await still_serves(depot)


async def still_serves(depot: Depot) -> bool:
    return statuses(await play(depot.port, [post(INFER, asking(), CLOSE)])) == [200]
