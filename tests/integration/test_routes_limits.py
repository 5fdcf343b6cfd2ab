"""On both routes: what a client can make the server keep, by sending much or reading little."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import psutil
import pytest

from repository.lifecycle.generation import Generation
from repository.messages import InferRequest
from server.intake import MAX_CHUNKS
from server.protocol import MOST_HEAD
from tests.fakes.manners import Future, Manners
from tests.integration.test_routes_bodies import MAX_BODY, binary, chunked, cut, padded
from tests.routes import (
    CLOSE,
    INFER,
    LAST,
    answers_in,
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
from tests.wire import Answer, connected, head, post

BYTES_OUT = {"parameters": {"binary_data_output": True}}
CHUNKED = head("POST", INFER, "Transfer-Encoding: chunked")
MIB = 1 << 20
BORDERS = [65_536 + step for step in (-1, 0, 1)] + [4 * 65_536 - 1, 4 * 65_536]


def many(rows: int, model: str = "wide") -> tuple[bytes, bytes]:
    """A request with as many numbers as make a large body, and the bytes of its answer's tensor."""
    values = np.arange(rows * 2, dtype=np.float32)
    return binary(*values.tolist(), model=model), (values * 2).tobytes()


@asynccontextmanager
async def socket_to(port: int, *, room: int = 0) -> AsyncIterator[socket.socket]:
    """`room`: bytes that its kernel takes before the server must wait."""
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)
        if room:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        await loop.sock_connect(sock, ("127.0.0.1", port))
        yield sock


class Asked(Manners):
    """Counts what reaches it."""

    count = 0

    def infer(self, gen: Generation, request: InferRequest) -> Future:
        self.count += 1
        return super().infer(gen, request)


async def until_still(models: Asked) -> None:
    """Until something has reached it, and then nothing for a while."""
    still, last = 0, 0
    while still < 50:
        await asyncio.sleep(0.001)
        still, last = (still + 1 if 0 < models.count == last else 0), models.count


@each_route
@in_uvloop
async def test_who_sends_two_hundred_large_requests_and_does_not_read_is_made_to_wait(
    route: str,
) -> None:
    """Its answers do not pile up here; once it reads it gets all of them, in order."""
    models = Asked()
    size, count = 250_000, 200
    script = b"".join(
        post(
            "/v2/models/large/infer",
            b" " * 60_000 + json.dumps(asking(size, 0, id=f"{n:03}", **BYTES_OUT)).encode(),
            *([CLOSE] if n == count - 1 else []),
        )
        for n in range(count)
    )
    loop = asyncio.get_running_loop()
    async with routed(route, models) as depot, socket_to(depot.port, room=65_536) as sock:
        rss = psutil.Process().memory_info().rss
        sending = asyncio.create_task(loop.sock_sendall(sock, script))
        await until_still(models)
        assert 0 < models.count < 60 and not sending.done()
        assert psutil.Process().memory_info().rss - rss < 64 * MIB
        heard = bytearray()
        while data := await loop.sock_recv(sock, MIB):
            heard += data
        await sending
        await depot.quiet()
    assert len(heard) > count * size
    ids = [int(found[1]) for found in re.finditer(rb'"id":"(\d+)"', heard)]
    assert ids == list(range(count))


@each_route
@in_uvloop
@pytest.mark.parametrize("model", ["next", "double"])
async def test_who_sends_far_ahead_of_a_slow_model_is_made_to_wait_and_not_refused(
    route: str, model: str
) -> None:
    """A few at a time are read; a hundred that came in one packet are another matter."""
    raw = infer(model, asking_body(20_000))
    async with routed(route) as depot:
        heard = asyncio.create_task(play(depot.port, [infer("held") + raw * 400 + LAST]))
        await depot.models.asked.wait()
        depot.models.release()
        assert statuses(await heard) == [200] * 402


@each_route
@in_uvloop
async def test_who_does_not_read_what_it_asks_one_by_one_is_made_to_wait_too(route: str) -> None:
    """Each request in a piece of its own, all with the same head."""
    models, size = Asked(), 300_000
    raw = post("/v2/models/large/infer", asking(size, 0, **BYTES_OUT))
    loop = asyncio.get_running_loop()
    async with routed(route, models) as depot, socket_to(depot.port, room=65_536) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(100):
            await loop.sock_sendall(sock, raw)
            await asyncio.sleep(0.0005)
        await until_still(models)
        assert models.count < 60
        await loop.sock_sendall(sock, LAST)
        heard = bytearray()
        while data := await loop.sock_recv(sock, MIB):
            heard += data
        assert statuses(bytes(heard)) == [200] * 101


@each_route
@in_uvloop
async def test_who_reads_a_byte_at_a_time_gets_all_of_it(route: str) -> None:
    loop = asyncio.get_running_loop()
    async with routed(route) as depot, socket_to(depot.port, room=2048) as sock:
        await loop.sock_sendall(sock, infer("large", asking(3000, 0)) + LAST)
        heard = b""
        while byte := await loop.sock_recv(sock, 1):
            heard += byte
        first, second = answers_in(heard)
        assert json.loads(first.body)["outputs"][0]["data"] == [n % 256 for n in range(3000)]
        assert second.status == 200


@each_route
@in_uvloop
async def test_a_client_that_does_not_read_holds_up_nobody_else(route: str) -> None:
    large = infer("large", asking(32 * MIB, 0, **BYTES_OUT))
    loop = asyncio.get_running_loop()
    async with routed(route) as depot, socket_to(depot.port, room=4096) as sock:
        await loop.sock_sendall(sock, large + infer() * 20)
        await depot.until(lambda: depot.models.leases == 1 or depot.connections == 1)
        async with connected(depot.port) as wire:
            for _ in range(50):
                await wire.send(infer("next"))
                assert (await wire.answer()).status == 200


@in_uvloop
async def test_the_limit_of_a_body_is_exact_however_it_comes() -> None:
    async with both(max_body=MAX_BODY) as depots:
        for size, status in ((MAX_BODY, 200), (MAX_BODY + 1, 400)):
            body = padded(size)
            for raw in (post(INFER, body), chunked([body]), chunked(cut(body, 1000)),
                        post(INFER, body, "Expect: 100-continue")):  # fmt: skip
                for piece in (len(raw), 65_536, 9_999):
                    heard = await same(depots, [*cut(raw, piece), LAST])
                    assert statuses(heard) == ([200, 200] if status == 200 else [400])
                    if status == 400:
                        (answer,) = answers_in(heard)
                        assert "exceeds the maximum allowed" in answer.text
        counts = [await depot.counts() for depot in depots]
        assert counts[0] == counts[1]
        assert counts[0]['load_shed_total{reason="body_size"}'] == 12


@in_uvloop
async def test_the_limit_of_pieces_is_about_tiny_ones() -> None:
    async with both() as depots:
        tiny = CHUNKED + b"1\r\n \r\n" * (MAX_CHUNKS + 1)
        for script in ([tiny], cut(tiny, 50_001)):
            (answer,) = answers_in(await same(depots, [*script, infer()]))
            assert answer.status == 400 and "pieces" in answer.text
        body = asking_body(70_000)
        assert len(body) < MAX_CHUNKS * 2
        just = CHUNKED + b"1\r\n \r\n" * 60_000 + b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
        assert statuses(await same(depots, [just, LAST])) == [200, 200]


def asking_body(size: int) -> bytes:
    raw = json.dumps(asking()).encode()
    return b" " * (size - len(raw)) + raw


@in_uvloop
async def test_a_head_is_bounded_also_behind_others_and_in_pieces() -> None:
    large = post(INFER, b"{}", "X-A: " + "a" * MOST_HEAD)
    below = post(INFER, asking(), "X-A: " + "a" * (MOST_HEAD - 300))
    async with both() as depots:
        for before in (b"", infer(), infer("slow") + infer()):
            for piece in (len(large) * 2, 20_000, 1_001):
                answered = [200] * (len(before) // 150)
                heard = await same(depots, cut(before + large + infer(), piece))
                assert statuses(heard) == [*answered, 431]
                heard = await same(depots, cut(before + below + LAST, piece))
                assert statuses(heard) == [*answered, 200, 200]


@each_route
@in_uvloop
async def test_what_follows_the_last_chunk_is_bounded_and_no_part_of_the_head(route: str) -> None:
    """A trailer may be endless, in one field or in many, and so may a chunk's extension."""
    top = CHUNKED + chunked([json.dumps(asking()).encode()]).partition(b"\r\n\r\n")[2][:-2]
    async with routed(route) as depot:
        for begin, more in ((top + b"X-A: ", b"a" * 60_000), (top, b"X-A: b\r\n" * 8_000),
                            (CHUNKED + b"1;", b"a" * 60_000)):  # fmt: skip
            async with connected(depot.port) as wire:
                await wire.send(begin)
                for _ in range(50):
                    await wire.send(more)
                answer = await wire.answer()
                assert answer.status in (400, 431) and answer.headers["connection"] == "close"
                await wire.end()
        await depot.quiet()


@in_uvloop
async def test_the_bound_of_what_follows_is_for_each_request() -> None:
    async with both() as depots:
        trailer = b"X-A: " + b"b" * 40_000 + b"\r\n\r\n"
        heard = await same(depots, [CHUNKED + b"0\r\n", trailer] * 4 + [LAST])
        assert statuses(heard) == [400] * 4 + [200]


# large bodies -------------------------------------------------------------------------------------


def tensor_of(answer: Answer) -> bytes:
    return answer.body[int(answer.headers["inference-header-content-length"]) :]


@each_route
@in_uvloop
@pytest.mark.parametrize("roomy", [False, True], ids=["kept here", "near the model"])
async def test_large_bodies_arrive_whole_however_they_come(route: str, roomy: bool) -> None:
    models = Manners(room_from=65_536 if roomy else None)
    rows = {8: 8 * MIB // 64}
    sizes = [size // 64 for size in (65_536, 600_000, MIB, 3 * MIB)]
    async with routed(route, models) as depot:
        for size in (*sizes, *rows.values()):
            raw, expected = many(size * 8)
            large = size == rows[8]
            for piece in (len(raw), MIB) if large else (len(raw), 65_536, 10_007):
                heard = await play(depot.port, [*cut(raw, piece), infer(), raw, LAST])
                found = answers_in(heard)
                assert [a.status for a in found] == [200] * 4
                assert tensor_of(found[0]) == tensor_of(found[2]) == expected
        await depot.quiet()
        assert (models.roomed > 0) == (roomy and route == "protocol")


@in_uvloop
async def test_bodies_about_the_size_at_which_something_changes_are_answered_alike() -> None:
    async with both(lambda: Manners(room_from=65_536)) as depots:
        for size in BORDERS:
            raw = post(INFER, asking_body(size))
            top = raw.index(b"\r\n\r\n") + 4
            for script in ([raw], [raw[:top], raw[top:]], [raw[: top + 1], raw[top + 1 :]],
                           [raw[:-1], raw[-1:]], [raw + raw], [raw + infer() + raw[:-1], raw[-1:]],
                           cut(raw, 65_536), [raw[:-1], raw[-1:] + infer()[:50], infer()[50:]],
                           [raw[:70], raw[70:] + infer("slow") + raw]):  # fmt: skip
                heard = await same(depots, [*script, LAST])
                assert set(statuses(heard)) == {200}, (size, [len(p) for p in script])
